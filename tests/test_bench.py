"""`glmix bench`: what it measures is there, compared in turns, and written down."""

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import mistake, output
from torch import nn

from glmix import optimize_for_inference
from glmix.commands.bench import growth
from glmix.commands.models import every_layer_of, print_under_heads
from glmix.export.measure import (
    Case,
    Times,
    accuracies,
    gmacs,
    in_own_process,
    in_turns,
    peak_memory,
    saved_activations,
)
from glmix.models.glnet import PUBLISHED


def test_a_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = output(
        capsys, "bench", "--models", "glnet_pico", "--against", "resnet10t", "--sizes", 32, 64, "--batch", 2,
        "--rounds", 2, "--threads", 1, "--out", tmp_path,
    )  # fmt: skip
    assert "glnet_pico in fast, fp32: time grows with pixels to the power" in said
    (table,) = tmp_path.glob("*.csv")
    assert f"torch{torch.__version__[:4]}" in table.name and "fp32" in table.name
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert float(row["images_s"]) == pytest.approx(2 * 1000 / float(row["ms"]))
    assert (tmp_path / "time-pixels.png").is_file()
    assert not (tmp_path / "accuracy-macs.png").exists()  # no source, no point


def test_steps_of_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = output(
        capsys, "bench", "--models", "glnet_pico", "--sizes", 32, "--batch", 12, "--rounds", 1, "--train", "--out", tmp_path
    )  # fmt: skip
    assert "fused AdamW" in said and "kept for the backward pass" in said


def test_times_are_told_by_rounds() -> None:
    """A round in which the machine is slow slows both, or one of them, and says nothing of their ratio."""
    times = Times(seconds=[1.0, 2.0, 40.0, 1.0, 1.0], base=[2.0, 4.0, 80.0, 2.0, 30.0])
    assert times.median == 1.0
    assert times.ratio == 2.0


def test_all_run_in_turns() -> None:
    called: list[str] = []
    cases = {name: Case(name, "eager", "fp32", 32, 1) for name in "ab"}
    runs = {case: lambda _x, name=name: called.append(name) for name, case in cases.items()}
    in_turns(runs, cases["a"], rounds=2, warm=1)
    assert called == ["a", "b"] + ["a", "a", "b"] * 2


def test_growth_is_the_exponent_of_pixels() -> None:
    rows = [{"model": "m", "engine": "e", "precision": "fp32", "size": s, "ms": (s * s) ** 1.5} for s in (32, 64, 128)]
    assert growth(rows) == {("m", "e", "fp32"): pytest.approx(1.5)}


def test_saved_activations_are_counted_once() -> None:
    """Of y = (x w)² w: x w is kept for two products, and counted once; weights are not."""
    x, layer = torch.randn(16, 1024), nn.Linear(1024, 1024, bias=False)
    kept = saved_activations(lambda: layer(x).square().sum(), layer)
    assert kept == pytest.approx(2 * 16 * 1024 * 4 / 2**20)


def test_activations_of_gelu_are_not_kept_and_gradients_stay() -> None:
    """A layer that somebody listens to is run as it is, and keeps them: the same loss and gradients, bit for bit."""
    found = []
    for listens in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("glnet_stl", dims=(32, 32, 32, 32), num_classes=4)
        if listens:
            for part in model.modules():
                if type(part).__name__ == "MLP":
                    part.fc2.register_forward_hook(lambda *_: None)
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        kept = saved_activations(lambda model=model, x=x: model(x).sum(), model)
        loss = model(x).square().sum()
        loss.backward()
        found.append((kept, loss, {name: p.grad for name, p in model.named_parameters()}))
    (before, loss, wanted), (after, given_loss, given) = found
    assert after < 0.9 * before
    torch.testing.assert_close((given_loss, given), (loss, wanted), rtol=0, atol=0)


def test_published_accuracies_have_a_source_each() -> None:
    known = accuracies()
    assert {name: known[name][0] for name in PUBLISHED} == {name: row["top1"] for name, row in PUBLISHED.items()}
    assert all("arXiv" in source for _, source in known.values())
    assert all(timm.is_model(name) for name in known)


def test_multiply_adds_grow_with_the_size() -> None:
    assert gmacs("glnet_4g", 224) == pytest.approx(PUBLISHED["glnet_4g"]["gmacs"], rel=0.01)
    assert gmacs("glnet_4g", 448) > 4 * gmacs("glnet_4g", 224)
    swin = "swin_tiny_patch4_window7_224"  # laid out for one size, and padded where windows do not fill it
    assert gmacs(swin, 896) == pytest.approx(16 * gmacs(swin, 224), rel=0.01)
    assert gmacs(swin, 256) > 1.5 * gmacs(swin, 224)


def test_mistakes(tmp_path: Path, capsys: Any) -> None:
    assert "there are eager, fast, sdpa, compile, onnxruntime, openvino" in mistake(
        capsys, "bench", "--engines", "tensorrt"
    )
    assert "no model 'nonsense' in timm" in mistake(capsys, "bench", "--models", "nonsense")
    assert "at least 32 pixels" in mistake(capsys, "bench", "--sizes", 16)
    assert "onnxruntime has no bf16" in mistake(
        capsys, "bench", "--models", "glnet_pico", "--engines", "onnxruntime", "--precision", "bf16"
    )
    assert "there is no glnet_4g" in mistake(capsys, "bench", "--models", "glnet_pico", "--base", "glnet_4g")


def test_cost_under_a_head_is_measured_in_a_process_of_its_own(capsys: pytest.CaptureFixture) -> None:
    peak, seconds = in_own_process(every_layer_of, "glnet_pico", "retinanet", threads=1, timed=1)
    # kept at once are at least the classes' scores of the finest level, nine anchors of 80 at 100 x 160 places, in float32
    assert 100 * 160 * 9 * 80 * 4 / 2**20 < peak < 500 and seconds > 0
    assert "did you mean glnet_pico" in mistake(capsys, "models", "--measure", "glnet_pcio")
    assert "--measure alone" in mistake(capsys, "models", "--threads", 1)


def test_a_row_is_told_when_it_is_there(capsys: pytest.CaptureFixture) -> None:
    """What came before stands there where a later one fails, or is stopped."""

    def cost(name: str, head: str) -> dict[str, float]:
        if name == "glnet_nano":
            raise KeyboardInterrupt
        return {"seconds": 1.5, "peak_mib": 180.4}

    with pytest.raises(KeyboardInterrupt):
        print_under_heads("seconds / MiB", ["glnet_pico", "glnet_nano"], cost)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["seconds", "glnet_pico"] and lines[1].count("1.50 / 180") == 4


@pytest.mark.slow
def test_the_figures_claimed() -> None:
    """Loosely: nine tenths of what docs/performance.md has, over the plain model in one interleaved run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, claimed in (("glnet_4g", 1.18), ("glnet_stl", 1.21)):
            plain, fast = (Case(name, engine, "fp32", 224, 1) for engine in ("eager", "fast"))
            model = timm.create_model(name).eval()
            times = in_turns({plain: model, fast: optimize_for_inference(model)}, plain, 15)
            assert times[fast].ratio >= 0.9 * claimed, name
        for name, claimed in (("glnet_4g", 0.45), ("glnet_stl", 0.42)):
            peaks = [peak_memory(Case(name, engine, "fp32", 1024, 1), 1) for engine in ("eager", "fast")]
            assert peaks[1] / peaks[0] <= claimed / 0.9, name
    finally:
        torch.set_num_threads(threads)
