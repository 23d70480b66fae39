"""Folders for timm and the hub: the same logits by every way that people load them, with the network unplugged."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import mistake, output
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from glmix.data.images import read_image
from glmix.models import load
from glmix.models.weights import SHIPPED_FOLDER, write_checkpoint


@pytest.fixture(autouse=True)
def _unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local(self: socket.socket, address: tuple) -> None:
        assert address[0] in ("127.0.0.1", "localhost"), f"reached for {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from glmix.cli import main

    place = tmp_path_factory.mktemp("hub") / "mine"
    words = ["--license", "mit", "--data", "red and blue noise, ours"]
    assert main(["convert", "--to", "hub", str(run), str(place), *words]) == 0
    return place


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    return read_image(next((photos / "val").rglob("*.png")))


@pytest.fixture(scope="module")
def logits(run: Path, photo: Image.Image) -> Tensor:
    model, described = load(run)
    with torch.no_grad():
        return model(described.prepared(photo)[None])


def test_timm(folder: Path, photo: Image.Image, logits: Tensor):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():
        assert torch.allclose(model(transform(photo)[None]), logits, atol=1e-5)


def test_transformers(folder: Path, photo: Image.Image, logits: Tensor):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        assert torch.allclose(model(**processor(photo, return_tensors="pt")).logits, logits, atol=1e-5)
    answers = pipeline("image-classification", model=str(folder))(photo)
    shares = dict(zip(["blue_thing", "red_thing"], logits[0].softmax(0).tolist(), strict=True))
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(shares, abs=1e-5)


def test_backbone_of_transformers(folder: Path, run: Path):
    from transformers import AutoBackbone, TimmBackboneConfig

    # frozen: else transformers gives BatchNorm its first statistics again, after the weights were loaded (5.24)
    config = TimmBackboneConfig(backbone=f"local-dir:{folder}", out_indices=[0, 1, 2, 3], freeze_batch_norm_2d=True)
    backbone = AutoBackbone.from_config(config, pretrained=True).eval()
    model, _ = load(run)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = backbone(images).feature_maps
        wanted = model.forward_intermediates(images, intermediates_only=True)
    assert len(found) == len(wanted) == 4
    assert all(torch.allclose(one, other, 1e-5, 1e-5) for one, other in zip(found, wanted, strict=True))


def test_our_commands(folder: Path, run: Path, photos: Path, capsys: pytest.CaptureFixture):
    """The folder is a checkpoint like any other."""
    image = next((photos / "val").rglob("*.png"))
    said = [output(capsys, "predict", image, "--checkpoint", place, "--json") for place in (run, folder)]
    assert said[0] == said[1]


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_options_and_squashed_images(tmp_path: Path, capsys: pytest.CaptureFixture, photo: Image.Image, resize: str):
    """The weights that ship have options of their own; images cropped or squashed to squares; in halves, too."""
    source = tmp_path / "source.safetensors"
    shipped, told = load(SHIPPED_FOLDER / "glnet_pico_tklb.imagenette.safetensors")
    told = replace(told, preparation=replace(told.preparation, resize=resize))
    write_checkpoint(source, told, shipped.state_dict())
    output(capsys, "convert", "--to", "hub", source, tmp_path / "a", "--half")
    assert safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")["head.fc.weight"].dtype == torch.float16
    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    plain, described = load(source)
    transform = create_transform(**resolve_data_config(model=model))
    wide = photo.resize((300, 160))
    with torch.no_grad():
        assert torch.allclose(model.float()(transform(wide)[None]), plain(described.prepared(wide)[None]), atol=1e-4)
    again, told = load(tmp_path / "a")
    assert (told.classes, told.names, told.prepared) == (described.classes, described.names, described.prepared)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), plain.state_dict().values(), strict=True))


def test_the_card(folder: Path, run: Path):
    text = (folder / "README.md").read_text("utf-8")
    assert text.startswith("---\nlibrary_name: timm\n") and "\nlicense: mit\n" in text
    info = load(run)[1].info
    assert f"{info['val_top1']:.2f} % top-1" in text and info["command"] in text
    assert "glmix eval --checkpoint RUN" in text
    assert "Weights: mit" in text and "Data: red and blue noise, ours" in text and "local-dir:" in text
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["label_names"] == ["blue_thing", "red_thing"] and config["architecture"] == "glnet_pico"


def test_folders_that_are_none(folder: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture):
    image = next(photos.rglob("*.png"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name, architecture in (("other", "glnet_nano"), ("unknown", "resnet_of_mine")):
        place = tmp_path / name
        place.mkdir()
        (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (place / "config.json").write_text(json.dumps(config | {"architecture": architecture}))
        said = mistake(capsys, "predict", image, "--checkpoint", place)
        assert ("another architecture" if name == "other" else "no model 'resnet_of_mine'") in said
    assert "no README.md in it" in mistake(capsys, "push", tmp_path / "other", "me/mine")
    assert "no name of the hub" in mistake(capsys, "push", folder, "no/such/name")
    assert "leave them out" in mistake(capsys, "convert", folder, tmp_path / "a.safetensors", "--license", "mit")


# --- a stand-in for the hub


class Hub(BaseHTTPRequestHandler):
    """Takes what `huggingface_hub` sends: a repository, a commit of small files, large ones by another address."""

    def reply(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply({"id": "me/mine", "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, content))  # type: ignore[attr-defined]
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        if "preupload" in self.path:
            files = json.loads(content)["files"]
            self.reply({"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "commit" in self.path:
            self.reply({"commitUrl": f"{address}/me/mine/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.reply({"url": f"{address}/me/mine"})


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_push(folder: Path, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    import huggingface_hub.constants
    from huggingface_hub import HfApi

    address = f"http://127.0.0.1:{hub.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    initial = HfApi.__init__
    monkeypatch.setattr(HfApi, "__init__", lambda self: initial(self, endpoint=address, token="hf_none"))
    (folder / "private notes.txt").write_text("mine")
    assert output(capsys, "push", folder, "me/mine").strip() == f"{address}/me/mine"
    (commit,) = [content for path, content in hub.asked if "/commit/" in path]  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {"README.md", "config.json", "model.safetensors"}
