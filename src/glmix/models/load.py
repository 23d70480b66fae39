"""Models with their weights: by name, from a run, or from any file that holds a GLNet's."""

import difflib
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import adapt_input_conv
from torch import Tensor, nn

from glmix.data.prepare import Preparation
from glmix.errors import UserError
from glmix.models.description import Description
from glmix.models.glnet import MODEL_NAMES, GLNet, default_cfgs
from glmix.models.heads import with_head
from glmix.models.weights import checkpoint_file, count_classes, find_weights, fit_state_dict, read_checkpoint

SHIPPED = "glnet_pico_tklb.imagenette"  # the weights in the package, used where a command is given none
CLASSIFIERS = ("head.", "aux_head.")  # how their names begin
FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def check_name(name: str, others: bool = False) -> str:
    """The GLNet variant that `name` asks for, with or without the tag of weights; with `others`, any network of timm.

    Raises:
        UserError: there is none, or it has no weights of that tag; names those there are.
    """
    variant, _, tag = name.partition(".")
    if others and variant not in MODEL_NAMES and timm.is_model(variant):
        if tag:
            raise UserError(f"{name}: weights come by --init, from a checkpoint of this package; ask for {variant}")
        return variant
    if variant not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, 3, 0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        path = f" ({name} is a path; a training starts from its weights by --init)" if Path(name).exists() else ""
        raise UserError(f"no model {name!r}{path}{hint} (`glmix models` lists all)")
    tags = list(default_cfgs[variant].tags)
    if tag and tag not in tags:
        there = ", ".join(f"{variant}.{t}" for t in tags if t != "untrained") or f"none; {SHIPPED} is in the package"
        raise UserError(f"{variant} has no weights {tag!r}; there are {there}")
    return variant


def names_model(source: str | Path) -> bool:
    """Whether `source` asks for a GLNet by name: what exists on disk is a path, whatever it is called."""
    path = Path(source)
    is_path = path.exists() or str(source) != path.name or path.suffix in FILES
    return not is_path and path.name.split(".")[0] in MODEL_NAMES


def weights_file(source: str | Path) -> Path:
    """Where the weights of a model's name lie, or the path that `source` is.

    Raises:
        UserError: nearly a name, or one of which no weights are to be had.
    """
    path = Path(source)
    nearly = not path.exists() and str(source) == path.name and not path.suffix
    if not names_model(source) and not nearly:
        return path
    check_name(str(source))
    return find_weights(timm.get_pretrained_cfg(str(source)))


def create_model(name: str, checkpoint: str | Path | None = None, **arguments: Any) -> GLNet:
    """A GLNet by name, as `timm.create_model`, or with the weights of any checkpoint file of one.

    Args:
        name: variant, with a tag if wanted, such as `glnet_4g`.
        checkpoint: run folder, file (ours, a released one, ...) or name of a model with weights, loaded strictly.
            Number of classes and options of the architecture are taken from it unless given.
        arguments: as for `timm.create_model`: `num_classes`, `in_chans`, `drop_path_rate`, ... With `in_chans` other
            than the checkpoint's 3, its first convolution is adapted as timm does.

    Raises:
        UserError: unknown name, unreadable checkpoint, or one of another architecture or class count.
    """
    variant = check_name(name)
    if checkpoint is None:
        return cast(GLNet, timm.create_model(name, **arguments))
    path = weights_file(checkpoint)
    description, tensors = read_checkpoint(path)
    if description.head:
        raise UserError(
            f"{checkpoint}: a network under a head ({description.head['name']}); glmix.models.load gives the whole, whose "
            "`backbone` it is"
        )
    return _create_from(name, variant, checkpoint, path, description, tensors, arguments)


def build(description: Description, **arguments: Any) -> nn.Module:
    """The model of a description, with weights as first drawn; `arguments` of the architecture win.

    Raises:
        UserError: no such model or head, or options that it does not have.
    """
    if "num_classes" in description.model_args:
        raise UserError("model_args num_classes: the data says how many; leave it out")
    name, count = check_name(description.model, others=True), len(description.classes)
    given = {"num_classes": 0 if description.head else count} | description.model_args | arguments
    try:
        model = timm.create_model(name, **given)
        return with_head(model, description.head, count) if description.head else model
    except (TypeError, ValueError) as error:
        asked = f"model_args {description.model_args}" + (f", head {description.head}" if description.head else "")
        raise UserError(f"{asked}: {error}") from error


def body_among(description: Description, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the network itself: under a head, those of its backbone."""
    if not description.head:
        return tensors
    return {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}


def parts_beside_body(checkpoint: str | Path) -> list[str]:
    """The parts of a checkpoint that are not of the body, such as 'head': what `load_body` does not take from another task."""
    description, tensors = read_checkpoint(weights_file(checkpoint))
    beside = [
        k for k in tensors if not (k.startswith("backbone.") if description.head else not k.startswith(CLASSIFIERS))
    ]
    return sorted({key.partition(".")[0] for key in beside})


def _create_from(
    name: str,
    variant: str,
    source: str | Path,
    path: Path,
    description: Description,
    tensors: dict[str, Tensor],
    arguments: Mapping[str, Any],
) -> GLNet:
    if description.model and description.model != variant:
        raise UserError(f"{source}: holds {description.model}, not {variant}; ask for {description.model}")
    classes = count_classes(tensors)
    if arguments.get("features_only"):  # timm wraps the network, and loads the weights before that
        file: dict[str, Any] = {"file": str(checkpoint_file(path)), "num_classes": classes}
        merged: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": file} | description.model_args
        return cast(GLNet, timm.create_model(name, **{**merged, **arguments}))
    found: dict[str, Any] = {"num_classes": classes}
    if "stem.0.weight" in tensors:
        found["in_chans"] = tensors["stem.0.weight"].shape[1]
    model = cast(GLNet, timm.create_model(name, **{**found, **description.model_args, **arguments}))
    if model.num_classes != classes:
        raise UserError(
            f"{source}: has {classes} classes, not {model.num_classes}; leave out num_classes, or load it and call reset_classifier"
        )
    try:
        model.load_state_dict(with_channels(fit_state_dict(tensors, model), model), strict=True)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return model


def with_channels(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`tensors` with a first convolution for the channels of `model`'s images, adapted from three as timm does.

    Raises:
        UserError: from others than three channels.
    """
    first = tensors.get("stem.0.weight")
    if first is None or first.shape[1] == model.in_chans:
        return tensors
    if first.shape[1] != 3:
        raise UserError(f"these weights are for images of {first.shape[1]} channels, not {model.in_chans}")
    return tensors | {"stem.0.weight": adapt_input_conv(model.in_chans, first)}


def network_of(module: nn.Module) -> Any:
    """The network that images go through first: the one GLNet in `module`, else its `backbone`, else itself."""
    if any(isinstance(part, GLNet) for part in module.modules()):
        return backbone_of(module)
    return getattr(module, "backbone", module)


def backbone_of(module: nn.Module) -> GLNet:
    """The one GLNet in `module`: itself, or inside whatever wraps it or holds it as its `backbone`.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [part for part in module.modules() if isinstance(part, GLNet)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} holds {len(found) or 'no'} GLNet{'s' * (len(found) > 1)}, not one")
    return found[0]


def load_body(model: nn.Module, checkpoint: str | Path, classes: list[str] | None = None) -> str:
    """Put a checkpoint's weights into `model`, to train on from there.

    The classifier (both heads of a token-labelled model) is taken where it is of the same classes, its rows put in
    their order; else it stays as drawn. Of a pruned network only what it has left is filled.

    Args:
        model: a GLNet, another network of timm (which takes weights of this package alone), or a head that holds one.
        checkpoint: run folder, file (ours, a released one, ...) or model name.
        classes: labels of the model's classes, in their order; None if only their number is known.

    Returns:
        What became of the classifier, in a few words; '' where that needs no saying.

    Raises:
        UserError: unreadable, or of another architecture.
    """
    net = network_of(model)
    try:
        description, tensors = read_checkpoint(weights_file(checkpoint))
        if description.head and classes == description.classes and _shapes(tensors) == _shapes(model.state_dict()):
            model.load_state_dict(tensors)
            return "head kept"
        tensors = body_among(description, tensors)
        own = net.state_dict()
        left = {k: v for k, v in tensors.items() if k in own or not _pruned_away(k, net)}
        if description.head:  # there the last norm was cut off
            left = {k: v for k, v in own.items() if k.startswith("norm.")} | left
        body = {k: v for k, v in left.items() if not k.startswith(CLASSIFIERS)}
        body = with_channels(fit_state_dict(body, net), net)
    except UserError as error:
        raise UserError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from error
    name_classes(description, count_classes(tensors))
    rows, said = _matching_rows(description, classes, count_classes(tensors), net.num_classes)
    names = classifiers_of(net)
    given = count_classes(tensors)
    heads = {k: v for k, v in tensors.items() if rows is not None and k.startswith(names) and k in own}
    heads = {k: v[rows] if len(v) == given else v for k, v in heads.items()}  # a dense head may have classes of its own
    heads = {k: v for k, v in heads.items() if v.shape == own[k].shape}
    if heads and "aux_head.weight" in own and "aux_head.weight" not in heads:
        said = f"{said or 'classifier kept'}; the head of token labels is new"
    new = {k: v for k, v in own.items() if k.startswith(names) and k not in heads}
    net.load_state_dict(own | body | heads | _redrawn(new, body))
    return said


def _redrawn(new: dict[str, Tensor], body: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a new classifier in another order, which depends on the body.

    Two runs of one seed draw the same classifier. A body that was trained under it would know it: with classes in the same
    order, a probe of it would begin with part of what it is to learn.
    """
    mark = zlib.crc32(b"".join(v.float().numpy().tobytes() for v in list(body.values())[:4]))
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31 + mark)
    return {k: v.flatten()[torch.randperm(v.numel(), generator=generator)].view_as(v) for k, v in new.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items()}


def classifiers_of(net: Any) -> tuple[str, ...]:
    """How the names of a network's classifiers begin."""
    found = config_of(net)["classifier"]
    return tuple(f"{name}." for name in ([found] if isinstance(found, str) else found))


def _pruned_away(key: str, net: Any) -> bool:
    """Whether `net` was cut before the layer of `key`."""
    if key.startswith("norm."):
        return isinstance(net.norm, nn.Identity)
    return key.startswith("stages.") and int(key.split(".")[1]) >= len(net.stages)


def _matching_rows(
    description: Description, classes: list[str] | None, given: int, wanted: int
) -> tuple[list[int] | None, str]:
    """Which rows of a classifier of `given` classes are those of `wanted` ones, if all are; and what to say of it."""
    if not wanted:
        return None, ""
    if not given:
        return None, "classifier new: the weights have none"
    in_order = list(range(given))
    if classes is None:
        return (in_order, "") if given == wanted else (None, "classifier replaced: other number of classes")
    if sorted(classes) == sorted(description.classes):
        place = {label: row for row, label in enumerate(description.classes)}
        return [place[label] for label in classes], "classifier kept"
    if not description.named and given == wanted:
        return in_order, "classifier taken by order: the weights name no classes"
    return None, "classifier replaced: other classes"


def load(source: str | Path) -> tuple[Any, Description]:
    """The model of a run folder, a file (ours or a released one) or a model name, ready for inference.

    Returns:
        The model in evaluation mode (a GLNet; of a dense task, a head that holds one), and what is known of it: class
        names and image preparation are always filled in.

    Raises:
        UserError: as `create_model`, no weights are to be had for the name, or they lack a classifier.
    """
    path = weights_file(source)
    description, tensors = read_checkpoint(path)
    variant = description.model or identify(tensors, path)
    if description.head or variant not in MODEL_NAMES:
        other = build(description)
        try:
            other.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{source}: {str(error).splitlines()[-1].strip()}; written by another version?") from error
        return other.eval(), description
    if not count_classes(tensors):
        raise UserError(
            f"{source}: a body without a classifier; train one from it by --init, or use it in Python by "
            f'create_model("{variant}", checkpoint=...)'
        )
    model = _create_from(variant, variant, source, path, description, tensors, {}).eval()
    description = replace(description, task=description.task or "classify", model=variant)
    if description.preparation is None:
        description.preparation = replace(Preparation.of(config_of(model)), channels=model.in_chans)
    name_classes(description, model.num_classes)
    return model, description


def name_classes(description: Description, count: int) -> None:
    """Fill in what `count` classes are usually called, where the weights name none."""
    if description.classes:
        return
    description.named = False
    description.classes = description.names = [str(i) for i in range(count)]
    if count == 1000:
        info = ImageNetInfo()
        description.classes = info.label_names()
        description.names = [d.split(",")[0] for d in info.label_descriptions()]


def config_of(model: Any) -> dict[str, Any]:
    """timm's configuration of a model: how images are prepared, class count, names of the first and last layers."""
    return cast(dict[str, Any], network_of(model).pretrained_cfg)


def identify(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The variant whose tensors have the names and shapes of `tensors` (classifiers and the image's channels apart).

    Raises:
        UserError: they are of none.
    """

    def body(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        shapes = {k: tuple(v.shape) for k, v in tensors.items() if not k.startswith(CLASSIFIERS)}
        return shapes | {"stem.0.weight": shapes.get("stem.0.weight", ())[:1]}

    has_second = any(k.startswith("aux_head.") for k in tensors)
    for name in MODEL_NAMES:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=1)
        if body(model.state_dict()) == body(tensors) and model.token_labeling == has_second:
            return name
    raise UserError(f"{path}: holds weights of no GLNet variant (`glmix models` lists them)")
