"""Models that hold the golden weights, and the reference's names for their entries."""

import json
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import glmix  # noqa: F401  (registers the variants)
from glmix.models.glnet import GLNet
from glmix.models.weights import rename_released

FOLDER = Path(__file__).parent / "golden"
sys.path.insert(0, str(FOLDER))
import golden  # noqa: E402

KEYS: dict[str, dict] = json.loads((FOLDER / "keys.json").read_text())
VARIANTS = list(KEYS)


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the reference's state dict, by its name there."""
    return {key: tuple(shape) for key, shape in KEYS[variant]["state_dict"].items()}


@lru_cache(maxsize=1)  # tests go variant by variant; 16g alone is 430 MB
def released_state_dict(variant: str) -> dict[str, Tensor]:
    """The golden weights as a released file holds them. Shared between tests: not to be changed."""
    return {key: torch.from_numpy(golden.fill(key, shape).copy()) for key, shape in shapes(variant).items()}


def our_names(variant: str) -> dict[str, str]:
    """Our name for each of the reference's names."""
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes(variant).items()}
    renamed = list(rename_released(empty))
    assert len(renamed) == len(empty), "two entries of the reference got one name"
    return dict(zip(empty, renamed, strict=True))


def golden_model(variant: str, dtype: torch.dtype) -> GLNet:
    """The golden model of a variant, loaded strictly."""
    model = timm.create_model(variant, device="meta").to_empty(device="cpu")  # every entry is loaded, none drawn
    model.load_state_dict(rename_released(released_state_dict(variant)), strict=True)
    return model.to(dtype)


def golden_image(case: str, shape: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(golden.image(case, tuple(shape))).to(dtype)


def relative_error(ours: Tensor | np.ndarray, golden_values: np.ndarray) -> float:
    """L2 norm of the difference over that of the golden values."""
    ours = np.asarray(ours, dtype=np.float64).reshape(golden_values.shape)
    return float(np.linalg.norm(ours - golden_values) / np.linalg.norm(golden_values))


def as_released(model: GLNet, variant: str) -> dict[str, Tensor]:
    """Weights of `model`, a `variant` of any width and depth, by the reference's names and in its shapes."""
    reference_name = {ours: theirs for theirs, ours in our_names(variant).items()}
    released = {}
    for ours, value in model.state_dict().items():
        name = reference_name[ours]
        shape = shapes(variant)[name]
        if name.endswith("gamma") and len(shape) == 4:
            value = value[None, :, None, None]
        elif len(shape) == 4 and value.ndim == 2:
            value = value[..., None, None]
        released[name] = value.clone()
    return released
