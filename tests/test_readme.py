"""The README says what is so: its Python and its commands are run, its table is counted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pages import PAGES, ROOT, commands
from PIL import Image
from reference import as_released

from glmix.cli import COMMANDS, main

README = (ROOT / "README.md").read_text()
SHORT = "--epochs 1 --batch-size 4 --workers 0 --precision fp32 --warmup-epochs 0"
SIZES = {"classify": "--image-size 32", "detect": "--image-size 48 64", "segment": "--image-size 48 --crop-size 32"}
FOR_EVAL = ["--workers", "0"]


def test_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def short(command: list[str]) -> list[str]:
    """Options that make a training of the README short."""
    task = command[command.index("--task") + 1] if "--task" in command else "classify"
    return f"{SHORT} {SIZES[task]}".split()


def draw(path: Path, channel: int, seed: int) -> None:
    """A small photo of noise with much of one colour."""
    pixels = np.random.default_rng(seed).integers(0, 90, (48, 64, 3), dtype=np.uint8)
    pixels[..., channel] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the README's commands name, but for what they make themselves."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photo.jpg", 0, 0)
    for i in range(2):
        draw(tmp_path / "photos" / f"{i}.jpg", i, i)
    for channel, kind in ((0, "apple"), (2, "plum")):
        for i in range(10):
            draw(tmp_path / "DIR" / kind / f"{i}.jpg", channel, i)
    voc = tmp_path / "VOC_DIR"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("one\ntwo\n")
    (voc / "SegmentationObject").mkdir()
    for name in ("one", "two"):
        draw(voc / "JPEGImages" / f"{name}.jpg", 1, 0)
        mask = np.zeros((48, 64), np.uint8)
        mask[8:30, 10:40] = 1
        Image.fromarray(mask).save(voc / "SegmentationObject" / f"{name}.png")
    for split in ("train", "val"):
        objects = [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 8, 30, 22]} for i in range(4)]
        pictures = [{"id": i, "file_name": f"{split}/{i}.jpg", "width": 64, "height": 48} for i in range(4)]
        for i in range(4):
            draw(tmp_path / "COCO_DIR" / split / f"{i}.jpg", i % 3, i)
            draw(tmp_path / "MASKS_DIR" / split / "images" / f"{i}.jpg", i % 3, i)
            (tmp_path / "MASKS_DIR" / split / "masks").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(tmp_path / "MASKS_DIR" / split / "masks" / f"{i}.png")
        coco = {"images": pictures, "annotations": objects, "categories": [{"id": 1, "name": "plum"}]}
        (tmp_path / "COCO_DIR" / f"instances_{split}.json").write_text(json.dumps(coco))
    torch.manual_seed(0)
    torch.save({"model": as_released(timm.create_model("glnet_4g"), "glnet_4g")}, tmp_path / "glnet_4g.pth")
    return tmp_path


def test_commands_run(stand_ins: Path, capsys: pytest.CaptureFixture):
    """Every `glmix …` of the README in its order, the training made short."""
    done = []
    for command in commands(README):
        if "COMMAND" in command or command == ["models"]:  # both are run below
            continue
        more = short(command) if command[0] == "train" and "--resume" not in command else []
        more = FOR_EVAL if command[0] == "eval" else more
        status = main([*command, *more])
        printed = capsys.readouterr()
        assert status == 0, f"glmix {' '.join(command)}: {printed.err}"
        assert printed.out.strip(), command
        done.append(command[0])
    assert {"train", "eval", "predict", "explain", "slots", "convert"} <= set(done)
    made = ["runs/mine/best.safetensors", "glnet_4g.safetensors", "slots/photo.slots.png", "slots/report.html",
            "runs/areas/best.safetensors", "seen/photo.objects.png"]  # fmt: skip
    for path in [*made, "slots/arrays/0.jpg.npz"]:
        assert (stand_ins / path).stat().st_size, path


def test_a_converted_file_means_what_the_released_one_does(stand_ins: Path, capsys: pytest.CaptureFixture):
    assert main(["convert", "glnet_4g.pth", "glnet_4g.safetensors"]) == 0
    said = []
    for file in ("glnet_4g.pth", "glnet_4g.safetensors"):
        capsys.readouterr()
        assert main(["predict", "--checkpoint", file, "--json", "--image-size", "64", "photo.jpg"]) == 0
        said.append(json.loads(capsys.readouterr().out)["predictions"])
    assert said[0] == said[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: glmix {command}" in capsys.readouterr().out


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.M))
        assert named <= targets, (page, named - targets)


def test_table_of_models_is_true(capsys: pytest.CaptureFixture):
    main(["models", "--json"])
    counted = json.loads(capsys.readouterr().out)
    rows = re.findall(r"^\| `(glnet_\w+)` \| ([\d.]+) \|[^|]*\| ([\d.]+) \|[^|]*\| (\d+) \| ?([\d.]*)", README, re.M)
    assert {row[0] for row in rows} == set(counted)
    for name, parameters, gmacs, side, top1 in rows:
        assert float(parameters) == round(counted[name]["params_m"], 1), name
        assert float(gmacs) == round(counted[name]["gmacs"], 2), name
        assert int(side) == counted[name]["input"]
        assert (float(top1) if top1 else None) == (counted[name]["published"] or {}).get("top1")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands_exist(page: Path):
    """As in the repository itself; tests/test_docs.py has the site's links and the commands' options."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for command in commands(text):
        assert command[0] in COMMANDS or command[0] == "COMMAND", command


def test_nothing_names_a_machine_or_a_registry():
    forbidden = re.compile(r"/work/|/root/|/tmp/|pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian")
    for folder in ("src", "recipes", "docs", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml", ".html", ".ipynb"):
                assert not forbidden.search(path.read_text()), path
