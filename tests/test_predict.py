"""`glmix predict`: every kind of source, every kind of file, and nothing lost by a cut."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers import mistake
from PIL import Image

from glmix.cli import main
from glmix.data import folders
from glmix.data.pictures import open_pictures
from glmix.journal import Journal


@pytest.fixture(scope="module")
def kinds(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The eight validation photos as sources of every kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tmp_path_factory.mktemp("kinds")
    folder = place / "val"
    shutil.copytree(photos / "val", folder)
    files = sorted(folder.rglob("*.png"))
    with tarfile.open(place / "a.tar", "w") as tar:
        tar.add(folder, "val")
    names = [str(file.relative_to(place)) for file in files]
    (place / "a.csv").write_text("note,path\n" + "".join(f"x,{name}\n" for name in names))
    (place / "a.txt").write_text("\n".join(names))
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    pq.write_table(pa.table({"image": images}), place / "a.parquet")
    found = {"folder": folder, "pattern": folder / "*" / "*.png", "deep": folder / "**" / "*.png"}
    found |= {"folders": folder / "*"} | {ending: place / f"a.{ending}" for ending in ("tar", "csv", "txt", "parquet")}
    return {name: str(path) for name, path in found.items()} | {"list": "\n".join(map(str, files))}


@pytest.mark.parametrize("kind", "folder pattern deep folders tar csv txt parquet list".split())
def test_sources(kind: str, kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    name = kinds[kind]
    if kind == "list":
        monkeypatch.setattr(sys, "stdin", io.StringIO(name))
        name = "-"
    source, straight = open_pictures([name]), open_pictures(sorted(kinds["list"].splitlines()))
    assert len(source) == 8 == len(set(source.files))
    assert [source.read(i).image.tobytes() for i in range(8)] == [straight.read(i).image.tobytes() for i in range(8)]
    if kind in ("csv", "txt"):
        monkeypatch.chdir(Path(name).parent)
        assert open_pictures([Path(name).name]).files[0].startswith("val/")
    if kind != "parquet":
        assert all(name.endswith(Path(other).name) for name, other in zip(source.files, straight.files))


def test_several_sources_in_their_order(kinds: dict[str, str]):
    one = kinds["list"].splitlines()[3]
    source = open_pictures([one, kinds["tar"], one])
    assert len(source) == 10 and source.files[0] == source.files[9] == one
    assert source.read(0).image.tobytes() == source.read(9).image.tobytes() == source.read(4).image.tobytes()


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Eight photos and one that is none, of names in several scripts."""
    place = tmp_path / "日本 ü"
    place.mkdir()
    for i, file in enumerate(sorted((photos / "val").rglob("*.png"))):
        shutil.copy(file, place / f"{i} 🦜,.png")
    (place / "3 no.png").write_text("no image")
    return place


def test_one_table_in_three_formats(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    import pyarrow.parquet as pq

    assert main(["predict", str(folder), "--checkpoint", str(run), "--json"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"a.{ending}"
        assert main(["predict", str(folder), "--checkpoint", str(run), "--out", str(out)]) == 1
        assert "9 images, 1 of which could not be read" in capsys.readouterr().out
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert list(lines[0]) == ["path", "label", "name", "probability", "rank", "error"]
    assert lines == pq.read_table(tmp_path / "a.parquet").to_pylist()
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        cells = [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]
    assert cells == [{k: None if v is None else str(v) for k, v in row.items()} for row in lines]
    assert [row["path"] for row in lines if row["error"]] == [str(folder / "3 no.png")]
    told = {
        row["image"]: [(p["label"], p["probability"]) for p in row["predictions"]]
        for row in printed
        if "predictions" in row
    }
    for path, answers in told.items():
        mine = [row for row in lines if row["path"] == path]
        assert [row["rank"] for row in mine] == [1, 2]
        assert [(row["label"], row["probability"]) for row in mine] == answers
    assert [row["image"] for row in printed] == list(dict.fromkeys(row["path"] for row in lines))


def test_cut_and_continued_it_is_the_same_file(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    command = ["predict", str(folder), "--checkpoint", str(run), "--batch-size", "2", "--workers", "0", "--out"]
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    assert main([*command, str(whole)]) == 1
    decode, left = folders.decode, 0

    def until_it_stops(data: bytes, name: str) -> Image.Image:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return decode(data, name)

    monkeypatch.setattr(folders, "decode", until_it_stops)
    for allowed in (3, 2, 4):
        left = allowed
        assert main([*command, str(cut)]) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert not cut.exists()
        (part, *_) = sorted((tmp_path / ".cut.csv.parts").glob("*.jsonl"))
        with open(part, "a") as file:
            file.write('8\t{"answer": [')  # what a kill leaves of a line, of one that no attempt ends before the last
    left = 1  # of nine: 2, 2 and 4 are done
    assert main([*command, str(cut)]) == 1
    assert cut.read_bytes() == whole.read_bytes()
    left = 5
    assert main([*command, str(cut)]) == 130
    capsys.readouterr()
    assert "another command was begun" in mistake(capsys, *command, cut, "--top", 1)


def test_a_journal_keeps_the_first_of_each(tmp_path: Path):
    journal = Journal(tmp_path / "a", {}, 5)
    journal.add({0: "a", 3: "b"})
    other = Journal(tmp_path / "a", {}, 5)
    other.add({1: "c", 3: "b"})
    assert list(journal.done()) == [1, 1, 0, 1, 0]
    assert list(other.merged()) == [(0, "a"), (1, "c"), (3, "b")]


def test_a_sheet(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["predict", str(folder), "--checkpoint", str(run), "--sheet", str(tmp_path / "a.png")]) == 1
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (8 * 200 + 8, 192 + 2 * 15 + 8 + 8)
        first = sheet.crop((8, 8, 64, 56)).resize((1, 1)).getpixel((0, 0))
    assert first[2] > first[0] + 30  # a blue thing comes first


MISTAKES = {
    "a.xls": "--out a.xls: its ending says the format; there are .csv, .jsonl, .parquet",
    "nothing": "nothing: no images in it",
    "*.tif": "*.tif: no file is called like that",
    "-": "none of the images could be read",
    "https://here/cat.jpg": "https://here/cat.jpg: an address; fetch the file first",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("not there.png\nnor this.png\n"))
    (tmp_path / "nothing").mkdir()
    words = [photos, "--out", name] if name.endswith("xls") else [name]
    assert MISTAKES[name] in mistake(capsys, "predict", *words)


def test_nothing_that_can_be_read_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Neither a file of reasons over an older one, nor parts that would stand in the way of the mended command."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("not there.png\nnor this.png\n"))
    (tmp_path / "a.csv").write_text("older")
    said = mistake(capsys, "predict", "-", "--checkpoint", run, "--out", tmp_path / "a.csv")
    assert "none of 2 images could be read (first: not there.png: No such file or directory)" in said
    assert "none of 1 images" in mistake(capsys, "embed", "no.png", "--checkpoint", run, "--out", tmp_path / "b.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "older"


def test_answers_come_as_they_are_had(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of the first batch before the second is read; on a terminal, how far it is and how fast."""
    decode, read, told = folders.decode, 0, []

    def counted(data: bytes, name: str) -> Image.Image:
        nonlocal read
        read += 1
        return decode(data, name)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            told.append((text, read))
            return len(text)

    command = ["predict", str(folder), "--checkpoint", str(run), "--batch-size", "2", "--workers", "0"]
    monkeypatch.setattr(folders, "decode", counted)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(command) == 1
    lines = [number for text, number in told if "thing" in text or "skipped" in text]
    assert len(lines) == 9 and lines[0] == 2 and lines[2] == 4
    told.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main([*command, "--out", str(folder.parent / "a.csv")]) == 1
    shown = [text for text, _ in told if "images/s" in text]
    assert len(shown) == 5 and shown[0].startswith("\r2/9 images, ") and shown[-1].startswith("\r9/9 images, ")


def test_several_processes_need_a_file(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    import glmix.commands.predict as command
    from glmix.training.processes import Processes

    monkeypatch.setattr(command, "join_processes", lambda: Processes(1, 2))
    assert "need --out" in mistake(capsys, "predict", photos)
    assert "one standard input; give a file" in mistake(capsys, "predict", "-", "--out", "a.csv")


def test_boxes_and_masks_are_further_columns():
    from glmix.tasks.detect import DETECT

    answers = [
        {"label": "a", "name": "A", "score": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 7},
        {
            "label": "b",
            "name": "B",
            "score": 0.25,
            "bbox": [0.0, 0.0, 2.0, 2.0],
            "segmentation": {"size": [2, 2], "counts": "04"},
        },
    ]
    rows = DETECT.rows(answers)
    assert rows[0] == {"label": "a", "name": "A", "probability": 0.5, "x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0}
    assert json.loads(rows[1]["mask"]) == {"size": [2, 2], "counts": "04"}
    assert all(set(row) <= set(DETECT.columns) for row in rows)


@pytest.mark.slow
def test_killed_three_times(run: Path, photos: Path, tmp_path: Path):
    """By SIGKILL, at any moment: the file is that of an undisturbed run, byte for byte."""
    many = tmp_path / "many"
    for i in range(40):
        shutil.copytree(photos, many / str(i))
    command = [sys.executable, "-m", "glmix.cli", "predict", str(many), "--checkpoint", str(run), "--batch-size", "8"]
    subprocess.run([*command, "--out", str(tmp_path / "whole.csv")], check=True)
    kills = 0
    while not (tmp_path / "cut.csv").exists():
        process = subprocess.Popen([*command, "--out", str(tmp_path / "cut.csv")], start_new_session=True)
        parts = tmp_path / ".cut.csv.parts"
        before = sum(path.stat().st_size for path in parts.glob("*.jsonl"))
        while kills < 3 and process.poll() is None:
            if sum(path.stat().st_size for path in parts.glob("*.jsonl")) > before + 2000:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait(timeout=300)
    assert kills == 3
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_loading_processes_change_nothing(run: Path, folder: Path, tmp_path: Path):
    for name, workers in (("a", "0"), ("b", "2")):
        command = ["predict", str(folder), "--checkpoint", str(run), "--batch-size", "4", "--workers", workers]
        assert main([*command, "--out", str(tmp_path / f"{name}.jsonl")]) == 1
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
