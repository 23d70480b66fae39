"""`glmix doctor`."""

import json as json_module
import os
import platform
import re
import time
from importlib import metadata
from typing import Any

import torch

from glmix import __version__
from glmix.commands.common import pick_device
from glmix.data.loading import default_workers
from glmix.models import SHIPPED, load
from glmix.ranges import NonNegativeFloat
from glmix.training.options import usual_precision

BATCH = 16


def doctor(seconds: NonNegativeFloat = 10.0, json: bool = False) -> None:
    """Versions, devices, what is not installed, what is chosen here by itself, and how fast it is: paste it into an issue.

    Args:
        seconds: for the measurement of speed; 0 for none.
        json: print one JSON object instead of lines.
    """
    found: dict[str, Any] = {
        "glmix": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version_of(name) for name in ("torch", "torchvision", "timm", "lightning", "numpy")},
        "devices": devices(),
        "extras": missing_of_extras(),
        "chosen": {
            "device": str(pick_device()),
            "precision": usual_precision(),
            "workers": default_workers(),
        },
    }
    if seconds:
        found["images_per_second"] = round(speed(seconds), 1)
    if json:
        print(json_module.dumps(found))
        return
    print(f"glmix {found['glmix']}, Python {found['python']}, {found['system']}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    print("devices: " + ", ".join(found["devices"]))
    for extra, names in found["extras"].items():
        print(f"glmix[{extra}]: " + (f"lacks {', '.join(names)}" if names else "installed"))
    print("chosen here: " + ", ".join(f"{name} {value}" for name, value in found["chosen"].items()))
    if seconds:
        print(f"speed: {found['images_per_second']} images/s, {SHIPPED}, batches of {BATCH}, images at hand")


def version_of(name: str) -> str:
    """The version of an installed package; '' where it is none."""
    if name == "torch":
        return torch.__version__  # with what it was built for
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def devices() -> list[str]:
    """Cores, the threads that PyTorch uses of them, and GPUs."""
    found = [f"{os.cpu_count()} CPU cores ({torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        there = torch.cuda.get_device_properties(i)
        found.append(f"{there.name} ({there.total_memory / 2**30:.0f} GB)")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (not used)")
    return found


def missing_of_extras() -> dict[str, list[str]]:
    """What is not installed of each optional part of this package; nothing is known where it runs from a mere folder."""
    try:
        required = metadata.requires("glmix") or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name:
            lacking = missing.setdefault(extra[1], [])
            if not version_of(name[0]):
                lacking.append(name[0])
    return missing


@torch.inference_mode()
def speed(seconds: float) -> float:
    """Images a second of the weights that ship, in float32: the median of batches for so long, the first left out."""
    model, described = load(SHIPPED)
    device = pick_device()
    model = model.to(device).to(memory_format=torch.channels_last)
    height, width = described.prepared.size
    images = torch.rand(BATCH, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 2 or time.monotonic() < end:
        begun = time.monotonic()
        model(images)[0, 0].item()  # waits for a GPU
        times.append(time.monotonic() - begun)
    return BATCH / sorted(times[1:])[len(times[1:]) // 2]
