"""Studies: their rows' costs, the loop over rows and seeds, what it refuses, and the report of what is there."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mistake, output

from glmix.cli import main, parse
from glmix.commands.study import training_of
from glmix.data.token_labels import TokenLabels
from glmix.errors import Stopped, UserError
from glmix.export.measure import multiply_adds
from glmix.models import build
from glmix.models.description import Description
from glmix.studies.report import Result, least_difference, mean_and_interval
from glmix.studies.rows import STUDIES, chosen_rows
from glmix.studies.runs import Run, Trainings, begin, mark, planned, settings_of, train_all
from glmix.training.resuming import occupied

ROOT = Path(__file__).parent.parent
TINY = '{"dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "slot_grid": [2, 2]}'
QUICK = f"--model-args '{TINY}' --epochs 1 --batch-size 8 --image-size 32 --workers 0 --precision fp32 --ema 0"


def arguments(data: Path, out: Path, more: str = "") -> list[str]:
    return shlex.split(f"integration --data {data} --out {out} --rows local,parallel --seeds 2 {QUICK} {more}")


def runs_of(options: list[str]) -> list[Run]:
    given = parse("study", options)[1]
    return planned(chosen_rows(given.study, given.rows.split(",")), given.seeds, training_of(given))


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Run]]:
    """A study whose last run is missing, and its runs."""
    options = arguments(photos, tmp_path_factory.mktemp("studies") / "study")
    runs = runs_of(options)
    begin(runs[0].folder.parents[1], settings_of("integration", training_of(parse("study", options)[1])))
    for run in runs[:3]:
        assert main(run.command()) == 0
        mark(run)
    return options, runs


def test_costs_of_every_row():
    """Parameters and multiply-adds as the guide has them: of glnet_pico at 96 px, of the road at 224 px."""
    page = (ROOT / "docs" / "studies.md").read_text()
    told = {}
    for line in page.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if cells[0] in STUDIES:
            told[cells[0], cells[1]] = float(cells[2]), float(cells[3])
    found = {}
    for name, study in STUDIES.items():
        for row, own in study.rows.items():
            classes = [str(i) for i in range(1000 if name == "road" else 10)]
            with torch.device("meta" if name == "road" else "cpu"):  # small ones are counted faster where they run
                model = build(Description("classify", own.model or study.model or "glnet_pico", own.options, classes))
            count = sum(p.numel() for p in model.parameters())
            macs = multiply_adds(model.eval(), 224 if name == "road" else 96)
            found[name, row] = round(count / 1e6, 3), round(macs, 4)
    assert told == found


def test_the_road_ends_at_glnet_4g():
    with torch.device("meta"):
        ends = [
            build(Description("classify", model, options, ["0", "1"]))
            for model, options in (("glnet_stl", STUDIES["road"].rows["deeper-narrower"].options), ("glnet_4g", {}))
        ]
    shapes = [{name: tuple(p.shape) for name, p in model.state_dict().items()} for model in ends]
    assert shapes[0] == shapes[1]


def test_commands_say_what_is_run(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """What `--dry-run` prints is, as a command, the run itself."""
    options = arguments(photos, tmp_path / "study", "--seed 4 --lr 0.001 --hflip 0")
    lines = output(capsys, "study", *options, "--dry-run").splitlines()
    runs = runs_of(options)
    assert [(run.row, run.seed) for run in runs] == [("parallel", 4), ("local", 4), ("parallel", 5), ("local", 5)]
    for line, run in zip(lines, runs, strict=True):
        name, *words = shlex.split(line)[1:]
        told = parse(name, words)[1]
        assert vars(told) | {"given": None} == vars(run.options) | {"given": None}
    assert runs[1].options.model_args == json.loads(TINY) | {"integration": "local"}
    assert not (tmp_path / "study").exists()


def test_a_row_of_another_network_has_its_own_options():
    given = parse("study", shlex.split("cost --data x --model-args '{slot_grid: [4, 4]}'"))[1]
    made = {run.row: run.options for run in planned(chosen_rows("cost", []), 1, training_of(given))}
    assert made["glnet"].model == "glnet_pico" and made["glnet"].model_args == {"slot_grid": [4, 4]}
    assert made["convnext"].model == "convnext_atto" and "slot_grid" not in made["convnext"].model_args


class Loop:
    """A training in place of `glmix train`: it writes the figures that it was told, and knows what it ran."""

    def __init__(self, **figures: Any) -> None:
        self.figures, self.ran = figures, []

    def __call__(self, run: Run) -> int:
        self.ran.append(str(run))
        found = self.figures.get(run.row, 50)
        if isinstance(found, Exception):
            raise found
        run.folder.mkdir(parents=True, exist_ok=True)
        if found is None:
            (run.folder / "train.log").write_text("epoch 1\nglmix: the loss is nan\n")
            return 2
        rows = [
            {"epoch": 1, "val_top1": found + 2, "images_per_second": 10, "memory_gb": 1},
            {"epoch": 2, "val_top1": found + run.seed, "images_per_second": 10, "memory_gb": 1},
        ]
        with open(run.folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return 0


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failed_row_is_named_and_the_rest_finished(photos: Path, tmp_path: Path, jobs: int):
    runs = runs_of(arguments(photos, tmp_path / "study"))
    first = Loop(local=None)
    failed = train_all(runs, jobs, first)
    assert sorted(first.ran) == sorted(map(str, runs))
    assert list(failed) == ["local, seed 0", "local, seed 1"] and "the loss is nan" in failed["local, seed 0"]
    assert [run.done for run in runs] == [True, False, True, False]
    again = Loop(local=40)
    assert train_all(runs, jobs, again) == {}
    assert sorted(again.ran) == ["local, seed 0", "local, seed 1"], "what is done is not done again"
    found = json.loads((runs[3].folder / "done.json").read_text())
    assert (found["figure"], found["best"], found["epochs"]) == (41, 42, 2), "that of the last epoch counts"


def test_a_stopped_study_goes_on(photos: Path, tmp_path: Path):
    runs = runs_of(arguments(photos, tmp_path / "study"))
    cut = Loop(local=Stopped("local: stopped", 143))
    with pytest.raises(Stopped) as stopped:
        train_all(runs, 1, cut)
    assert stopped.value.status == 143 and cut.ran == ["parallel, seed 0", "local, seed 0"], "no other run begins"
    rest = Loop()
    train_all(runs, 1, rest)
    assert all(run.done for run in runs) and "parallel, seed 0" not in rest.ran


def test_a_run_without_a_last_validation_is_not_done(photos: Path, tmp_path: Path):
    runs = runs_of(arguments(photos, tmp_path / "study"))[:1]
    failed = train_all(runs, 1, lambda run: 0)
    assert "without a last validation" in failed["parallel, seed 0"] and not runs[0].done


def test_a_cut_run_is_told_to_resume(photos: Path, tmp_path: Path):
    run = runs_of(arguments(photos, tmp_path / "study"))[0]
    assert "--resume" not in run.command()
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("epochs: 1\n")
    assert "--resume" in run.command()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("--epochs 2", "epochs 1, not 2"),
        ("--lr 0.1", "lr 0.002, not 0.1"),
        ("--data {other}", "training images others"),
        ("--image-size 64", "image_size 32, not 64"),
    ],
)
def test_another_budget_is_refused(
    trained: tuple[list[str], list[Run]], photos: Path, tmp_path: Path, changed: str, says: str, capsys
):
    options, runs = trained
    other = tmp_path / "other"
    for split in ("train", "val"):
        for kind in ("red_thing", "blue_thing"):
            (other / split / kind).mkdir(parents=True)
            for path in list((photos / split / kind).iterdir())[:3]:
                os.symlink(path, other / split / kind / path.name)
    assert says in mistake(capsys, "study", *options, *changed.format(other=other).split())
    before = {path: path.stat().st_mtime_ns for path in runs[0].folder.rglob("*")}
    assert before == {path: path.stat().st_mtime_ns for path in runs[0].folder.rglob("*")}


def test_another_version_is_refused(tmp_path: Path):
    (tmp_path / "3" / "0").mkdir(parents=True)
    begin(tmp_path, {"study": "kernel", "glmix": "1"})
    (tmp_path / "3" / "0" / "config.yaml").touch()
    begin(tmp_path, {"study": "kernel", "glmix": "1"})
    begin(tmp_path, {"study": "kernel", "glmix": "1"})
    with pytest.raises(Exception, match="begun with glmix 1, not 2"):
        begin(tmp_path, {"study": "kernel", "glmix": "2"})
    (tmp_path / "study.json").unlink()
    with pytest.raises(Exception, match="runs are there, without the study.json"):
        begin(tmp_path, {"study": "kernel", "glmix": "2"})
    assert not (tmp_path / "study.json").exists()


def test_a_first_try_that_began_no_run_is_forgotten(tmp_path: Path):
    begin(tmp_path, {"study": "kernel", "model_args": {"nope": 3}})
    begin(tmp_path, {"study": "kernel", "model_args": {}})
    assert json.loads((tmp_path / "study.json").read_text())["model_args"] == {}


def test_other_weights_of_the_same_name_are_refused(photos: Path, tmp_path: Path):
    """And other token labels: what a name stood for is noted, not the name alone."""
    weights, labels, out = tmp_path / "w.safetensors", tmp_path / "labels", tmp_path / "study"
    header = TokenLabels(labels, "teacher a", 64, ["a"], "0", 1, (2, 2), 5, 8)
    more = f"--init {weights} --task token-label --token-labels {labels}"
    training = training_of(parse("study", arguments(photos, out, more))[1])

    def settings() -> dict[str, Any]:
        return settings_of("integration", training)

    weights.write_bytes(b"some")
    header.write_header()
    (out / "local" / "0").mkdir(parents=True)
    begin(out, settings())
    (out / "local" / "0" / "config.yaml").touch()
    begin(out, settings())
    weights.write_bytes(b"other")
    with pytest.raises(UserError, match="weights of init others"):
        begin(out, settings())
    weights.write_bytes(b"some")
    replace(header, teacher="teacher b").write_header()
    with pytest.raises(UserError, match="header of token_labels others"):
        begin(out, settings())


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"seed": 0, "fig', b"\xff\xfe", b'{"seed": 0, "figure": "high"}']
)
def test_damaged_marks_and_settings_are_one_line(
    trained: tuple[list[str], list[Run]], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
):
    runs = trained[1]
    out = tmp_path / "study"
    shutil.copytree(runs[0].folder.parents[1], out)
    whole = (out / "study.json").read_bytes()
    (out / "study.json").write_bytes(content)
    report = ["study", "integration", "--report", "--rounds", 0, "--out", out]
    assert "study.json: damaged" in mistake(capsys, *report)
    (out / "study.json").write_bytes(whole)
    path = out / "local" / "0" / "done.json"
    path.write_bytes(content)
    said = mistake(capsys, *report)
    assert f"{path}: damaged" in said and "delete it" in said
    never = Loop()
    with pytest.raises(UserError, match="damaged"):
        train_all(
            [replace(run, options=replace(run.options, out=str(out / run.row / str(run.seed)))) for run in runs],
            1,
            never,
        )
    assert not never.ran, "nothing is trained before"


def test_a_run_that_is_trained_still_is_waited_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """As that of a study that was killed, which does not end with it."""
    run = runs_of(arguments(photos, tmp_path / "study"))[0]
    trainings = Trainings(1)
    with occupied(run.folder):
        threading.Timer(3, trainings.stop, [signal.SIGTERM]).start()
        with pytest.raises(Stopped):
            trainings(run)
    assert "another process trains there still; waiting" in capsys.readouterr().err
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: started.append(command))
    lock = ExitStack()
    lock.enter_context(occupied(run.folder))
    threading.Timer(2, lock.close).start()
    with pytest.raises(AttributeError):  # of the process that is none
        Trainings(1)(run)
    assert started, "once the other has ended"


def test_the_report_is_of_what_is_there(trained: tuple[list[str], list[Run]], capsys: pytest.CaptureFixture):
    options, runs = trained
    out = runs[0].folder.parents[1]
    said = output(capsys, "study", *options, "--report", "--rounds", 2)
    assert "1 of 4 runs are missing (local 1)" in said
    figures = [json.loads((run.folder / "done.json").read_text())["figure"] for run in runs[:3]]
    with open(out / "report.csv", newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["parallel", "local"]
    mean, width = mean_and_interval([figures[0], figures[2]])
    assert float(rows["parallel"]["mean"]) == mean and float(rows["parallel"]["interval"]) == pytest.approx(width)
    assert float(rows["local"]["difference"]) == figures[1] - figures[0], "to the base of the same seed"
    assert rows["local"]["pairs"] == "1" and rows["local"]["difference_interval"] == ""
    assert float(rows["parallel"]["ratio"]) > 0 and float(rows["local"]["kept_mib"]) < float(
        rows["parallel"]["kept_mib"]
    )
    model = build(Description("classify", "glnet_pico", runs[1].options.model_args, ["a", "b"]))
    assert float(rows["local"]["params_m"]) == sum(p.numel() for p in model.parameters()) / 1e6
    with torch.device("meta"):
        model = build(Description("classify", "glnet_pico", runs[1].options.model_args, ["a", "b"])).eval()
    assert float(rows["local"]["gmacs"]) == multiply_adds(model, 32), "attention counts, on any device"
    page = (out / "report.html").read_text()
    assert "1 of 4 runs are missing" in page and "data:image/png;base64" in page


def test_a_report_of_some_rows(trained: tuple[list[str], list[Run]], capsys: pytest.CaptureFixture):
    """They stand beside the base that is there, and nothing is missing that nobody asked for."""
    out = trained[1][0].folder.parents[1]
    said = output(capsys, "study", "integration", "--report", "--rounds", 0, "--rows", "local", "--out", out)
    assert "1 of 4 runs are missing (local 1)" in said, "two seeds were begun"
    with open(out / "report.csv", newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["parallel", "local"] and rows["local"]["pairs"] == "1"
    assert "Differences to parallel" in said
    said = output(
        capsys, "study", "integration", "--report", "--rounds", 0, "--rows", "local", "--base", "global", "--out", out
    )
    assert "No differences: no run of global" in said and "--base" in said, "where the base was not run"


def test_rows_are_what_they_say_whatever_the_network():
    """The clustering of a network with learned seeds has pooled ones too."""
    for name, row in STUDIES["clustering"].rows.items():
        with torch.device("meta"):
            model = build(Description("classify", "glnet_stl_paramslot", row.options, ["a", "b"]))
        learned = [mixer.seeds.slot_grid is None for mixer in model.slot_mixers().values()]
        assert all(learned) if name == "learned" else not any(learned)


def test_intervals():
    """Student's t of two degrees of freedom has 4.303 at 97.5 %."""
    mean, width = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and width == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert mean_and_interval([5.0]) == (5.0, None) and mean_and_interval([]) == (None, None)


def test_the_common_error_of_rows():
    """Of two rows it is that of their pairs; of three, whose residuals are all ± a sixth or a third, it is by hand."""
    a, b, c = Result("a", {0: 1.0, 1: 2.0}), Result("b", {0: 3.0, 1: 5.0, 2: 9.0}), Result("c", {0: 2.0, 1: 3.0})
    points, freedom, seeds = least_difference({"a": a, "b": b, "none": Result("none")}) or (0, 0, [])
    assert points == pytest.approx(mean_and_interval([2.0, 3.0])[1]) and freedom == 1 and seeds == [0, 1]
    points, freedom, _ = least_difference({"a": a, "b": b, "c": c}) or (0, 0, [])
    assert points == pytest.approx(4.3027 * (4 / 36 + 2 / 9) ** 0.5 / 2**0.5, abs=1e-3) and freedom == 2
    assert least_difference({"a": a, "d": Result("d", {0: 1.0})}) is None and least_difference({"a": a}) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("nothing", "no study 'nothing'; there are integration, clustering"),
        ("kernel --rows 3,4", "no row '4'; there are none, 3, 5"),
        ("kernel --base 4", "no row '4'"),
        ("road --model glnet_pico", "is of glnet_stl, not glnet_pico"),
        ("kernel --seeds 0", "seeds must be above 0"),
        ("kernel --task detect", "of classifiers"),
        ("kernel --report", "no study is there"),
        ("integration --model convnext_atto", "--model convnext_atto: the rows of a study are of a GLNet"),
        ("cost --task token-label", "convnext_atto has no head for token labels; --task classify"),
        ("slots --image-size 32", "row 100: a slot grid of 10 x 10, and images of 32 px have 8 x 8 places"),
        ("kernel --slot-grids 2 12 --image-size 32", "row none: --slot-grids 2 12: images of 32 px have 8 x 8 places"),
        ('kernel --model-args {"nope":3} --dry-run', "row none: model_args"),
        ("kernel --seed 4294967295 --seeds 2 --dry-run", "seed must be between 0 and 4294967295"),
        ("kernel --dry-run --report", "leave one out"),
    ],
)
def test_mistakes(options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert says in mistake(capsys, "study", *options.split(), "--out", tmp_path / "none")


def test_the_report_of_another_study(trained: tuple[list[str], list[Run]], capsys: pytest.CaptureFixture):
    out = trained[1][0].folder.parents[1]
    assert "there lies the study integration, not kernel" in mistake(
        capsys, "study", "kernel", "--report", "--out", out
    )


@pytest.mark.slow
def test_a_study_from_its_command(photos: Path, tmp_path: Path):
    """Cut within its first run, gone on with, and reported, in processes of their own."""
    options = arguments(photos, tmp_path / "study", "--rounds 1 --jobs 2 --epochs 8 --checkpoint-steps 1")
    command = [sys.executable, "-m", "glmix.cli", "study", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    point = tmp_path / "study" / "parallel" / "0" / "resume.ckpt"
    while not point.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not list((tmp_path / "study").glob("*/*/done.json"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "study").glob("*/*/done.json"))) == 4
    assert "missing" not in done.stdout and "nothing to resume" not in (point.parent / "train.log").read_text()
