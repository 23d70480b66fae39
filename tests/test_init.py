"""First values of every parameter are drawn as the reference draws them (tests/golden/init_stats.json)."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from reference import FOLDER, as_released, shapes

STATS: dict[str, dict[str, list[float]]] = json.loads((FOLDER / "init_stats.json").read_text())
CUT = 2.0  # where truncated normal values end; drawn from a float32 number, one in ten millions lands there
SIGMAS = 6  # some 5000 comparisons of numbers that are drawn


@pytest.fixture(scope="module", params=STATS)
def drawn(request: pytest.FixtureRequest) -> tuple[str, dict[str, np.ndarray]]:
    """A variant and its first values, by the reference's names."""
    variant: str = request.param
    torch.manual_seed(0)
    return variant, {key: value.numpy() for key, value in as_released(timm.create_model(variant), variant).items()}


def is_uniform(std: float, largest: float) -> bool:
    """The largest of many uniform values is sqrt(3) standard deviations; of many normal ones, more than 2."""
    return largest < 1.85 * std


def test_statistics_of_every_entry(drawn: tuple[str, dict[str, np.ndarray]]) -> None:
    """Mean, standard deviation and largest magnitude, within the sampling error of two drawings of that many values."""
    variant, ours = drawn
    assert {key for key in ours if not key.endswith("num_batches_tracked")} == STATS[variant].keys()
    wrong = []
    for key, (mean, std, largest) in STATS[variant].items():
        values, n = ours[key].astype(np.float64), ours[key].size
        rounding = 1e-4 * (largest + 1e-12)  # the file holds five digits
        if std == 0:
            allowed_mean = allowed_std = allowed_largest = rounding
        else:
            allowed_mean = SIGMAS * std * math.sqrt(2 / n) + rounding
            allowed_std = SIGMAS * std / math.sqrt(n) + rounding
            if is_uniform(std, largest):
                allowed_largest = min(15 / n, 0.5) * largest + rounding
            elif largest == CUT:
                allowed_largest = largest
            else:  # largest normal values are spread (Gumbel) by std / sqrt(2 log n)
                allowed_largest = 10 * std / math.sqrt(2 * math.log(n))
        off = (
            abs(values.mean() - mean) > allowed_mean
            or abs(values.std() - std) > allowed_std
            or abs(np.abs(values).max() - largest) > allowed_largest
        )
        if off:
            wrong.append((key, [values.mean(), values.std(), np.abs(values).max()], [mean, std, largest]))
    assert not wrong


def test_kinds_of_layers(drawn: tuple[str, dict[str, np.ndarray]]) -> None:
    """The same in words, for each kind of layer: what is drawn from which distribution, and how wide."""
    variant, ours = drawn
    shape_of = shapes(variant)
    seen = set()
    for key, values in ours.items():
        n = values.size
        module, _, name = key.rpartition(".")
        width = shape_of[key][0] if shape_of[key] else 0
        fan_in = math.prod(shape_of[f"{module}.weight"][1:]) if f"{module}.weight" in shape_of else 0
        is_conv = fan_in > 0 and len(shape_of[f"{module}.weight"]) == 4
        if name == "slot_scale":
            kind, channels = "slot scale", shape_of[f"{module}.norm1.weight"][0]
            assert values == pytest.approx(channels**-0.5)
        elif name == "gamma":
            kind = "LayerScale"
            assert values == pytest.approx(1e-4)
        elif name == "in_proj_weight":
            kind = "Xavier uniform in-projection"
            bound = math.sqrt(6 / (width + shape_of[key][1]))
            assert np.abs(values).max() == pytest.approx(bound, rel=15 / n)
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=SIGMAS / math.sqrt(n))
        elif is_conv:
            kind = f"convolution's {name}"
            bound = fan_in**-0.5  # PyTorch's own first values
            assert np.abs(values).max() <= bound * (1 + 1e-6)
            assert np.abs(values).max() > bound * (1 - 15 / n)
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=SIGMAS / math.sqrt(n))
        elif name == "init_slots" or (name == "weight" and len(shape_of[key]) == 2):
            kind = "slots" if name == "init_slots" else "linear layer's weight"
            assert values.std() == pytest.approx(0.02, rel=SIGMAS / math.sqrt(2 * n))
            assert np.abs(values).max() > 3 * 0.02
        else:
            kind = f"zero or one: {name}"
            assert (values == (1 if name in ("weight", "running_var") else 0)).all() or name == "num_batches_tracked"
        seen.add(kind)
    expected = {"slot scale", "Xavier uniform in-projection", "convolution's weight", "convolution's bias"}
    expected |= {"linear layer's weight"}
    expected |= {"LayerScale"} if variant == "glnet_16g" else {"slots"} if variant == "glnet_stl_paramslot" else set()
    assert expected <= seen


def test_variants_of_ours_start_alike() -> None:
    """What the reference has not: the linear layer behind the slots, a given slot scale, a classifier made anew."""
    torch.manual_seed(0)
    model = timm.create_model("glnet_pico")
    for name, mixer in model.slot_mixers().items():
        assert mixer.similarity.scale.item() == 20, name
        weight = mixer.slot_proj.weight
        assert weight.std().item() == pytest.approx(0.02, rel=SIGMAS / math.sqrt(2 * weight.numel()))
        assert not mixer.slot_proj.bias.any()
    model.reset_classifier(500)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.fc.bias.any()
