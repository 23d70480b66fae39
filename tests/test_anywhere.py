"""What other machines have not is not missed: POSIX, parts that are optional, fonts, time."""

import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import mistake, output
from matplotlib.figure import Figure
from pages import ROOT
from PIL import Image

from glmix.data.loading import OfImage, Prepared, stack
from glmix.data.pictures import open_pictures
from glmix.data.prepare import Preparation
from glmix.data.scenes import write_scenes
from glmix.data.sources import open_data
from glmix.errors import UserError
from glmix.files import plain_name, readable
from glmix.fonts import files_for, pen_font
from glmix.models.description import Description
from glmix.slots.figures import save_figure
from glmix.tasks import TASKS
from glmix.use.streams import WithReasons

NO_SYSTEM_TAKES = re.compile(r'[<>:"|?*\\]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[ .](/|$)', re.I)


def test_what_is_imported_when():
    """The table of commands needs neither PyTorch nor timm, and the package no more than these and its own."""
    code = """
import sys
sys.argv = ["glmix", "--help"]
import glmix_command
assert glmix_command.main() == 0
assert not {"torch", "timm", "numpy", "jsonargparse", "glmix"} & set(sys.modules)
import timm
before = set(sys.modules)
import glmix
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print("NEW", *sorted(new))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
    new = set(done.stdout.rpartition("NEW")[2].split())
    assert "glmix" in new
    assert not new & {"matplotlib", "lightning", "torchmetrics", "datasets", "transformers", "sklearn", "pyarrow"}, new


def test_tars_are_read_by_plain_reading(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "pread")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(photos, "photos")
    found, there = open_data(tmp_path / "a.tar").split("val"), open_data(photos).split("val")
    assert len(found) == 8
    assert [found.read(i).image.tobytes() for i in range(8)] == [there.read(i).image.tobytes() for i in range(8)]


def test_memory_that_no_system_tells(monkeypatch: pytest.MonkeyPatch):
    from glmix.training.progress import memory_in_use

    assert memory_in_use() > 0.05
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory_in_use() == 0


def test_signals_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    spec = importlib.util.find_spec("glmix.training.resuming")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)
    points = module.ResumePoints(tmp_path, 0)
    points.on_train_start(None, None)
    assert signal.getsignal(signal.SIGTERM) is not before
    points.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", TASKS)
def test_loading_processes_need_no_fork(name: str, tmp_path: Path):
    """All that a loading process is given can be sent to one that begins from nothing."""
    task = TASKS[name]
    write_scenes(tmp_path, 20, 0, 64)
    source = task.open("scenes" if name == "segment" else str(tmp_path)).split("val")
    preparation = replace(Preparation(), size=(64, 64))
    sent = pickle.dumps((Prepared(source, task.evaluation(preparation)), task.collate))
    prepared, collate = pickle.loads(sent)
    ours = Prepared(source, task.evaluation(preparation))
    keys = [(0, 0, 0), (0, 1, 0)]
    assert torch.equal(
        collate([prepared[key] for key in keys]).images, task.collate([ours[key] for key in keys]).images
    )


def test_images_without_labels_need_no_fork(photos: Path):
    sources = open_pictures([str(photos / "val"), str(next((photos / "train").rglob("*.png")))])
    sent = pickle.loads(pickle.dumps((Prepared(sources, OfImage(Preparation(size=(32, 32)))), WithReasons(stack))))
    batch, reasons = sent[1]([sent[0][(0, index, 0)] for index in (0, 8)])
    assert batch.images.shape == (2, 3, 32, 32) and batch.names == [sources.files[0], sources.files[8]]
    assert reasons == ["", ""]


def test_names_of_files_that_every_system_takes(tmp_path: Path):
    written = {
        "a.jpg": "a.jpg",
        'what? "a<b>|c*': "what_ _a_b__c_",
        "NUL.png": "NUL_.png",
        "COM1": "COM1_",
        "console": "console",
        "ends. ": "ends._",
        "日本 ü": "日本 ü",
    }
    for name, plain in written.items():
        assert plain_name(name, 200) == plain
        assert not NO_SYSTEM_TAKES.search(plain)
    assert plain_name("ü" * 100, 11) == "ü" * 5
    assert readable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    ours = listed or [str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*")]
    assert not [name for name in ours if NO_SYSTEM_TAKES.search(name)]


def test_a_runs_files_are_names_that_every_system_takes(run: Path):
    names = [path.relative_to(run).as_posix() for path in run.rglob("*")]
    assert len(names) > 5
    assert not [name for name in names if NO_SYSTEM_TAKES.search(name)]


def test_words_of_any_script_in_figures(tmp_path: Path):
    """Drawn where a font has them, else as boxes, and never with a warning."""
    figure = Figure()
    figure.suptitle("Müller 日本 photo 🦜 हिन्दी \ue000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (640, 480)
    assert files_for("Müller")[0].endswith("DejaVuSans.ttf") and len(files_for("Müller")) == 1
    assert pen_font("Ελληνικά", 12).getmask("Ε").getbbox() is not None


def test_doctor(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    said = output(capsys, "doctor", "--seconds", 0.01)
    for word in (torch.__version__, "CPU cores", "precision", "images/s"):
        assert word in said
    assert "images/s" not in output(capsys, "doctor", "--seconds", 0)


LACKING = {
    "lightning": (["train", "--data", "scenes", "--out", "run"], "glmix.commands.train", "train"),
    "scipy": (["study", "integration", "--data", "scenes", "--out", "rows"], "glmix.commands.study", "train"),
    "pyarrow": (["predict", "scenes", "--out", "a.parquet"], "", "tables"),
    "sklearn": (["eval", "--data", "scenes", "--knn"], "", "evaluate"),
    "datasets": (["predict", "hf:me/mine"], "", "train"),
    "skimage": (["slots", "--data", "scenes", "--limit", "1"], "", "segment"),
    "onnxscript": (["export", "a.onnx"], "", "export"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """In one line, with the extra that brings it; before any work."""
    words, module, extra = LACKING[name]
    monkeypatch.chdir(tmp_path)
    # what imported it before imports it again
    again = (f"{name}.", "glmix.training.", "glmix.studies.") if module else (f"{name}.",)
    for imported in [n for n in sys.modules if n in (name, module) or n.startswith(again)]:
        monkeypatch.delitem(sys.modules, imported)
    monkeypatch.setitem(sys.modules, name, None)
    assert f"{name} is not installed; pip install 'glmix[{extra}]'" in mistake(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_measuring_boxes_needs_its_library_before_the_work(monkeypatch: pytest.MonkeyPatch):
    from glmix.tasks.detect import CocoNumbers

    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pycocotools is not installed; pip install 'glmix\[detect\]'"):
        CocoNumbers(Description("detect"))
