"""GLMix / GLNet: convolution on the grid, attention among semantic slots.

Importing this package registers the backbones in timm: `timm.create_model("glnet_4g")`.
"""

from typing import Any

from glmix.errors import UserError
from glmix.models import create_model
from glmix.models.fold import optimize_for_inference
from glmix.models.slot_maps import SlotMaps, slot_maps

__version__ = "0.1.0"
__all__ = [
    "SlotMaps",
    "UserError",
    "create_model",
    "optimize_for_inference",
    "plot_slots",
    "representative_slots",
    "slot_maps",
]


def __getattr__(name: str) -> Any:
    if name in ("plot_slots", "representative_slots"):  # on first use: matplotlib takes its time to import
        from glmix.slots import figures

        return getattr(figures, name)
    raise AttributeError(f"module 'glmix' has no attribute {name!r}")
