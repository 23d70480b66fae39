"""Weights in files: what is read from released files and ours, what is refused and with which message."""

import argparse
import importlib
import logging
import os
import resource
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from reference import as_released, released_state_dict
from torch import Tensor

from glmix.data.prepare import Preparation
from glmix.errors import UserError
from glmix.models import create_model
from glmix.models.description import Description
from glmix.models.glnet import PUBLISHED_PAGE, GLNet
from glmix.models.weights import read_checkpoint, write_checkpoint

SMALL: dict[str, Any] = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1)}
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def drawn(variant: str, seed: int = 0, **options: Any) -> GLNet:
    """A small model of the variant's kind with weights that differ everywhere, also where they are first constant."""
    torch.manual_seed(seed)
    model = timm.create_model(variant, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, x: Tensor = IMAGE) -> Tensor:
    return model.eval()(x)


def save(path: Path, **content: Any) -> Path:
    torch.save(content, path)
    return path


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- the same weights, by every way ---------------------------------------------------------------------------------


def every_way(variant: str, released: Path, **options: Any) -> Iterator[GLNet]:
    yield create_model(variant, checkpoint=released, **options)
    yield timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": str(released)}, **options)
    converted = write_checkpoint(released.with_suffix(".safetensors"), *read_checkpoint(released))
    yield create_model(variant, checkpoint=converted, **options)
    yield timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": str(converted)}, **options)


@pytest.mark.parametrize("variant", ["glnet_stl", "glnet_stl_paramslot", "glnet_4g", "glnet_16g", "glnet_4g_tklb"])
def test_a_released_file_means_the_same_by_every_way(variant: str, tmp_path: Path) -> None:
    model = drawn(variant)
    path = save(tmp_path / "released.pth", model=as_released(model, variant))
    expected = logits(model)
    for loaded in every_way(variant, path, **SMALL):
        assert torch.equal(logits(loaded), expected)


def test_a_released_file_of_full_size(tmp_path: Path) -> None:
    path = save(tmp_path / "stl.pth", model=released_state_dict("glnet_stl"))
    outputs = [logits(loaded) for loaded in every_way("glnet_stl", path)]
    assert outputs[0].std() > 0.1
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_released_file_in_the_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLMIX_HOME says where `pretrained=True` looks; a converted file is found there as well."""
    monkeypatch.setenv("GLMIX_HOME", str(tmp_path))
    released, converted = drawn("glnet_4g"), drawn("glnet_9g", seed=1)
    save(tmp_path / "glnet_4g.pth", model=as_released(released, "glnet_4g"))
    write_checkpoint(tmp_path / "glnet_9g.in1k.safetensors", Description(), converted.state_dict())
    assert torch.equal(logits(timm.create_model("glnet_4g", pretrained=True, **SMALL)), logits(released))
    assert torch.equal(logits(timm.create_model("glnet_9g.in1k", pretrained=True, **SMALL)), logits(converted))


def test_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the package: nothing is looked for elsewhere."""
    monkeypatch.setenv("GLMIX_HOME", str(tmp_path))
    model = timm.create_model("glnet_pico_tklb", pretrained=True)
    assert model.num_classes == 10
    fresh = timm.create_model("glnet_pico_tklb", pretrained=True, num_classes=3)
    assert logits(fresh).shape == (2, 3)
    assert torch.equal(fresh.forward_features(IMAGE), model.eval().forward_features(IMAGE))


def test_no_second_copy_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", model=as_released(drawn("glnet_4g"), "glnet_4g"))
    for options in ({}, {"features_only": True}, {"features_only": True, "feature_cls": "getter"}):
        overlay = {"file": str(path)}
        model = timm.create_model("glnet_4g", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **options)
        for module in model.modules():
            if hasattr(module, "pretrained_cfg"):
                assert not module.pretrained_cfg["state_dict"]


def test_our_file_keeps_all_it_was_given(tmp_path: Path) -> None:
    model = drawn("glnet_pico", num_classes=2, slot_grid=(3, 5), dims=(32, 32, 64, 64), depths=(1, 1, 1, 1))
    options = {"slot_grid": [3, 5], "dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1]}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    given = Description(
        task="classify",
        model="glnet_pico",
        model_args=options,
        classes=["n1", "n2"],
        names=["tench", "a Katze \N{CAT FACE}"],
        preparation=Preparation(size=(64, 64), mean=(0.5, 0.5, 0.5), resize="squash", interpolation="bilinear"),
        info={"epoch": 3, "top1": 0.5},
    )
    path = write_checkpoint(tmp_path / "folder" / "best.safetensors", given, tensors)
    for source in (path, str(path), path.parent):
        description, read = read_checkpoint(source)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(value, tensors[key]) for key, value in read.items())
        assert description == given
    expected = logits(model)
    assert torch.equal(logits(create_model("glnet_pico", checkpoint=path)), expected)
    # timm takes class count and options of the architecture from the file too
    overlay = {"file": str(path)}
    assert torch.equal(
        logits(timm.create_model("glnet_pico", pretrained=True, pretrained_cfg_overlay=overlay)), expected
    )
    wider = timm.create_model("glnet_pico", pretrained=True, pretrained_cfg_overlay=overlay, slot_grid=(6, 6))
    assert wider.slot_mixers()["stages.0.blocks.0"].seeds.slot_grid == (6, 6)


# --- what else a released file may hold ------------------------------------------------------------------------------

TRAINING_MODULE = """
import enum
from dataclasses import dataclass
from pathlib import Path

class Kind(enum.Enum):
    MIXED = "mixed"

class Settings(dict):
    pass

class Slotted:
    __slots__ = ("value",)
    def __init__(self, value):
        self.value = value

@dataclass
class Inner:
    kind: Kind
    settings: Settings
    slotted: Slotted

def rebuild(marker, inner):
    Path(marker).write_text("executed")
    return Arguments(marker, inner)

class Arguments:
    def __init__(self, marker, inner):
        self.marker, self.inner = marker, inner
    def __reduce__(self):
        return rebuild, (self.marker, self.inner)

def make(marker):
    settings = Settings(lr=1e-3, nested=Settings(epochs=300))
    settings.note = "an attribute beside the items"
    return Arguments(marker, Inner(Kind.MIXED, settings, Slotted(3)))
"""


def training_file(folder: Path, **weights: dict[str, Tensor]) -> tuple[Path, Path]:
    """A file as training scripts save them, and the marker that is written wherever its `args` are unpickled."""
    (folder / "training_settings_of_a_run.py").write_text(TRAINING_MODULE)
    sys.path.insert(0, str(folder))
    try:
        settings = importlib.import_module("training_settings_of_a_run")
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        marker = folder / "marker"
        path = save(
            folder / "checkpoint.pth",
            **weights,
            optimizer=optimizer.state_dict(),
            lr_scheduler={"milestones": defaultdict(list, a=[1])},
            scaler=torch.amp.GradScaler("cpu", enabled=True).state_dict(),
            epoch=299,
            max_accuracy=np.float64(83.7),
            random_state=np.random.RandomState(0).get_state(),
            namespace=argparse.Namespace(data=Path("/data"), device=torch.device("cpu"), shape=torch.Size([3])),
            args=settings.make(str(marker)),
        )
        torch.load(path, weights_only=False)  # the trap works: plain unpickling springs it
        assert marker.is_file()
        marker.unlink()
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("training_settings_of_a_run")
        (folder / "training_settings_of_a_run.py").unlink()
    return path, marker


@pytest.mark.parametrize("variant", ["glnet_4g", "glnet_16g"])
def test_a_file_with_all_of_a_training_run(variant: str, tmp_path: Path) -> None:
    """Nothing in it is executed. `model` is taken, but for 16g `model_ema`, of which the accuracy was published."""
    model, average = drawn(variant), drawn(variant, seed=1)
    path, marker = training_file(
        tmp_path,
        model=OrderedDict(as_released(model, variant)),
        model_ema=OrderedDict(as_released(average, variant)),
    )
    loaded = create_model(variant, checkpoint=path, **SMALL)
    assert torch.equal(logits(loaded), logits(average if variant == "glnet_16g" else model))
    assert not torch.equal(logits(model), logits(average))
    assert not marker.exists()
    assert "training_settings_of_a_run" not in sys.modules


def test_names_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = drawn("glnet_4g")
    wrapped = {f"module.{key}": value for key, value in as_released(model, "glnet_4g").items()}
    path = save(tmp_path / "a.pth", model=wrapped)
    assert torch.equal(logits(create_model("glnet_4g", checkpoint=path, **SMALL)), logits(model))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, how: str, marker: Path) -> None:
        self.how, self.marker = how, marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.how == "eval":
            return eval, (f"open({str(self.marker)!r}, 'w')",)
        return importlib.import_module("os").system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["eval", "system"])
def test_code_in_a_file_is_never_executed(how: str, tmp_path: Path) -> None:
    model, marker = drawn("glnet_4g"), tmp_path / "marker"
    path = save(tmp_path / "a.pth", model=as_released(model, "glnet_4g"), args=Malicious(how, marker))
    try:
        loaded = create_model("glnet_4g", checkpoint=path, **SMALL)
        assert torch.equal(logits(loaded), logits(model))
    except UserError:
        assert how == "system"  # a function of the operating system makes PyTorch refuse the whole file
    assert not marker.exists()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_a_damaged_file_is_named(damage: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    tensors = {"stem.0.weight": torch.ones(100, 100)}
    if suffix == ".pth":
        torch.save({"model": tensors}, path)
    else:
        write_checkpoint(path, Description(), tensors)
    content = {"missing": b"", "empty": b"", "text": b"404: not found\n" * 100, "truncated": path.read_bytes()[:-2000]}
    path.write_bytes(content[damage])
    if damage == "missing":
        path.unlink()
    overlay = {"file": str(path)}
    for use in (
        lambda: read_checkpoint(path),
        lambda: create_model("glnet_pico", checkpoint=path),
        lambda: timm.create_model("glnet_pico", pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert str(path) in message(error)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], {"model": "none"}], ids=["epoch", "list", "text"])
def test_a_file_without_weights_is_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in message(error)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path)
    assert str(tmp_path) in message(error)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", model=as_released(drawn("glnet_4g"), "glnet_4g"))
    foreign = save(tmp_path / "resnet.pth", model={"conv1.weight": torch.ones(64, 3, 7, 7)})
    wider = {**SMALL, "dims": (32, 64, 96, 160)}
    for file, variant, options in (
        (path, "glnet_stl", SMALL),
        (path, "glnet_16g", SMALL),
        (path, "glnet_4g", wider),
        (path, "glnet_4g", {}),
        (foreign, "glnet_4g", SMALL),
    ):
        with pytest.raises(UserError, match="another architecture") as error:
            create_model(variant, checkpoint=file, **options)
        assert str(file) in message(error)
        with pytest.raises(UserError, match="another architecture") as error:
            timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options)
        assert str(file) in message(error)


def test_our_file_says_which_architecture_it_holds(tmp_path: Path) -> None:
    tensors = drawn("glnet_4g").state_dict()
    path = write_checkpoint(tmp_path / "a.safetensors", Description(model="glnet_4g"), tensors)
    with pytest.raises(UserError, match="glnet_4g") as error:
        create_model("glnet_pico", checkpoint=path)
    assert str(path) in message(error)


@pytest.mark.parametrize("variant", ["glnet_4g", "glnet_4g_tklb"])
def test_other_number_of_classes(variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As everywhere in timm: the classifier (both of a token-labelled model) stays as drawn, all else is loaded."""
    model = drawn(variant)
    path = save(tmp_path / "a.pth", model=as_released(model, variant))
    overlay = {"file": str(path)}
    with caplog.at_level(logging.ERROR):
        loaded = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, **SMALL)
    assert logits(loaded).shape == (2, 10)
    assert torch.equal(loaded.forward_features(IMAGE), model.forward_features(IMAGE))
    assert loaded.head.fc.out_features == 10
    assert 0.01 < loaded.head.fc.weight.std() < 0.03
    assert not loaded.head.fc.bias.any()
    if "tklb" in variant:  # the head for places starts as PyTorch's linear layers do
        assert loaded.aux_head.out_features == 10
        assert 0.03 < loaded.aux_head.weight.std() < 0.07
    none = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **SMALL)
    assert torch.equal(logits(none), model.forward_head(model.forward_features(IMAGE), pre_logits=True))
    with pytest.raises(UserError, match="1000 classes") as error:
        create_model(variant, checkpoint=path, num_classes=10, **SMALL)
    assert str(path) in message(error)


@pytest.mark.parametrize("variant", ["glnet_4g", "glnet_stl"])
def test_gray_images(variant: str, tmp_path: Path) -> None:
    """One channel in place of three: the first convolution is summed, so gray gives what three equal channels give."""
    model = drawn(variant)
    path = save(tmp_path / "a.pth", model=as_released(model, variant))
    overlay = {"file": str(path)}
    loaded = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **SMALL)
    gray = IMAGE[:, :1]
    torch.testing.assert_close(logits(loaded, gray), logits(model, gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["glnet_stl", "glnet_9g", "glnet_4g_tklb"])
def test_published_weights_must_be_fetched_by_hand(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMIX_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError) as error:
        timm.create_model(variant, pretrained=True)
    text = message(error)
    assert PUBLISHED_PAGE in text
    assert str(tmp_path / "home" / f"{variant}.pth") in text


def test_default_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMIX_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="glnet_stl") as error:
        timm.create_model("glnet_stl", pretrained=True)
    assert str(tmp_path / "glmix" / "glnet_stl.pth") in message(error)


def test_a_variant_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMIX_HOME", str(tmp_path))
    with pytest.raises(UserError, match="pretrained=False") as error:
        timm.create_model("glnet_16g_tklb", pretrained=True)
    assert "glnet_16g_tklb" in message(error)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("stage", ["writing", "renaming"])
def test_a_failed_write_leaves_no_half_file(
    stage: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: None
) -> None:
    path = tmp_path / "best.safetensors"
    if existing:
        write_checkpoint(path, Description(info={"epoch": 1}), {"a": torch.ones(3)})
    before = path.read_bytes() if existing else b""

    def no_rename(*_: Any) -> None:
        raise OSError("Input/output error")

    if stage == "renaming":
        monkeypatch.setattr("os.replace", no_rename)
    size = 3 if stage == "renaming" else 100_000
    with pytest.raises(UserError, match="free space.*choose another place") as error:
        write_checkpoint(path, Description(info={"epoch": 2}), {"a": torch.zeros(size)})
    assert str(path) in message(error)
    assert (path.read_bytes() if path.exists() else b"") == before
    assert list(tmp_path.iterdir()) == ([path] if existing else [])


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    for path in (tmp_path / "taken" / "a.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot be written") as error:
            write_checkpoint(path, Description(), {"a": torch.ones(3)})
        assert str(path) in message(error)


def test_files_are_for_whom_the_umask_says(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path / "a.safetensors", Description(), {"a": torch.ones(3)})
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_strided_tensors_are_written(tmp_path: Path) -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    path = write_checkpoint(tmp_path / "a.safetensors", Description(), {"a": grid.T, "b": grid.to(torch.bfloat16)})
    read = read_checkpoint(path)[1]
    assert torch.equal(read["a"], grid.T)
    assert torch.equal(read["b"], grid.to(torch.bfloat16))
