"""Models by name, by path and from files of others: what is taken for what, and what is said of the rest."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from reference import as_released
from timm.models import load_state_dict, save_for_hf
from torch import Tensor, nn

from glmix.data.prepare import Preparation
from glmix.errors import UserError
from glmix.models import (
    SHIPPED,
    Description,
    GLNet,
    backbone_of,
    check_name,
    create_model,
    load,
    load_body,
    names_model,
)
from glmix.models.slot_maps import slot_maps
from glmix.models.weights import HEADER_KEY, read_checkpoint, write_checkpoint

SMALL: dict[str, Any] = {"dims": (32, 32, 64, 64), "depths": (1, 1, 2, 1)}
ARGS = {"dims": [32, 32, 64, 64], "depths": [1, 1, 2, 1]}
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def drawn(variant: str = "glnet_pico", seed: int = 1, **options: Any) -> GLNet:
    torch.manual_seed(seed)
    return timm.create_model(variant, **{"num_classes": 4, **SMALL, **options}).eval()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor = IMAGE) -> Tensor:
    return model.eval()(x)


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def ours(path: Path, model: GLNet, variant: str = "glnet_pico", classes: str = "abcd", **about: Any) -> Path:
    args = ARGS | about.pop("model_args", {})
    described = Description("classify", variant, args, list(classes), list(classes), **about)
    return write_checkpoint(path, described, model.state_dict())


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- a name or a path ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMIX_HOME", str(tmp_path / "nowhere"))
    return tmp_path


@pytest.mark.parametrize("name", ["glnet_4g.pth", "glnet_pico.safetensors", "glnet_pico.pth.tar", "glnet_pico.mine"])
def test_a_file_that_is_called_like_a_variant(name: str, here: Path) -> None:
    model = timm.create_model("glnet_pico", num_classes=4)
    if name.endswith(".safetensors"):
        write_checkpoint(here / name, Description(model="glnet_pico"), model.state_dict())
    else:
        save(here / name, {"model": model.state_dict()})
    for source in (name, Path(name), f"./{name}", here / name):
        assert not names_model(source)
        loaded, description = load(source)
        assert description.model == "glnet_pico"
        assert torch.equal(logits(loaded), logits(model))
        other = timm.create_model("glnet_pico", num_classes=4)
        load_body(other, source)
        assert torch.equal(logits(other), logits(model))
        assert torch.equal(logits(create_model("glnet_pico", checkpoint=source)), logits(model))


@pytest.mark.parametrize("name", ["glnet_pico", "glnet_9g", SHIPPED])
def test_a_run_that_is_called_like_a_variant(name: str, here: Path) -> None:
    model = drawn()
    ours(here / name / "best.safetensors", model)
    assert not names_model(name)
    loaded, description = load(name)
    assert description.classes == list("abcd")
    assert torch.equal(logits(loaded), logits(model))
    other = drawn(seed=2)
    load_body(other, name)
    assert torch.equal(logits(other), logits(model))
    assert check_name(name) == name.split(".")[0]  # what to build is a name all the same


def test_names_of_models(here: Path) -> None:
    for name in ("glnet_pico_tklb", SHIPPED):
        assert check_name(name) == "glnet_pico_tklb"
        assert names_model(name)
        model, description = load(name)
        assert description.names[0] == "tench" and description.named
        assert description.task == "classify"
        assert description.preparation == Preparation(size=(160, 160), crop=1.0)
        assert torch.equal(logits(create_model("glnet_pico_tklb", checkpoint=name)), logits(model))
    assert check_name("glnet_4g.in1k") == "glnet_4g"
    assert not names_model("resnet50")


@pytest.mark.parametrize("use", [check_name, load, create_model, lambda name: load_body(drawn(), name)])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("glnet_pico.nonsense", SHIPPED),
        ("glnet_9g.imagenette", "glnet_9g.in1k"),
        ("glnet_pcio", "glnet_pico"),
        ("glnet", "glnet_"),
    ],
)
def test_names_that_are_none(use: Any, name: str, told: str, here: Path) -> None:
    with pytest.raises(UserError) as error:
        use(name)
    assert told in message(error)
    assert name.split(".")[-1] in message(error)


@pytest.mark.parametrize("name", ["glnet_4g.pth", "runs/glnet_pico", "./glnet_pico", "glnet_pico.pth.tar", "mine.txt"])
def test_a_path_that_is_missing(name: str, here: Path) -> None:
    for use in (load, lambda source: load_body(drawn(), source)):
        with pytest.raises(UserError, match="no such checkpoint") as error:
            use(name)
        assert str(Path(name)) in message(error)


def test_a_path_is_no_architecture(here: Path) -> None:
    ours(here / "mine" / "best.safetensors", drawn())
    with pytest.raises(UserError, match="--init") as error:
        check_name("mine")
    assert "mine" in message(error)


def test_a_run_whose_model_was_written_with_its_tag(tmp_path: Path) -> None:
    model = drawn()
    path = ours(tmp_path / "best.safetensors", model, "glnet_pico.imagenette")
    assert torch.equal(logits(load(path)[0]), logits(model))


# --- what older files say --------------------------------------------------------------------------------------------


def old_file(path: Path, tensors: dict[str, Tensor], **header: Any) -> Path:
    """As it was written before there were tasks."""
    import safetensors.torch

    usual = {"state_dict": None, "model": "glnet_pico", "model_args": ARGS, "classes": list("abcd")}
    usual |= {"names": ["A", "B", "C", "D"], "info": {"epoch": 3}, "format": "glmix 1"}
    usual["image"] = {
        "input_size": [3, 96, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 2, 3],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
    }
    safetensors.torch.save_file(tensors, path, {HEADER_KEY: json.dumps(usual | header)})
    return path


def test_older_headers(tmp_path: Path) -> None:
    model = drawn()
    loaded, description = load(old_file(tmp_path / "best.safetensors", dict(model.state_dict())))
    assert torch.equal(logits(loaded), logits(model))
    assert description == Description(
        task="classify",
        model="glnet_pico",
        model_args=ARGS,
        classes=list("abcd"),
        names=["A", "B", "C", "D"],
        preparation=Preparation((96, 64), 3, "crop", 0.9, "bilinear", (0.1, 0.2, 0.3), (1, 2, 3)),
        info={"epoch": 3},
    )


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_stl_paramslot"])
def test_learned_seeds_of_older_files(variant: str, tmp_path: Path) -> None:
    """Their parameter belonged to the block itself, and the option had a name of its own."""
    model = drawn(variant, seeds="learned", slot_grid=(2, 5))
    tensors = {key.replace("seeds.values", "seeds"): value for key, value in model.state_dict().items()}
    assert sum(key.endswith("mixer.seeds") for key in tensors) == 4
    args = ARGS | {"learned_slots": True, "slot_grid": [2, 5]}
    path = old_file(tmp_path / "a.safetensors", tensors, model=variant, model_args=args)
    loaded, description = load(path)
    assert torch.equal(logits(loaded), logits(model))
    overlay = {"file": str(path)}
    assert torch.equal(
        logits(timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay)), logits(model)
    )
    again = drawn(variant, seed=2, seeds="learned", slot_grid=(2, 5))
    again.load_state_dict(tensors)  # as a resume point does
    assert torch.equal(logits(again), logits(model))
    new = write_checkpoint(tmp_path / "new.safetensors", description, loaded.state_dict())
    assert torch.equal(logits(load(new)[0]), logits(model))
    assert "learned_slots" not in read_checkpoint(new)[0].model_args
    by_old_name = drawn(variant, learned_slots=True, slot_grid=(2, 5))
    assert torch.equal(logits(by_old_name), logits(model))
    assert {maps.slot_grid for maps in slot_maps(drawn(variant, learned_slots=False), IMAGE)} == {
        (7, 7) if variant == "glnet_pico" else (8, 8)
    }


# --- files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "model_state_dict", "net"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.", "net.", "a.backbone."]
)
def test_whatever_holds_the_network(prefix: str, entry: str, tmp_path: Path) -> None:
    model = drawn()
    tensors = {prefix + key: value for key, value in model.state_dict().items()}
    content: dict[str, Any] = {entry: tensors, "epoch": 3} if entry else tensors
    content = content | {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    path = save(tmp_path / "theirs.pt", content)
    assert torch.equal(logits(create_model("glnet_pico", checkpoint=path, **SMALL)), logits(model))
    other = drawn(seed=2)
    load_body(other, path)
    assert torch.equal(logits(other), logits(model))


def test_released_names_behind_a_prefix(tmp_path: Path) -> None:
    model = drawn("glnet_4g")
    tensors = {f"model.{key}": value for key, value in as_released(model, "glnet_4g").items()}
    path = save(tmp_path / "a.ckpt", {"state_dict": tensors | {"criterion.weight": torch.ones(4)}})
    assert torch.equal(logits(create_model("glnet_4g", checkpoint=path, **SMALL)), logits(model))


def test_an_average_of_pytorch(tmp_path: Path) -> None:
    model = drawn()
    path = save(tmp_path / "a.pt", torch.optim.swa_utils.AveragedModel(model).state_dict())
    assert torch.equal(logits(create_model("glnet_pico", checkpoint=path, **SMALL)), logits(model))


def test_the_average_that_timm_takes(tmp_path: Path) -> None:
    """A checkpoint of timm's training script holds weights and their average; timm itself loads the average."""
    model, average = drawn(), drawn(seed=2)
    content = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict(), "arch": "glnet_pico"}
    path = save(tmp_path / "model_best.pth.tar", content)
    loaded = create_model("glnet_pico", checkpoint=path, **SMALL)
    by_timm = drawn(seed=3)
    by_timm.load_state_dict(load_state_dict(str(path)))
    assert torch.equal(logits(loaded), logits(by_timm))
    assert torch.equal(logits(loaded), logits(average))
    assert not torch.equal(logits(model), logits(average))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("best", [True, False])
def test_a_resume_point(best: bool, average: bool, tmp_path: Path) -> None:
    """Its average is taken where it keeps one; what it is of, the weights beside it tell, else the tensors."""
    small = SMALL if best else {"dims": (32, 64, 128, 256), "depths": (1, 2, 6, 1)}
    model, ema = drawn(**small), drawn(seed=2, **small)
    if best:
        info = {"epoch": 7, "val_top1": 99.0, "validation_images": "a digest", "command": "glmix train"}
        ours(tmp_path / "best.safetensors", drawn(seed=3), info=info, preparation=Preparation(size=(64, 64)))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    if average:
        state |= {f"ema.module.{key}": value for key, value in ema.state_dict().items()}
    content = {"epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.5", "state_dict": state, "loops": {}}
    loaded, description = load(save(tmp_path / "resume.ckpt", content))
    assert torch.equal(logits(loaded), logits(ema if average else model))
    assert description.model == "glnet_pico"
    assert description.classes == (list("abcd") if best else list("0123"))
    if best:
        assert description.preparation == Preparation(size=(64, 64))
        assert description.info == {"validation_images": "a digest", "command": "glmix train"}  # not the best's figures


def test_two_networks_in_a_file(tmp_path: Path) -> None:
    tensors = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in drawn().state_dict().items()}
    path = save(tmp_path / "a.pt", tensors)
    with pytest.raises(UserError, match="several networks") as error:
        read_checkpoint(path)
    assert str(path) in message(error) and "student." in message(error)


def test_a_body_without_a_classifier(tmp_path: Path) -> None:
    body = timm.create_model("glnet_pico", num_classes=0).eval()
    for entry in ("", "backbone."):
        tensors = {entry + key: value for key, value in body.state_dict().items()}
        path = save(tmp_path / "body.pth", tensors | ({"head.weight": torch.ones(3)} if entry else {}))
        with pytest.raises(UserError, match="without a classifier") as error:
            load(path)
        assert str(path) in message(error) and "--init" in message(error)
        assert torch.equal(logits(create_model("glnet_pico", checkpoint=path)), logits(body))
        overlay = {"file": str(path)}
        by_timm = timm.create_model("glnet_pico", pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(logits(by_timm), logits(body))
        model = timm.create_model("glnet_pico", num_classes=3)
        assert "classifier new" in load_body(model, path, list("abc"))
        model.eval()
        assert torch.equal(model.forward_features(IMAGE), body.forward_features(IMAGE))


class Pickled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = drawn()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: drawn(), "whole pickled model"),
        (lambda: Pickled(), "whole pickled model"),
        (lambda: {"model": drawn(), "epoch": 3}, "whole pickled model"),
        (lambda: {"epoch": 3, "args": {"lr": 1}}, "epoch, args"),
        (lambda: torch.ones(3), "Tensor"),
    ],
)
def test_what_is_no_file_of_weights_is_named(content: Any, told: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", content())
    for use in (load, lambda source: create_model("glnet_pico", checkpoint=source)):
        with pytest.raises(UserError, match=told) as error:
            use(path)
        assert str(path) in message(error)


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.script(drawn()).save(str(path))
    with pytest.raises(UserError, match="TorchScript") as error:
        load(path)
    assert str(path) in message(error)


@pytest.mark.parametrize("safe", [True, False])
def test_folders_that_timm_saves(safe: bool, tmp_path: Path) -> None:
    """`save_for_hf`: options, image preparation and class names are in a file beside the weights."""
    model = drawn(slot_grid=(3, 5), num_classes=3)
    config = {"label_names": ["x", "y", "z"], "label_descriptions": {"x": "an x", "y": "a y"}}
    config["pretrained_cfg"] = {"crop_pct": 0.75, "mean": [0.5, 0.5, 0.5]}
    arguments = ARGS | {"slot_grid": [3, 5]}
    save_for_hf(model, tmp_path / "saved", model_config=config, model_args=arguments, safe_serialization=safe)
    weights = next(p for p in (tmp_path / "saved").iterdir() if p.name != "config.json")
    for source in (tmp_path / "saved", weights):
        loaded, description = load(source)
        assert torch.equal(logits(loaded), logits(model))
        assert description.model == "glnet_pico"
        assert description.classes == ["x", "y", "z"]
        assert description.names == ["an x", "a y", "z"]
        assert description.named
        assert description.preparation == Preparation((160, 160), crop=0.75, mean=(0.5, 0.5, 0.5))
    (tmp_path / "saved" / "config.json").write_text("{half")
    with pytest.raises(UserError, match="config.json") as error:
        load(tmp_path / "saved")
    assert "save the model again" in message(error)


# --- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_stl"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_as_timm_adapts_them(variant: str, channels: int, tmp_path: Path) -> None:
    model = drawn(variant)
    path = save(tmp_path / "a.pth", model.state_dict())
    overlay = {"file": str(path), "num_classes": 4}
    options = {"in_chans": channels, "num_classes": 4, **SMALL}
    expected = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    loaded = create_model(variant, checkpoint=path, in_chans=channels, **SMALL)
    x = torch.randn(2, channels, 64, 64)
    assert torch.equal(logits(loaded, x), logits(expected, x))
    started = drawn(variant, seed=3, in_chans=channels)
    load_body(started, path)
    assert torch.equal(logits(started, x), logits(expected, x))
    if channels == 1:
        torch.testing.assert_close(logits(loaded, x), logits(model, x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    grey = ours(tmp_path / "grey.safetensors", loaded, variant)  # the file's tensors tell how many it has
    again, description = load(grey)
    assert again.in_chans == description.preparation.channels == channels
    assert torch.equal(logits(again, x), logits(loaded, x))
    with pytest.raises(UserError, match=f"{channels} channels") as error:
        create_model(variant, checkpoint=grey, in_chans=3)
    assert str(grey) in message(error)


# --- names of classes ------------------------------------------------------------------------------------------------


def test_names_of_imagenet(tmp_path: Path) -> None:
    """A released file names no classes: what is known of ImageNet's order is filled in."""
    model = timm.create_model("glnet_pico", num_classes=1000)
    with torch.no_grad():
        model.head.fc.bias[207] = 1000
    loaded, description = load(save(tmp_path / "a.pth", {"model": model.state_dict()}))
    assert len(description.classes) == len(description.names) == 1000
    known = {0: ("n01440764", "tench"), 1: ("n01443537", "goldfish"), 281: ("n02123045", "tabby")}
    known |= {817: ("n04285008", "sports car"), 999: ("n15075141", "toilet tissue")}
    for index, (label, name) in known.items():
        assert (description.classes[index], description.names[index]) == (label, name)
    assert description.names[logits(loaded)[0].argmax()] == "golden retriever"
    assert not description.named


def test_whether_the_file_names_its_classes(tmp_path: Path) -> None:
    model = timm.create_model("glnet_pico", num_classes=4)
    _, numbers = load(save(tmp_path / "a.pth", model.state_dict()))
    assert (numbers.classes, numbers.names, numbers.named) == (list("0123"), list("0123"), False)
    _, again = load(write_checkpoint(tmp_path / "a.safetensors", numbers, model.state_dict()))
    assert not again.named  # what was made up once is not taken for the truth later
    digits = Description(model="glnet_pico", classes=list("0123"), names=list("0123"))
    assert load(write_checkpoint(tmp_path / "b.safetensors", digits, model.state_dict()))[1].named


# --- starting from weights -------------------------------------------------------------------------------------------


def heads(model: GLNet) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "head." in name]


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_4g_tklb"])
@pytest.mark.parametrize(
    ("there", "here", "said", "rows"),
    [
        ("abcd", "abcd", "classifier kept", [0, 1, 2, 3]),
        ("abcd", "cadb", "classifier kept", [2, 0, 3, 1]),
        ("abcd", "abce", "classifier replaced: other classes", None),
        ("abcd", "abc", "classifier replaced: other classes", None),
        ("", "wxyz", "classifier taken by order: the weights name no classes", [0, 1, 2, 3]),
        ("", "wxy", "classifier replaced: other classes", None),
        ("abcd", None, "", [0, 1, 2, 3]),
    ],
)
def test_a_classifier_is_kept_for_its_own_classes(
    variant: str, there: str, here: str | None, said: str, rows: list[int] | None, tmp_path: Path
) -> None:
    model = drawn(variant)
    path = ours(tmp_path / "a.safetensors", model, variant, there)
    started = drawn(variant, seed=2, num_classes=len(here or "abcd"))
    fresh = heads(started)
    assert load_body(started, path, None if here is None else list(here)) == said
    assert torch.equal(started.forward_features(IMAGE), model.forward_features(IMAGE))
    expected = fresh if rows is None else [tensor[rows] for tensor in heads(model)]
    assert len(expected) == (4 if "tklb" in variant else 2)
    for got, wanted in zip(heads(started), expected, strict=True):
        # a new one has the values that were drawn, in an order that no body was trained under
        assert torch.equal(got, wanted) if rows else torch.equal(got.flatten().sort()[0], wanted.flatten().sort()[0])
    if rows and here:
        assert torch.equal(logits(started), logits(model)[:, rows])


def test_another_number_of_classes_is_said(tmp_path: Path) -> None:
    path = ours(tmp_path / "a.safetensors", drawn())
    assert load_body(drawn(num_classes=3), path) == "classifier replaced: other number of classes"
    assert load_body(drawn(num_classes=0), path) == ""


def test_with_and_without_the_second_head(tmp_path: Path) -> None:
    both, plain = drawn("glnet_4g_tklb"), drawn("glnet_4g", seed=2)
    with_second, without = save(tmp_path / "tklb.pth", both.state_dict()), save(tmp_path / "4g.pth", plain.state_dict())
    for variant, path in (("glnet_4g", with_second), ("glnet_4g_tklb", without)):
        overlay = {"file": str(path)}
        for use in (
            lambda v=variant, p=path: create_model(v, checkpoint=p, **SMALL),
            lambda v=variant, o=overlay: timm.create_model(v, pretrained=True, pretrained_cfg_overlay=o, **SMALL),
        ):
            with pytest.raises(UserError, match="_tklb") as error:
                use()
            assert str(path) in message(error)
    started = drawn("glnet_4g", seed=3)
    assert load_body(started, with_second, list("abcd")).startswith("classifier taken")
    assert torch.equal(started.head.fc.weight, both.head.fc.weight)
    started = drawn("glnet_4g_tklb", seed=3)
    fresh = started.aux_head.weight.clone()
    assert load_body(started, without, list("abcd")).endswith("the head of token labels is new")
    assert torch.equal(started.head.fc.weight, plain.head.fc.weight)
    assert torch.equal(started.aux_head.weight.flatten().sort()[0], fresh.flatten().sort()[0])


# --- heads that hold a network ---------------------------------------------------------------------------------------


class Head(nn.Module):
    """A task's head as tasks build it: a pruned GLNet as `backbone`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.backbone = drawn(seed=5)
        self.backbone.prune_intermediate_layers([last], prune_norm=True)
        self.out = nn.LazyConv2d(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.backbone.forward_intermediates(x, intermediates_only=True)[-1])


@pytest.mark.parametrize("last", [1, 3])
def test_a_head_that_holds_a_network(last: int, tmp_path: Path) -> None:
    head = Head(last)
    head(IMAGE)
    net = backbone_of(head)
    assert net is head.backbone
    for wrapped in (nn.Sequential(head), torch.compile(head), torch.compile(net), net):
        assert backbone_of(wrapped) is net
    blocks = list(net.slot_mixers())
    assert [maps.block for maps in slot_maps(head, IMAGE)] == [f"backbone.{block}" for block in blocks]
    net.set_slot_grid((2, 3))
    assert {maps.slot_grid for maps in slot_maps(head, IMAGE)} == {(2, 3)}
    assert net.no_weight_decay() == {f"{block}.mixer.similarity.scale" for block in blocks}
    whole = drawn(slot_grid=(2, 3))
    path = ours(tmp_path / "a.safetensors", whole)
    outside = head.out.weight.clone()
    assert load_body(head, path, list("abcd")) == ""
    stage = whole.forward_intermediates(IMAGE, intermediates_only=True)[last]
    assert torch.equal(net.eval().forward_intermediates(IMAGE, intermediates_only=True)[-1], stage)
    assert torch.equal(head.out.weight, outside)
    with pytest.raises(UserError, match="another architecture"):
        load_body(head, SHIPPED)


def test_modules_with_no_network_or_two() -> None:
    for module in (nn.Linear(2, 2), nn.ModuleList([drawn(), drawn()]), timm.create_model("resnet18", device="meta")):
        with pytest.raises(ValueError, match="not one"):
            backbone_of(module)


def test_the_description_of_a_file_is_plain_data(tmp_path: Path) -> None:
    path = ours(tmp_path / "a.safetensors", drawn(), preparation=Preparation(size=(64, 96)))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"][HEADER_KEY])
    assert header["format"] == "glmix 1"
    assert header["task"] == "classify"
    assert header["preparation"]["size"] == [64, 96]
    assert os.stat(path).st_size > 8 + length
