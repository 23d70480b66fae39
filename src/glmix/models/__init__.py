"""The network, its slots and its weights."""

import difflib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from glmix.errors import UserError
from glmix.models.glnet import MODEL_NAMES, GLNet
from glmix.models.weights import Checkpoint, checkpoint_file, find_weights, fit_state_dict, read_checkpoint

SHIPPED = "glnet_pico.imagenette"  # the weights in the package, used where a command is given none


def check_name(name: str) -> str:
    """`name` if it is a GLNet variant, with or without a tag.

    Raises:
        UserError: it is none; names the nearest ones.
    """
    if name.split(".")[0] not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, 3, 0.4) or MODEL_NAMES
        raise UserError(f"no model {name!r}; did you mean {' or '.join(near)}? (`glmix models` lists all)")
    return name


def create_model(name: str, checkpoint: str | Path | None = None, **arguments: Any) -> GLNet:
    """A GLNet by name, as `timm.create_model`, or with the weights of any checkpoint file.

    Args:
        name: variant, with a tag if wanted, such as `glnet_4g`.
        checkpoint: run folder, safetensors file of ours or released `.pth` file, loaded strictly. Number of classes
            and options of the architecture are taken from it unless given.
        arguments: as for `timm.create_model`: `num_classes`, `in_chans`, `drop_path_rate`, ...

    Raises:
        UserError: unknown name, unreadable checkpoint, or one of another architecture or class count.
    """
    check_name(name)
    if checkpoint is None:
        return cast(GLNet, timm.create_model(name, **arguments))
    read = read_checkpoint(checkpoint)
    if read.model and read.model != name.split(".")[0]:
        raise UserError(f"{checkpoint}: holds {read.model}, not {name}; ask for {read.model}")
    classes = read.state_dict["head.fc.weight"].shape[0] if "head.fc.weight" in read.state_dict else 0
    if arguments.get("features_only"):  # timm wraps the network, and loads the weights before that
        file: dict[str, Any] = {"file": str(checkpoint_file(checkpoint)), "num_classes": classes}
        merged: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": file} | read.model_args | arguments
        return cast(GLNet, timm.create_model(name, **merged))
    model = cast(GLNet, timm.create_model(name, **{"num_classes": classes} | read.model_args | arguments))
    if model.num_classes != classes:
        raise UserError(
            f"{checkpoint}: has {classes} classes, not {model.num_classes}; leave out num_classes, or load it and call reset_classifier"
        )
    try:
        model.load_state_dict(fit_state_dict(read.state_dict, model), strict=True)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return model


def load_body(model: GLNet, checkpoint: str | Path) -> None:
    """Put a checkpoint's weights into `model`, to train on from there; a classifier of other classes stays as drawn.

    Args:
        checkpoint: run folder, file (ours or a released one) or model name.

    Raises:
        UserError: unreadable, or of another architecture.
    """
    named = str(checkpoint).split(".")[0] in MODEL_NAMES and not Path(checkpoint).exists()
    path = find_weights(timm.get_pretrained_cfg(str(checkpoint))) if named else checkpoint
    try:
        state_dict = fit_state_dict(read_checkpoint(path).state_dict, model)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in state_dict.items() if v.shape == own[k].shape})


def load(source: str | Path) -> tuple[GLNet, Checkpoint]:
    """The model of a run folder, a file (ours or a released one) or a model name, ready for inference.

    Returns:
        The model in evaluation mode, and its checkpoint without tensors: class names and image preparation are
        always filled in.

    Raises:
        UserError: as `create_model`, or no weights are to be had for the name.
    """
    path = Path(source)
    if (not path.exists() and not path.suffix and len(path.parts) == 1) or str(source).split(".")[0] in MODEL_NAMES:
        try:
            tagged = timm.get_pretrained_cfg(check_name(str(source)))
        except RuntimeError as error:
            raise UserError(f"{source}: no weights of that name; the package holds {SHIPPED}") from error
        name, path = str(source).split(".")[0], find_weights(tagged)
        checkpoint = read_checkpoint(path)
    else:
        checkpoint = read_checkpoint(path)
        name = checkpoint.model or identify(checkpoint.state_dict, path)
    model = create_model(name, checkpoint=path).eval()
    cfg = config_of(model)
    checkpoint.model = name
    checkpoint.image = {
        k: cfg[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")
    } | checkpoint.image
    if not checkpoint.classes:
        checkpoint.classes = [str(i) for i in range(model.num_classes)]
        checkpoint.names = checkpoint.classes
        if model.num_classes == 1000:
            info = ImageNetInfo()
            checkpoint.classes = info.label_names()
            checkpoint.names = [d.split(",")[0] for d in info.label_descriptions()]
    checkpoint.state_dict = {}
    return model, checkpoint


def config_of(model: GLNet) -> dict[str, Any]:
    """timm's configuration of a model: how images are prepared, class count, names of the first and last layers."""
    return cast(dict[str, Any], model.pretrained_cfg)


def identify(state_dict: dict[str, Tensor], path: Path) -> str:
    """The variant whose tensors have the names and shapes of `state_dict` (classifiers apart)."""

    def body(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in tensors.items() if not k.startswith(("head.", "aux_head."))}

    for name in MODEL_NAMES:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=1)
        has_aux = any(k.startswith("aux_head.") for k in state_dict)
        if body(model.state_dict()) == body(state_dict) and model.token_labeling == has_aux:
            return name
    raise UserError(f"{path}: holds weights of no GLNet variant (`glmix models` lists them)")
