"""Weights in files: one function reads every kind, one writes ours.

Ours is a safetensors file whose header holds what is needed to use the weights: architecture, its options, the class
names and how images are prepared. The reference's released `.pth` files are read too, whatever else they hold, and
nothing in them is executed.
"""

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glmix.errors import UserError

FORMAT = "glmix 1"
HEADER_KEY = "glmix"


@dataclass
class Checkpoint:
    """Weights and what is needed to use them.

    Attributes:
        state_dict: tensors by our names.
        model: architecture name; '' where the file does not tell (released files).
        model_args: options of the architecture that differ from the variant's.
        classes: class labels, in the order of the logits (folder names, for instance).
        names: the same for people to read.
        image: `input_size` (C, H, W), `mean`, `std`, `interpolation`, `crop_pct`, as in timm's data configuration.
        info: anything about the training that made them: epoch, accuracy, command.
    """

    state_dict: dict[str, Tensor]
    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    image: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a safetensors file, beside its place first, synced, then renamed: a half-written one never has the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = asdict_without_tensors(checkpoint) | {"format": FORMAT}
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.state_dict.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(tensors, beside, metadata={HEADER_KEY: json.dumps(header)})
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # safetensors makes files that only their owner can read
        os.replace(beside, path)
    except safetensors.SafetensorError as error:  # what it makes of a full disk, or of a folder without permission
        raise UserError(f"{path}: cannot be written ({error}); free space, or choose another place") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def asdict_without_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header of a checkpoint as plain data."""
    return asdict(Checkpoint(**{**vars(checkpoint), "state_dict": {}})) | {"state_dict": None}


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read weights from a run folder (its best ones), a safetensors file of ours, or a released `.pth` file.

    Raises:
        UserError: the file is missing, half-written, or holds no GLNet weights.
    """
    path = checkpoint_file(source)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return Checkpoint(rename_released(_read_released(path)))


def checkpoint_file(source: str | Path) -> Path:
    """The file of a checkpoint: itself, or the best weights of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("best.safetensors", "last.safetensors", "model.safetensors")]
        path = next((p for p in found if p.is_file()), found[0])
        if not path.is_file():
            raise UserError(
                f"{source}: this folder holds no best.safetensors or last.safetensors; is it a run's folder, and has an epoch ended?"
            )
    if not path.is_file():
        raise UserError(
            f"{source}: no such checkpoint; give a run folder, a .safetensors or .pth file, or a model name (`glmix models`)"
        )
    return path


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dictionary)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged or half-written ({error}); copy it again, or use another checkpoint of the run"
        ) from error
    fields = {k: header[k] for k in Checkpoint.__dataclass_fields__ if k in header and k != "state_dict"}
    return Checkpoint(rename_released(state_dict), **fields)


class _InertType(type):
    """Says that it is `dict`: PyTorch's loader fills nothing else with items, and configurations often subclass it."""

    __hash__ = type.__hash__

    def __eq__(cls, other: object) -> bool:
        return other is dict or cls is other


class _Inert(metaclass=_InertType):
    """Stands for any class named in a released file that is not plain tensor data: holds nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _read_released(path: Path) -> dict[str, Tensor]:
    """The weights of a released file: `model`, or `model_ema` where the published accuracy is that of the average.

    PyTorch's restricted loader reads it. Other classes in the file (the configuration of the training run, an object
    of a library that is not needed here) are replaced by inert stand-ins, so nothing of them is imported or run.
    """
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every way in which a file can be broken
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: no readable PyTorch checkpoint ({reason[0][:120] if reason else 'empty'}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the weights of a GLNet")
    model = content.get("model", content.get("state_dict", content))
    average = content.get("model_ema")
    # The 16g accuracy was published for the moving average (reference README); 16g is the one variant with LayerScale.
    if isinstance(average, dict) and any(key.endswith("ls1.gamma") for key in average):
        model = average
    tensors = {k: v for k, v in model.items() if isinstance(v, Tensor)} if isinstance(model, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no weights; a released file has them under 'model' or 'model_ema'")
    return tensors


_RENAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"\.slot_scale$", ".mixer.similarity.scale"),
    (r"\.init_slots$", ".mixer.seeds"),
    (r"\.norm1\.", ".mixer.norm."),
    (r"\.norm2\.", ".mlp.norm."),
    (r"\.relation_mha\.", ".mixer.slot_attn."),
    (r"\.mha_op\.", ".mixer.attn."),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.feature_conv\.", ".mixer.local."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.conv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)", r"head.fc.\1"),
    (r"^tklb_aux_head\.", "aux_head."),
]


def rename_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a released file; 1x1 convolutions become linear layers. Ours pass unchanged."""
    state_dict = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state_dict.items()}
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return state_dict
    # the overlapping stem has a module without weights in front of its first convolution
    shift = 0 if "downsample_layers.0.0.weight" in state_dict else 1
    renamed = {}
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("stem."):
            _, index, rest = name.split(".", 2)
            name = f"stem.{int(index) - shift}.{rest}"
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.reshape(-1) if name.endswith("gamma") else value.flatten(1)
        renamed[name] = value
    return renamed


def fit_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` by our names, after a check that every entry has its place in `model` and none is missing.

    The classifier may differ in its number of classes (timm then leaves it as drawn); nothing else may.

    Raises:
        UserError: weights of another architecture.
    """
    state_dict = rename_released(state_dict)
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "aux_head."))}
    given = {k: v for k, v in state_dict.items() if not k.startswith(("head.", "aux_head."))}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    shapes = [k for k in wanted if k in given and wanted[k].shape != given[k].shape and k != "stem.0.weight"]
    if missing or unexpected or shapes:
        first = (missing or unexpected or shapes)[0]
        raise UserError(
            f"these weights are of another architecture than {type(model).__name__} was built as: {len(missing)} entries missing, "
            f"{len(unexpected)} unknown, {len(shapes)} of another shape (first: {first}); check the model name"
        )
    return state_dict


def weights_folder() -> Path:
    """Where weights that cannot ship are looked for: `GLMIX_HOME`, else `glmix` in the user's cache folder."""
    home = os.environ.get("GLMIX_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "glmix"


def find_weights(cfg: Any) -> Path:
    """The file of a pretrained configuration: named by it, shipped with the package, or in `weights_folder()`.

    Raises:
        UserError: there is none; says where to get it and where to put it.
    """
    if cfg.file:
        return Path(cfg.file)
    tagged = f"{cfg.architecture}.{cfg.tag}"
    shipped = Path(__file__).parent.parent / "shipped" / f"{tagged}.safetensors"
    released = weights_folder() / f"{cfg.architecture}.pth"
    for path in (shipped, weights_folder() / f"{tagged}.safetensors", released):
        if path.is_file():
            return path
    if cfg.tag == "in1k":
        raise UserError(
            f"{tagged}: its authors' file cannot be fetched by program; get it from {cfg.origin_url} and save it as {released}"
        )
    raise UserError(f"{tagged}: no trained weights exist; train it, or build it with pretrained=False")


def fingerprint(model: nn.Module) -> str:
    """A checksum of a model's weights."""
    result = 0
    for tensor in model.state_dict().values():
        result = zlib.crc32(tensor.cpu().numpy().tobytes(), result)
    return f"{result:08x}"
