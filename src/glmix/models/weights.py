"""Weights in files: one function reads every kind, one writes ours.

Ours is a safetensors file whose header holds what is needed to use the weights, a `Description`. The reference's
released `.pth` files are read too, and what training scripts, Lightning and timm write around weights of a GLNet; of
nothing in them is anything executed.
"""

import json
import os
import re
import textwrap
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glmix.errors import UserError
from glmix.files import written_whole
from glmix.models.description import Description

HEADER_KEY = "glmix"
SHIPPED_FOLDER = Path(__file__).parent.parent / "shipped"
OF_A_RUN = ("best.safetensors", "best_ema.safetensors", "last.safetensors", "last_ema.safetensors")
OF_TIMM = ("model.safetensors", "pytorch_model.bin")  # with config.json beside, by `save_for_hf`
# where files of PyTorch keep weights, the better ones first: timm keeps, and itself takes, the average where it has one
ENTRIES = ("state_dict_ema", "model", "state_dict", "model_state_dict", "net", "network", "weights")


def write_checkpoint(path: str | Path, description: Description, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written: a full disk, or a place that is not to be written to.
    """
    path = Path(path)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    content = safetensors.torch.save(plain, {HEADER_KEY: json.dumps(description.header())})
    try:
        with written_whole(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free space, or choose another place") from error
    return path


def read_checkpoint(source: str | Path) -> tuple[Description, dict[str, Tensor]]:
    """Read weights, by our names, and what the file says of them.

    Args:
        source: a run's folder (the better of its best and its best average) or its resume point, a safetensors file, a folder by timm's
            `save_for_hf`, or a file of PyTorch such as the released `.pth` ones.

    Raises:
        UserError: the file is missing, half-written, or holds no weights that can be read without executing it.
    """
    path = checkpoint_file(source)
    if path.suffix == ".safetensors":
        description, tensors = _read_safetensors(path)
    else:
        description, tensors = _read_pytorch(path)
    if path.name in OF_TIMM and not description.model and (path.parent / "config.json").is_file():
        description = _read_config(path.parent / "config.json")
    if description.head:
        return description, unwrapped(tensors)
    return description, rename_released(without_wrappers(tensors, path))


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without the prefixes of DDP, `module.`, and torch.compile, `_orig_mod.`."""
    return {re.sub(r"(^|(?<=\.))(module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}


def checkpoint_file(source: str | Path) -> Path:
    """The file of a checkpoint: itself, or the best weights of a run folder, averaged or not, as its validation told.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in OF_A_RUN + OF_TIMM]
        there = [p for p in found if p.is_file()]
        best = [p for p in there if p.name.startswith("best")]
        path = max(best, key=_validated) if len(best) > 1 else next(iter(there), found[1])
        if not path.is_file():
            raise UserError(
                f"{source}: this folder holds no best.safetensors or last.safetensors; is it a run's folder, and has an epoch ended?"
            )
    if not path.is_file():
        raise UserError(
            f"{source}: no such checkpoint; give a run folder, a .safetensors or .pth file, or a model name (`glmix models`)"
        )
    return path


def _validated(path: Path) -> float:
    """What a run measured of the weights in a file of its: the figure that chooses among them."""
    info = _read_header(path).info
    return float(info.get(f"val_{info.get('headline', 'top1')}", float("-inf")))


def count_classes(tensors: Mapping[str, Tensor]) -> int:
    """Classes of the classifier among `tensors` (by our names); 0 if there is none."""
    return tensors["head.fc.weight"].shape[0] if "head.fc.weight" in tensors else 0


def _read_header(path: Path) -> Description:
    """What a safetensors file says of its weights, which are not read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return Description.of_header(json.loads((file.metadata() or {}).get(HEADER_KEY, "{}")))
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged or half-written ({error}); copy it again, or use another checkpoint of the run"
        ) from error


def _read_safetensors(path: Path) -> tuple[Description, dict[str, Tensor]]:
    description = _read_header(path)
    with safetensors.safe_open(path, "pt") as file:
        return description, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dictionary)


def _read_config(path: Path) -> Description:
    try:
        return Description.of_timm(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no config.json by timm's save_for_hf ({error}); save the model again") from error


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


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.search(r"(^|/)code/", name) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_pytorch(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """The weights in a file of PyTorch, and what is known of them: of a run's resume point, all that its weights say.

    PyTorch's restricted loader reads it. Other classes in the file (the configuration of the training run, an object
    of a library that is not needed here) are replaced by inert stand-ins, so nothing of them is imported or run.
    """
    if _is_torchscript(path):
        raise UserError(f"{path}: a TorchScript program, of which no weights are read; save the model's state_dict()")
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every way in which a file can be broken
        reason = (str(error).strip().splitlines() or ["empty"])[0]
        reason = textwrap.shorten(reason.partition(". ")[0], 120, placeholder=" …")
        raise UserError(
            f"{path}: no readable checkpoint ({reason}); if it should be one, it is damaged: fetch or write it again"
        ) from error
    candidates = [content]
    if isinstance(content, dict):
        # The 16g accuracy was published for the moving average (reference README); 16g is the one variant with LayerScale.
        average = content.get("model_ema")
        published = isinstance(average, dict) and any(str(key).endswith("ls1.gamma") for key in average)
        candidates = [average] * published + [content.get(name) for name in ENTRIES] + [content]
    weights = next((w for w in (tensors_among(c) for c in candidates) if w), {})
    if not weights:
        if any(isinstance(candidate, _Inert) for candidate in candidates):
            raise UserError(
                f"{path}: a whole pickled model, which would have to be executed; save its weights instead: "
                "torch.save(model.state_dict(), FILE)"
            )
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a {type(content).__name__}, not the weights of a GLNet")
        held = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise UserError(
            f"{path}: holds no weights (what it holds: {held}); they are looked for in {', '.join(ENTRIES)}"
        )
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        for beside in (path.with_name(name) for name in OF_A_RUN):
            if beside.is_file():
                description = _read_header(beside)
                info = {k: v for k, v in description.info.items() if k != "epoch" and not k.startswith("val_")}
                return replace(description, info=info), weights
    return Description.of_header({}), weights


def tensors_among(candidate: Any) -> dict[str, Tensor]:
    """The tensors of a dictionary by their names; none of anything else."""
    if not isinstance(candidate, dict):
        return {}
    return {k: v for k, v in candidate.items() if isinstance(k, str) and isinstance(v, Tensor)}


_FIRST = re.compile(r"^((?:.*\.)?)(stem\.0\.weight|downsample_layers\.0\.[01]\.weight)$")


def without_wrappers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The GLNet's own tensors by its own names, whatever held the network when they were saved.

    What wraps a network puts a prefix before its names: DDP `module.`, torch.compile `_orig_mod.`, Lightning the
    name of an attribute, a head `backbone.`. The first convolution tells which. Where a moving average lies beside
    the weights, it is taken; what lies beside them otherwise, such as a head, is not.

    Raises:
        UserError: the file holds several GLNets.
    """
    tensors = unwrapped(tensors)
    prefixes = sorted({match[1] for match in map(_FIRST.match, tensors) if match})
    averages = [prefix for prefix in prefixes if re.search(r"(^|[._])ema[._]", prefix)]
    chosen = averages or prefixes
    if len(chosen) > 1:
        raise UserError(
            f"{path}: holds several networks ({', '.join(p or 'one without a prefix' for p in chosen)}); save one by itself"
        )
    if not chosen:
        return tensors
    kept = {key.removeprefix(chosen[0]): value for key, value in tensors.items() if key.startswith(chosen[0])}
    kept.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return kept


_RENAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"\.slot_scale$", ".mixer.similarity.scale"),
    (r"\.init_slots$", ".mixer.seeds.values"),
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
    """Our names for the tensors of a released file; 1x1 convolutions become linear layers.

    Ours pass unchanged, but for learned seeds, which were the block's own parameter once.
    """
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return {re.sub(r"\.mixer\.seeds$", ".mixer.seeds.values", key): value for key, value in state_dict.items()}
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

    The classifier may differ in its number of classes (timm then leaves it as drawn), and the first convolution in
    its channels; nothing else may.

    Raises:
        UserError: weights of another architecture.
    """
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
    if count_classes(state_dict) and getattr(model, "num_classes", 0):
        second, has_second = "aux_head.weight" in state_dict, "aux_head.weight" in model.state_dict()
        if second and not has_second:
            raise UserError("these weights have a second head, of token labels: ask for a `_tklb` model")
        if has_second and not second:
            raise UserError("these weights lack the second head of token labels: ask for a model without `_tklb`")
    return state_dict


def weights_folder() -> Path:
    """Where weights that cannot ship are looked for: `GLMIX_HOME`, else `glmix` in the user's cache folder."""
    home = os.environ.get("GLMIX_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "glmix"


def find_weights(cfg: Any) -> Path:
    """The file of a pretrained configuration: named by it (so are those in the package), or in `weights_folder()`.

    Raises:
        UserError: there is none; says where to get it and where to put it.
    """
    if cfg.file:
        return Path(cfg.file)
    tagged = f"{cfg.architecture}.{cfg.tag}"
    released = weights_folder() / f"{cfg.architecture}.pth"
    for path in (weights_folder() / f"{tagged}.safetensors", released):
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
