"""What holds for any image size, slot grid, precision and way of running, and what the slots say."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glmix.models.glnet import GLNet
from glmix.models.slot_maps import SlotMaps, slot_maps
from glmix.models.slots import averaging_matrix, cluster, dispatch, pool_seeds, similarity

SMALL: dict[str, Any] = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1), "num_classes": 10}
KINDS = ["glnet_pico", "glnet_stl", "glnet_4g"]
PRECISIONS = ["float32", "bfloat16", "float16", "autocast"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.float32}
SIZES = [(32, 32), (33, 47), (97, 131), (32, 200), (200, 32), (64, 64), (160, 96)]


def small(variant: str, **options: Any) -> GLNet:
    torch.manual_seed(0)
    return timm.create_model(variant, **{**SMALL, **options})


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def finite_step(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """One forward and backward pass, all of it finite; returns the logits."""
    model.to(DTYPES[precision]).zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = model(x.to(DTYPES[precision]))
    assert logits.isfinite().all()
    logits.float().logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return logits.detach()


# --- image sizes and slot grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", KINDS)
def test_any_image_size(variant: str, size: tuple[int, int]) -> None:
    """From 32 px; stages with fewer pixels than slots too."""
    model = small(variant).train()
    x = images(2, 3, *size)
    finite_step(model, x, "float32")
    model.eval()
    stages = model.forward_intermediates(x, intermediates_only=True)
    for info, stage in zip(model.feature_info, stages, strict=True):
        for extent, side in zip(size, stage.shape[2:], strict=True):
            # patches that do not overlap leave out what is over; convolutions that overlap round up
            expected = extent // info["reduction"] if variant == "glnet_stl" else -(-extent // info["reduction"])
            assert side == expected


@settings(max_examples=15, deadline=None)
@given(height=st.integers(32, 140), width=st.integers(32, 140), slot_h=st.integers(1, 12), slot_w=st.integers(1, 12))
def test_any_size_and_grid_together(height: int, width: int, slot_h: int, slot_w: int) -> None:
    model = small("glnet_pico", slot_grid=(slot_h, slot_w)).eval()
    x = images(1, 3, height, width)
    with torch.no_grad():
        assert model(x).isfinite().all()
    for maps in slot_maps(model, x):
        assert maps.logits.shape[1] == slot_h * slot_w
        assert maps.slot_grid == (slot_h, slot_w)
        # equal up to the matrix product's rounding: a softmax sums to one
        torch.testing.assert_close(maps.assignment.sum(1), torch.ones_like(maps.logits[:, 0]))
        torch.testing.assert_close(maps.clustering.sum((2, 3)), torch.ones_like(maps.logits[:, :, 0, 0]))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 9), (40, 40)])
@pytest.mark.parametrize("variant", KINDS)
def test_any_slot_grid(variant: str, grid: tuple[int, int]) -> None:
    """Set when building or afterwards, the same; more slots than the 16 x 16 pixels of the first stage too."""
    built, changed = small(variant, slot_grid=grid).eval(), small(variant).eval()
    before = sum(p.numel() for p in changed.parameters())
    changed.set_slot_grid(grid)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built(x), changed(x))
    assert sum(p.numel() for p in changed.parameters()) == before
    assert {maps.logits.shape[1] for maps in slot_maps(changed, x)} == {grid[0] * grid[1]}
    finite_step(changed.train(), x, "float32")


def test_slot_grids_that_cannot_be() -> None:
    for grid in ((0, 8), (8, 0), (-1, 3)):
        with pytest.raises(ValueError, match="at least 1 row"):
            small("glnet_pico").set_slot_grid(grid)
    for grid in ((1000, 1000), (65, 64), (1, 4097)):
        for use in (
            lambda g=grid: small("glnet_pico").set_slot_grid(g),
            lambda g=grid: small("glnet_pico", slot_grid=g),
        ):
            with pytest.raises(ValueError, match="4096 slots"):
                use()
    small("glnet_pico").set_slot_grid((64, 64))
    unchanged = small("glnet_pico", slot_grid=(3, 3))
    with pytest.raises(ValueError, match="4096"):
        unchanged.set_slot_grid((100, 100))
    assert {maps.slot_grid for maps in slot_maps(unchanged, images(1, 3, 64, 64))} == {(3, 3)}
    learned = small("glnet_stl_paramslot")
    with pytest.raises(ValueError, match="learned"):
        learned.set_slot_grid((4, 4))
    assert {(maps.slots, maps.slot_grid) for maps in slot_maps(learned, images(1, 3, 64, 64))} == {(64, None)}


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("variant", KINDS)
@torch.no_grad()
def test_strides_are_as_told(variant: str, stride: int) -> None:
    model = small(variant, stem_stride=stride).eval()
    x = images(1, 3, 64, 128)
    stages = model.forward_intermediates(x, intermediates_only=True)
    for i, (info, stage) in enumerate(zip(model.feature_info, stages, strict=True)):
        assert info["reduction"] == stride * 2**i
        assert tuple(stage.shape) == (1, info["num_chs"], 64 // info["reduction"], 128 // info["reduction"])
        assert info["module"] == f"stages.{i}"
    for maps in slot_maps(model, x):
        assert tuple(maps.logits.shape[2:]) == (64 // maps.stride, 128 // maps.stride)
    small_maps = slot_maps(model, images(1, 3, 33, 47))  # where the grid's size alone does not tell the stride
    assert [maps.stride for maps in small_maps] == [maps.stride for maps in slot_maps(model, x)]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stem_stride": 3}, "stem_stride"),
        ({"mixers": ("glmix", "conv", "glmix", "attention")}, "conv"),
        ({"dims": (40, 64, 96, 128)}, "multiple"),
        ({"seeds": "drawn"}, "'pooled' or 'learned', not 'drawn'"),
        ({"slot_grid": (0, 3)}, "at least 1 row"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        small("glnet_4g", **options)


@pytest.mark.parametrize("slots", [1, 7, 50])
@pytest.mark.parametrize("variant", KINDS)
def test_any_number_of_learned_slots(variant: str, slots: int) -> None:
    """Rows and columns are of pooled seeds alone: another strategy has as many slots as it likes."""
    model = small(variant, seeds="learned", slot_grid=(1, slots))
    x = images(2, 3, 64, 64)
    maps = slot_maps(model, x, attention=True)
    assert {(m.slots, m.slot_grid, tuple(m.attention.shape[2:])) for m in maps} == {(slots, None, (slots, slots))}
    finite_step(model.train(), x, "float32")


# --- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), slot_h=st.integers(1, 12), slot_w=st.integers(1, 12))
def test_pooled_seeds_are_adaptive_pooling(height: int, width: int, slot_h: int, slot_w: int) -> None:
    x = images(2, 5, height, width).double()
    ours = pool_seeds(x.permute(0, 2, 3, 1), slot_h, slot_w)
    expected = F.adaptive_avg_pool2d(x, (slot_h, slot_w)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    rows = averaging_matrix(height, slot_h, x)
    torch.testing.assert_close(rows.sum(1), torch.ones(slot_h, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(slots=st.integers(1, 20), pixels=st.integers(1, 50), scale=st.floats(0, 100, allow_subnormal=False))
def test_weights_are_means(slots: int, pixels: int, scale: float) -> None:
    """Clustering and dispatching average: what is equal everywhere stays as it is, and nothing leaves the range."""
    x, seeds = images(2, pixels, 8).double(), images(1, slots, 8).double()
    logits = similarity(seeds, x, torch.tensor(scale, dtype=torch.float64))
    assert logits.shape == (2, slots, pixels)
    assert logits.abs().max() <= scale * (1 + 1e-12)
    constant = torch.ones(2, pixels, 1, dtype=torch.float64)
    torch.testing.assert_close(cluster(logits, constant), torch.ones(2, slots, 1, dtype=torch.float64))
    torch.testing.assert_close(dispatch(logits, constant[:, :1].expand(-1, slots, -1)), constant)
    for mixed in (cluster(logits, x), dispatch(logits, cluster(logits, x))):
        assert mixed.amax() <= x.amax() + 1e-12
        assert mixed.amin() >= x.amin() - 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats_follow_float32(dtype: torch.dtype) -> None:
    """Lengths and softmaxes of large features do not overflow."""
    x, seeds = 3000 * images(1, 400, 64), 3000 * images(1, 16, 64)  # squared lengths are far above 65504
    logits = similarity(seeds.to(dtype), x.to(dtype), torch.tensor(20.0, dtype=dtype))
    torch.testing.assert_close(logits.float(), similarity(seeds, x, torch.tensor(20.0)), rtol=0.05, atol=0.2)
    slots = cluster(logits, x.to(dtype))
    assert slots.dtype == dtype
    assert slots.isfinite().all()
    assert dispatch(logits, slots).isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", KINDS)
def test_images_without_content(variant: str, training: bool, precision: str) -> None:
    """All pixels equal, or zero: no direction, no variance. Outputs and gradients stay finite."""
    model = small(variant).train(training)
    for value in (0.0, 1.0, -2.5):
        finite_step(model, torch.full((2, 3, 64, 64), value), precision)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("variant", KINDS)
def test_reduced_precision_is_near(variant: str, precision: str) -> None:
    x = images(2, 3, 64, 96)
    exact = finite_step(small(variant).eval(), x, "float32")
    near = finite_step(small(variant).eval(), x, precision).float()
    assert (near - exact).norm() < 0.05 * exact.norm()


def test_one_image_at_a_time_is_the_same() -> None:
    model = small("glnet_pico").eval()
    x = images(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x))


# --- ways of running -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", KINDS)
def test_compiles_as_one_graph(variant: str) -> None:
    torch._dynamo.reset()
    model = small(variant, depths=(1, 1, 1, 1)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_compiled_numbers() -> None:
    torch._dynamo.reset()
    model = small("glnet_pico", depths=(1, 1, 1, 1)).eval()
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_stl"])
@torch.no_grad()
def test_exports_with_free_sizes(variant: str) -> None:
    """Number of images, height and width may be other ones than at export, odd ones too.

    Sides are from 64 px: PyTorch takes a grid of one row, as the last stage may have below, for a case of its own.
    """
    model = small(variant, depths=(1, 1, 1, 1)).eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=64), 3: torch.export.Dim("width", min=64)}
    program = torch.export.export(model, (images(2, 3, 96, 128),), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 3, 64, 96), (1, 3, 128, 64), (3, 3, 97, 131)):
        x = images(*shape)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


# --- looking at the slots --------------------------------------------------------------------------------------------


def check(maps: list[SlotMaps], blocks: list[str]) -> None:
    assert [m.block for m in maps] == blocks
    for m in maps:
        assert m.logits.dtype == torch.float32
        torch.testing.assert_close(m.assignment.sum(1), torch.ones_like(m.logits[:, 0]))
        torch.testing.assert_close(m.clustering.sum((2, 3)), torch.ones_like(m.logits[:, :, 0, 0]))
        for kind in ("assignment", "clustering"):
            entropy = m.entropy(kind)
            assert entropy.shape == (m.logits.shape[0],)
            assert ((entropy > 0) & (entropy <= 1 + 1e-5)).all()
        if m.attention is not None:
            slots = m.logits.shape[1]
            assert m.attention.shape[2:] == (slots, slots)
            torch.testing.assert_close(m.attention.sum(3), torch.ones_like(m.attention[..., 0]), rtol=1e-4, atol=1e-4)


def slots_with(weights: list[float], places: bool = False) -> SlotMaps:
    """One block's maps of which the softmax over slots (or over `places`) is `weights` everywhere."""
    logits = torch.tensor(weights).log() + 3
    logits = logits.expand(2, 5, -1).unflatten(2, (1, -1)) if places else logits[:, None, None].expand(2, -1, 3, 4)
    return SlotMaps("a", 4, logits, None)


@pytest.mark.parametrize(("kind", "places"), [("assignment", False), ("clustering", True)])
@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([0.5, 0.25, 0.125, 0.125], 7 / 8),  # 1.75 of 2 bits
        ([0.5, 0.25, 0.25], 1.5 / math.log2(3)),
        ([0.2] * 5, 1.0),
        ([1.0, 1e-30], 0.0),
    ],
)
def test_entropy_of_known_weights(kind: str, places: bool, weights: list[float], share: float) -> None:
    """In shares of the largest value, that of equal weights: log(n)."""
    maps = slots_with(weights, places)
    torch.testing.assert_close(maps.entropy(kind), torch.full((2,), share), rtol=1e-5, atol=1e-6)
    assert maps.slots == (5 if places else len(weights))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


PICO_BLOCKS = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_stl", "glnet_stl_paramslot", "glnet_4g_tklb"])
def test_slot_maps_leave_the_model_as_it_was(variant: str) -> None:
    model = small(variant).train()
    model.stages[0].eval()  # a mixed state is kept too
    x = images(2, 3, 64, 96)
    model(x).sum().backward()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    maps = slot_maps(model, x, attention=True)
    blocks = PICO_BLOCKS if "stl" in variant or variant == "glnet_pico" else PICO_BLOCKS[:3]
    check(maps, blocks)
    assert all(m.attention is not None for m in maps)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # running statistics too
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert hooks(model) == 0
    assert not any(m.logits.requires_grad for m in maps)
    model.eval()
    with torch.no_grad():
        before = model(x)
        assert all(m.attention is None for m in slot_maps(model, x))
        assert torch.equal(model(x), before)


def test_slot_maps_of_a_pass_that_fails() -> None:
    model = small("glnet_pico").train()
    with pytest.raises(RuntimeError):
        slot_maps(model, images(2, 5, 64, 64), attention=True)
    assert model.training
    assert hooks(model) == 0


def test_slot_maps_show_what_the_model_does() -> None:
    """Dispatching the slots by the maps gives what the block adds; so do the attention's weights for the slots."""
    model = small("glnet_4g").eval()
    mixer = model.slot_mixers()["stages.0.blocks.0"]
    inside: dict[str, Tensor] = {}
    handles = [
        mixer.slot_attn.register_forward_hook(lambda _m, args, out: inside.update(slots=args[0], mixed=out)),
        mixer.norm.register_forward_hook(lambda _m, _args, out: inside.update(normed=out)),
    ]
    maps = slot_maps(model, images(2, 3, 64, 64), attention=True)[0]
    for handle in handles:
        handle.remove()
    pixels = inside["normed"].flatten(1, 2)
    torch.testing.assert_close(maps.clustering.flatten(2) @ pixels, inside["slots"], rtol=1e-4, atol=1e-5)
    values = mixer.slot_attn.project(inside["slots"])[2]
    mixed = mixer.slot_attn.proj((maps.attention @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, inside["mixed"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slot_maps_of_a_half_model(dtype: torch.dtype) -> None:
    model = small("glnet_pico").to(dtype)
    check(slot_maps(model, images(2, 3, 64, 64), attention=True), PICO_BLOCKS)


def test_slot_maps_of_a_double_model() -> None:
    maps = slot_maps(small("glnet_pico").double(), images(2, 3, 64, 64), attention=True)[0]
    assert maps.logits.dtype == maps.attention.dtype == torch.float64


def test_slot_maps_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = small("glnet_pico").eval()
    compiled = torch.compile(model, backend="eager")
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = compiled(x)
        maps = slot_maps(compiled, x)
        check(maps, PICO_BLOCKS)
        torch.testing.assert_close(compiled(x), before)
    for ours, plain in zip(maps, slot_maps(model, x), strict=True):
        torch.testing.assert_close(ours.logits, plain.logits)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_slot_maps_of_a_feature_extractor(feature_cls: str) -> None:
    options = {"features_only": True, "feature_cls": feature_cls, "num_classes": 0}
    x = images(2, 3, 64, 64)
    plain = slot_maps(small("glnet_pico", num_classes=0), x)
    wrapped = slot_maps(small("glnet_pico", **options), x)
    assert [m.block.removeprefix("model.").replace("stages_", "stages.") for m in wrapped] == PICO_BLOCKS
    for ours, expected in zip(wrapped, plain, strict=True):
        torch.testing.assert_close(ours.logits, expected.logits)
    shallow = slot_maps(small("glnet_pico", **options, out_indices=(0, 1)), x)
    assert len(shallow) == 2


def test_slot_maps_of_a_wrapped_model() -> None:
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"net": small("glnet_pico")})["net"])
    check(slot_maps(model, images(1, 3, 64, 64)), [f"1.{block}" for block in PICO_BLOCKS])


def test_a_model_without_slots() -> None:
    for model in (nn.Conv2d(3, 8, 3), small("glnet_4g", mixers=("attention",) * 4)):
        with pytest.raises(ValueError, match="no GLMix blocks"):
            slot_maps(model, images(1, 3, 64, 64))
