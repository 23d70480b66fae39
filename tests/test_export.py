"""Exported files compute what the network does, say what they are, and are used like checkpoints."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import mistake, output
from PIL import Image
from torch import nn

from glmix.data.prepare import Preparation
from glmix.export.files import Terms, open_exported
from glmix.export.graph import for_engine
from glmix.export.write import static, write
from glmix.models import load
from glmix.models.description import Description
from glmix.models.fold import optimize_for_inference
from glmix.models.heads import with_head
from glmix.models.weights import write_checkpoint

TINY: dict[str, Any] = {"dims": (32, 64), "depths": (1, 1), "mixers": ("glmix", "attention"), "num_classes": 2}
FOUR: dict[str, Any] = {"dims": (32, 32, 64, 64), "depths": (1, 1, 2, 1)}
CLASSES = ["blue_thing", "red_thing"]
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


def tiny(variant: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(variant, **{**TINY, **options}).eval()


def terms(form: str, precision: str = "fp32", variant: str = "glnet_pico") -> Terms:
    preparation, options = Preparation(size=(64, 64)), {k: v for k, v in TINY.items() if k != "num_classes"}
    return Terms(Description("classify", variant, options, CLASSES, CLASSES, preparation=preparation), form, precision)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny("glnet_pico")
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return write_checkpoint(path, terms("onnx").description, model.state_dict())


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each format, of any size, and a static one."""
    folder = tmp_path_factory.mktemp("exported")
    model, described = load(checkpoint)
    made = {form: folder / f"free{suffix}" for form, suffix in SUFFIX.items()}
    for form, path in made.items():
        write(model, Terms(described, form), path)
    made["static"] = folder / "static.xml"
    write(model, static(Terms(described, "openvino")), made["static"])
    return made


@pytest.mark.parametrize("variant", ["glnet_stl_paramslot", "glnet_16g", "glnet_4g_tklb", "glnet_nano"])
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@torch.no_grad()
def test_the_form_for_engines_is_the_same_network(variant: str, engine: str) -> None:
    model = tiny(variant, **FOUR, mixers=("glmix", "glmix", "alternate", "attention"))
    graph = for_engine(optimize_for_inference(model), engine)
    torch.testing.assert_close(graph(IMAGE), model(IMAGE))


@torch.no_grad()
def test_other_rows_of_the_ablations_keep_their_form() -> None:
    model = tiny("glnet_4g", assignment="hard")
    torch.testing.assert_close(for_engine(optimize_for_inference(model), "openvino")(IMAGE), model(IMAGE))


@pytest.mark.parametrize("form", SUFFIX)
def test_any_size_and_batch(files: dict[str, Path], checkpoint: Path, form: str) -> None:
    model, described = load(checkpoint)
    exported = open_exported(files[form])
    for shape in ((1, 3, 64, 64), (3, 3, 97, 131)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert exported.terms.description == described
    assert (exported.terms.precision, exported.terms.size, exported.terms.batch) == ("fp32", None, 0)


def test_static(files: dict[str, Path], checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    exported = open_exported(files["static"])
    x = torch.randn(3, 3, 64, 64)  # one by one
    torch.testing.assert_close(exported(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def figures(capsys: pytest.CaptureFixture, *arguments: object) -> dict[str, float]:
    """What `glmix eval` measures."""
    said = json.loads(output(capsys, "eval", "--workers", 0, "--json", *arguments))
    assert said.pop("skipped") == []
    return said


@pytest.mark.parametrize("form", [*SUFFIX, "static"])
def test_eval_and_predict_run_the_file(
    files: dict[str, Path], checkpoint: Path, photos: Path, form: str, capsys: pytest.CaptureFixture
) -> None:
    """The figures and answers are those of the checkpoint."""
    wanted, given = (figures(capsys, "--checkpoint", c, "--data", photos) for c in (checkpoint, files[form]))
    assert given == pytest.approx(wanted, rel=1e-4)
    photo = photos / "val" / "red_thing" / "0.png"
    answers = [output(capsys, "predict", "--checkpoint", p, photo) for p in (checkpoint, files[form])]
    assert answers[0] == answers[1]


def test_fast_gives_the_same(checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", checkpoint, "--data", photos]
    wanted, given = (figures(capsys, *arguments, *more) for more in ([], ["--fast"]))
    assert given == pytest.approx(wanted, rel=1e-4)
    photo = photos / "val" / "red_thing" / "0.png"
    pictures = []
    for more in ([], ["--fast"]):
        out = tmp_path / str(len(more))
        output(capsys, "explain", "--checkpoint", checkpoint, "--out", out, "--figures", "slots", *more, photo)
        pictures.append(np.asarray(Image.open(next(out.glob("*.png")))).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 2  # of 255: what rounding does to a colour


def test_bf16(checkpoint: Path, tmp_path: Path) -> None:
    model, described = load(checkpoint)
    found = write(model, static(Terms(described, "openvino", "bf16")), tmp_path / "half.xml")
    assert len(found) == 2 and all("top-1 agrees" in line for line in found)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(open_exported(tmp_path / "half.xml")(x), model(x).detach(), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_int8_with_its_accuracy(
    files: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 16), ("val", 2)):
        for name, colour in (("blue_thing", (20, 40, 200)), ("red_thing", (200, 30, 30))):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                noise = Image.effect_noise((64, 64), 40 + i).convert("RGB")
                Image.blend(noise, Image.new("RGB", noise.size, colour), 0.5).save(data / split / name / f"{i}.png")
    path = tmp_path / "small.xml"
    said = output(capsys, "export", "--checkpoint", checkpoint, "--precision", "int8", "--static", "--data", data, path)
    assert "before: top-1" in said and "after: top-1" in said
    assert path.with_suffix(".bin").stat().st_size < 0.6 * files["static"].with_suffix(".bin").stat().st_size


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    class Odd(nn.Module):
        """Its trace remembers which way it went."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grows = 1.0 if torch.compiler.is_exporting() else 2.0
            return x.mean((2, 3)) * grows

    from glmix.errors import UserError

    with pytest.raises(UserError, match=r"odd\.pt2: computes something else than the network .*; not kept"):
        write(Odd(), terms("torch"), tmp_path / "odd.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", SUFFIX)
def test_no_space_leaves_nothing_half_written(form: str, checkpoint: Path, tmp_path: Path) -> None:
    """No file may grow beyond 64 kB, and what was there before stays."""
    from glmix.errors import UserError

    model, described = load(checkpoint)
    path = tmp_path / f"out{SUFFIX[form]}"
    path.write_bytes(b"of before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(UserError, match="free space, or choose another place") as error:
            write(model, static(Terms(described, form)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"of before"


@pytest.mark.parametrize("head", ["retinanet", "mask-rcnn"])
def test_detectors(head: str, tmp_path: Path, capsys: Any) -> None:
    """ONNX alone, of one size: what it finds is what the network finds, however many that are; predict takes it."""
    torch.manual_seed(0)
    body = timm.create_model("glnet_pico", **{**FOUR, "num_classes": 0})
    model = with_head(body, {"name": head, "head_channels": 32}, 2).eval()
    if head == "retinanet":  # begins with next to nothing found
        torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=8.0)
        torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -3.0)
    described = Description("detect", "glnet_pico", FOUR, CLASSES[:2], CLASSES[:2])
    described.preparation = Preparation(size=(60, 90), resize="short")
    described.head = {"name": head, "head_channels": 32}
    path = write_checkpoint(tmp_path / "boxes.safetensors", described, model.state_dict())
    assert "exported to ONNX alone" in mistake(capsys, "export", "--checkpoint", path, tmp_path / "o.xml")
    said = output(capsys, "export", "--checkpoint", path, tmp_path / "o.onnx")
    assert "one image of 64 x 96" in said and "objects, boxes differ by at most" in said
    exported = open_exported(tmp_path / "o.onnx")
    counts = set()
    for seed in range(4):
        image = seed * torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            (wanted,) = model(image)
        (given,) = exported(image)
        assert given.keys() == wanted.keys() and len(given["scores"]) == len(wanted["scores"])
        torch.testing.assert_close(given["scores"], wanted["scores"], atol=1e-4, rtol=1e-4)
        counts.add(len(given["scores"]))
    assert max(counts) > 0 and (head == "mask-rcnn" or len(counts) > 2)
    Image.new("RGB", (120, 70), "grey").save(tmp_path / "grey.png")
    row = json.loads(output(capsys, "predict", "--checkpoint", tmp_path / "o.onnx", "--json", tmp_path / "grey.png"))
    assert all(len(each["bbox"]) == 4 for each in row["predictions"])


def test_mistakes(files: dict[str, Path], checkpoint: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.onnx"
    export = ["export", "--checkpoint", checkpoint]
    assert "must end in .xml" in mistake(capsys, *export, "--format", "openvino", out)
    assert "no --format is given" in mistake(capsys, *export, tmp_path / "out.bin")
    assert "onnxruntime has none" in mistake(capsys, *export, "--precision", "bf16", out)
    assert "int8 needs images" in mistake(capsys, *export, "--precision", "int8", tmp_path / "out.xml")
    few = mistake(capsys, *export, "--precision", "int8", "--data", photos, tmp_path / "out.xml")
    assert "24 images; int8 takes its ranges from at least 32" in few
    assert "takes images of 64 x 64 alone, not 96 x 96" in mistake(
        capsys, "eval", "--checkpoint", files["static"], "--data", photos, "--workers", 0, "--image-size", 96
    )
    assert "shows no slots" in mistake(capsys, "explain", "--checkpoint", files["onnx"], "x.jpg")
    assert "folded already" in mistake(capsys, "eval", "--checkpoint", files["onnx"], "--data", photos, "--fast")
    assert "no such file" in mistake(capsys, "predict", "--checkpoint", tmp_path / "no.onnx", "x.jpg")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(files["onnx"].read_bytes()[:1000])
    assert "damaged" in mistake(capsys, "predict", "--checkpoint", damaged, "x.jpg")
    alone = tmp_path / "alone.xml"
    alone.write_bytes(files["openvino"].read_bytes())
    assert "alone.bin, are not beside it" in mistake(capsys, "predict", "--checkpoint", alone, "x.jpg")
    import onnx

    foreign = onnx.load(files["onnx"])
    onnx.helper.set_model_props(foreign, {"glmix": '{"format": "glmix export 0"}'})
    onnx.save(foreign, tmp_path / "older.onnx")
    assert "exported by another version" in mistake(capsys, "predict", "--checkpoint", tmp_path / "older.onnx", "x.jpg")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "no file of `glmix export`" in mistake(capsys, "predict", "--checkpoint", tmp_path / "foreign.onnx", "x.jpg")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


def test_an_engine_that_is_not_installed(checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    said = mistake(capsys, "export", "--checkpoint", checkpoint, "--static", tmp_path / "out.xml")
    assert "openvino is not installed; pip install 'glmix[export]'" in said
    assert list(tmp_path.iterdir()) == []
