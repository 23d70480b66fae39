"""The network computes what the reference implementation computes: tests/golden/README.md says what is compared."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from reference import (
    FOLDER,
    KEYS,
    VARIANTS,
    golden,
    golden_image,
    golden_model,
    our_names,
    relative_error,
    shapes,
)
from torch import Tensor, nn

from glmix.models.fold import optimize_for_inference
from glmix.models.glnet import GLNet
from glmix.models.slot_maps import slot_maps

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def files(kind: str) -> list[str]:
    found = sorted(path.stem for path in FOLDER.glob(f"*.{kind}.*.npz"))
    assert found, f"no golden {kind} cases in {FOLDER}"
    return found


def differences(ours: dict[str, Tensor | np.ndarray], theirs: dict[str, np.ndarray], dtype: torch.dtype) -> list[str]:
    """What is further off than allowed. Every golden array must have been computed."""
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    return [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[dtype]]


def read(file: str, leave_out: tuple[str, ...]) -> tuple[str, str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Variant and case, arrays to be computed, and those of `leave_out` with the shapes: the inputs."""
    variant, _, case = file.split(".")
    with np.load(Path(FOLDER, f"{file}.npz")) as arrays:
        every = dict(arrays)
    inputs = {k: every.pop(k) for k in list(every) if k in leave_out or "shape" in k}
    return variant, case, every, inputs


class Everything(nn.Module):
    """Keeps logits, features and stages of the pass in which `slot_maps` looks at the slots: float64 passes are slow."""

    def __init__(self, model: GLNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        self.features, self.stages = self.model.forward_intermediates(x)
        self.logits = self.model.forward_head(self.features)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_entry_has_its_place(variant: str) -> None:
    """Names, shapes and number of parameters are the reference's, but for 1x1 convolutions and LayerScale."""
    model = timm.create_model(variant, device="meta")
    assert sum(p.numel() for p in model.parameters()) == KEYS[variant]["parameters"]
    names = our_names(variant)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert set(names.values()) == ours.keys()
    for key, shape in shapes(variant).items():
        here = ours[names[key]]
        if here != shape:
            assert len(shape) == 4, key
            assert shape[2:] == (1, 1), key
            assert here == (shape[1:2] if key.endswith("gamma") else shape[:2]), key


def inference(
    model: GLNet, case: str, inputs: dict[str, np.ndarray], dtype: torch.dtype
) -> dict[str, Tensor | np.ndarray]:
    """All that an `eval` file holds, computed by `model`."""
    if case == "slots16":
        model.set_slot_grid((4, 4))
    seen = Everything(model)
    x = golden_image(case, inputs["shape"], dtype)
    maps_of = {maps.block.removeprefix("model."): maps for maps in slot_maps(seen, x)}
    ours: dict[str, Tensor | np.ndarray] = {"logits": seen.logits}
    for i, stage in enumerate(seen.stages):
        assert tuple(stage.shape) == tuple(inputs[f"stage{i}_shape"])
        ours[f"stage{i}"] = golden.sample(f"stage{i}", stage.numpy())
    ours["final_norm"] = golden.sample("final_norm", seen.features.numpy())
    for block, maps in maps_of.items():
        assert maps.logits.dtype == dtype
        assert maps.logits.flatten(2).shape == tuple(inputs[f"slot_logits_shape:{block}"])
        arrays = {"slot_logits": maps.logits, "assignment": maps.assignment, "clustering": maps.clustering}
        for name, value in arrays.items():
            ours[f"{name}:{block}"] = golden.sample(name, value.numpy(), 32)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", files("eval"))
def test_inference(file: str, dtype: str) -> None:
    variant, case, theirs, inputs = read(file, ())
    model = golden_model(variant, DTYPES[dtype]).eval()
    assert not differences(inference(model, case, inputs, DTYPES[dtype]), theirs, DTYPES[dtype])


LARGE = ("glnet_9g", "glnet_16g")  # seconds each; what is folded in them alone, LayerScale, test_fold.py has in small


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[pytest.mark.slow] * f.startswith(LARGE)) for f in files("eval")]
)
@torch.no_grad()
def test_folded_inference(file: str) -> None:
    """What `optimize_for_inference` makes computes the same: features, slots, and logits by either way to them."""
    variant, case, theirs, inputs = read(file, ())
    folded = optimize_for_inference(golden_model(variant, torch.float32))
    ours = inference(folded, case, inputs, torch.float32)
    assert not differences(ours, theirs, torch.float32)
    ours["logits"] = folded(golden_image(case, inputs["shape"], torch.float32))
    assert not differences(ours, theirs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", files("train"))
def test_training_step(file: str, dtype: str) -> None:
    """Loss and gradients in train mode; token-labelled variants with MixToken."""
    variant, case, theirs, inputs = read(file, ("labels", "box", "grad_names"))
    model = golden_model(variant, DTYPES[dtype]).train()
    x = golden_image(case, inputs["shape"], DTYPES[dtype]).requires_grad_()
    labels = torch.from_numpy(inputs["labels"])
    ours: dict[str, Tensor | np.ndarray] = {}
    if "box" in inputs:
        logits, dense = model.forward_mixtoken(x, tuple(inputs["box"].tolist()))
        assert tuple(dense.shape) == tuple(inputs["dense_shape"])
        direction = torch.from_numpy(golden.fill("dense_direction", tuple(dense.shape)))
        loss = F.cross_entropy(logits, labels) + 0.5 * (dense * direction).mean()
        ours["cls"], ours["dense"] = logits.detach(), golden.sample("dense", dense.detach().numpy())
    else:
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        ours["logits"] = logits.detach()
    loss.backward()
    ours["loss"] = loss.detach()
    ours["image_grad"] = golden.sample("image_grad", x.grad.numpy())
    ours["running_mean_after"], ours["running_var_after"] = model.norm.running_mean, model.norm.running_var

    names, shape_of, parameters = our_names(variant), shapes(variant), dict(model.named_parameters())
    theirs_of = [str(name) for name in inputs["grad_names"]]
    assert {names[name] for name in theirs_of} == parameters.keys()
    gradients = [parameters[names[name]].grad.double().flatten() for name in theirs_of]
    directions = [golden.fill(f"direction:{name}", shape_of[name]).reshape(-1) for name in theirs_of]
    ours["grad_norms"] = np.array([gradient.norm() for gradient in gradients])
    ours["grad_dots"] = np.array([gradient.numpy() @ d for gradient, d in zip(gradients, directions, strict=True)])
    assert not differences(ours, theirs, DTYPES[dtype])


def test_mixtoken_needs_its_head() -> None:
    model = timm.create_model("glnet_4g", device="meta")
    with pytest.raises(ValueError, match="token_labeling=True"):
        model.forward_mixtoken(torch.empty(2, 3, 64, 64, device="meta"), (0, 0, 1, 1))
