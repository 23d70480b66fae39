"""`optimize_for_inference`: the same network, folded."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from glmix import optimize_for_inference, slot_maps
from glmix.models import backbone_of
from glmix.models.glnet import GLNet

SMALL: dict[str, Any] = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1), "num_classes": 7}
FAMILIES = ["glnet_pico", "glnet_stl", "glnet_stl_paramslot", "glnet_16g", "glnet_4g_tklb"]
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module) -> nn.Module:
    """`model` as if it had been trained: norms and scales that do something, slots that differ."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith(("weight", "gamma"))):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("scale"):
            tensor.fill_(10.0)
    return model.eval()


def small(variant: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(variant, **{**SMALL, **options}))


class Dense(nn.Module):
    """A head for places, on a backbone without its own."""

    def __init__(self, backbone: GLNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.prune_intermediate_layers([0, 2])
        self.mix = nn.Sequential(nn.Conv2d(32, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.back = nn.Sequential(nn.BatchNorm2d(96), nn.Conv2d(96, 8, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine, coarse = self.backbone.forward_intermediates(x, [0, 2], intermediates_only=True)
        return [self.mix(fine), self.back(coarse)]


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_outputs_are_the_same(variant: str) -> None:
    model = small(variant)
    folded = optimize_for_inference(model)
    for x in (IMAGE, torch.randn(1, 3, 97, 131), torch.randn(1, 3, 800, 640)):  # the last goes by rows
        torch.testing.assert_close(folded(x), model(x))
        torch.testing.assert_close(folded.forward_features(x), model.forward_features(x))
        torch.testing.assert_close(folded.forward_intermediates(x), model.forward_intermediates(x))
    for ours, theirs in zip(slot_maps(folded, IMAGE, True), slot_maps(model, IMAGE, True), strict=True):
        torch.testing.assert_close((ours.logits, ours.attention), (theirs.logits, theirs.attention))
        assert (ours.block, ours.stride, ours.slot_grid) == (theirs.block, theirs.stride, theirs.slot_grid)


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_stl_paramslot"])
@torch.no_grad()
def test_clustering_and_dispatching_as_attention(variant: str) -> None:
    model = small(variant)
    folded = optimize_for_inference(model, sdpa=True)
    for x in (IMAGE, torch.randn(1, 3, 97, 131)):
        torch.testing.assert_close(folded(x), model(x))
    for ours, theirs in zip(slot_maps(folded, IMAGE), slot_maps(model, IMAGE), strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(torch.jit.script(folded)(x), model(x))


@torch.no_grad()
def test_a_large_grid_is_never_there_as_a_whole() -> None:
    """Slots of the first stage, 200 x 160 places that go by rows, are those of all places at once."""
    model = small("glnet_pico", slot_scale=40.0)
    folded = optimize_for_inference(model)
    x, kept = torch.randn(2, 3, 800, 640), []
    for network in (model, folded):
        handle = network.stages[0].blocks[0].mixer.slot_attn.register_forward_hook(lambda _m, _i, out: kept.append(out))
        network.stages[0](network.stem(x))
        handle.remove()
    torch.testing.assert_close(kept[1], kept[0])


@torch.no_grad()
def test_what_a_hook_sees_stays_as_it_was() -> None:
    seen = []
    for network in (model := small("glnet_4g"), optimize_for_inference(model)):
        handle = network.stages[0].blocks[0].mixer.register_forward_hook(lambda _m, _i, out: seen.append(out))
        network(IMAGE)
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0])


def test_the_original_stays_as_it_was() -> None:
    model = small("glnet_16g").train()
    modes = [part.training for part in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = optimize_for_inference(model)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [part.training for part in model.modules()] == modes
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in folded.modules())
    model.zero_grad()
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_nothing_is_left_to_fold() -> None:
    folded = optimize_for_inference(small("glnet_16g"))
    kinds = {type(part).__name__ for stage in folded.stages for part in stage.modules()}
    assert not kinds & {"BatchNorm2d", "LayerScale"}
    torch.testing.assert_close(optimize_for_inference(folded)(IMAGE), folded(IMAGE))


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter"])
@torch.no_grad()
def test_feature_extractors(kind: str) -> None:
    model = small("glnet_stl", features_only=True, feature_cls=kind)
    wanted, given = model(IMAGE), optimize_for_inference(model)(IMAGE)
    torch.testing.assert_close(given, wanted)
    assert optimize_for_inference(model).feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_heads_with_a_backbone(variant: str) -> None:
    torch.manual_seed(0)
    head = lively(Dense(timm.create_model(variant, **SMALL)))
    folded = optimize_for_inference(head)
    torch.testing.assert_close(folded(IMAGE), head(IMAGE))
    assert isinstance(backbone_of(folded), GLNet)


def test_nothing_to_fold() -> None:
    with pytest.raises(ValueError, match="Linear holds no GLNet"):
        optimize_for_inference(nn.Linear(3, 3))


@pytest.mark.parametrize(("variant", "sdpa"), [("glnet_pico", False), ("glnet_pico", True), ("glnet_4g_tklb", False)])
@torch.no_grad()
def test_scripted_traced_and_exported(variant: str, sdpa: bool) -> None:
    model = small(variant)
    folded = optimize_for_inference(model, sdpa=sdpa)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    exported = torch.export.export(folded, (IMAGE,), dynamic_shapes=(free,)).module()
    for made in (torch.jit.script(folded), exported):
        for size in ((2, 64, 96), (3, 97, 131)):
            x = torch.randn(size[0], 3, *size[1:])
            torch.testing.assert_close(made(x), model(x))
    torch.testing.assert_close(torch.jit.trace(folded, IMAGE)(IMAGE), model(IMAGE))


@torch.no_grad()
def test_copies_dtypes_and_other_weights() -> None:
    """Whatever changes the weights changes what is computed."""
    model = small("glnet_pico")
    folded = optimize_for_inference(model)
    wanted = folded(IMAGE)
    for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(twin(IMAGE), wanted)
    half = copy.deepcopy(folded).bfloat16()
    torch.testing.assert_close(half(IMAGE.bfloat16()).float(), wanted, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(folded(IMAGE).float(), wanted, rtol=0.1, atol=0.1)
    torch.testing.assert_close(folded.double()(IMAGE.double()), model.double()(IMAGE.double()))
    other = optimize_for_inference(small("glnet_pico", slot_scale=3.0).requires_grad_(False))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
    other.load_state_dict(zeros)
    assert not other(IMAGE).any()


@torch.no_grad()
def test_another_classifier() -> None:
    folded = optimize_for_inference(small("glnet_4g_tklb"))
    folded.reset_classifier(3)
    torch.testing.assert_close(folded(IMAGE), folded.forward_head(folded.forward_features(IMAGE)))
    folded.reset_classifier(3, "max")
    torch.testing.assert_close(folded(IMAGE), folded.forward_head(folded.forward_features(IMAGE)))


def test_the_image_can_have_a_gradient() -> None:
    model = small("glnet_4g")
    gradients = []
    for network in (model, optimize_for_inference(model)):
        x = IMAGE.clone().requires_grad_()
        network(x)[:, 1].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"integration": "local-global"},
        {"integration": "global-local", "slot_residual": True},
        {"integration": "pixels"},
        {"integration": "local"},
        {"integration": "global"},
        {"assignment": "hard", "rounds": 2},
        {"assignment": "static"},
        {"slot_attention": False},
        {"kernel_size": 0, "seeds_from": "normed"},
        {"slot_gate": 0.5},
        {"slot_gate": 0.5, "slot_residual": True},
        {"slot_gate": 0.5, "slot_attention": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_rows_of_the_ablations(options: dict[str, Any]) -> None:
    model = small("glnet_16g", **options)
    torch.testing.assert_close(optimize_for_inference(model)(IMAGE), model(IMAGE))
