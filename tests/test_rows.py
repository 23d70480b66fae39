"""The options that the paper's studies take apart: what each of them computes."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from glmix.models.glnet import GLMix
from glmix.models.slot_maps import slot_maps
from glmix.models.slots import pool_seeds

TINY = {"dims": (32, 32, 32, 32), "depths": (1, 1, 2, 1), "num_classes": 5, "slot_grid": (2, 3)}
X = torch.randn(2, 8, 9, 32, generator=torch.Generator().manual_seed(1))
ENTERING = torch.randn(2, 8, 9, 32, generator=torch.Generator().manual_seed(2))


def mixer(**options: Any) -> GLMix:
    torch.manual_seed(0)
    return GLMix(32, **{"slot_grid": (2, 3), "slot_scale": 20.0} | options).eval()


def alike(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_integration(residual: bool):
    """The branches of the default, put together in other ways."""
    default = mixer(slot_residual=residual)
    normed = F.layer_norm(X, (32,), eps=1e-6)
    both = default(X, ENTERING)
    locally = default.local(normed)
    globally = both - locally

    def built(integration: str) -> GLMix:
        model = mixer(slot_residual=residual, integration=integration)
        model.load_state_dict({k: v for k, v in default.state_dict().items() if k in model.state_dict()})
        return model

    assert alike(built("parallel")(X, ENTERING), both)
    assert alike(built("local")(X, ENTERING), locally)
    assert alike(built("global")(X, ENTERING), globally)
    assert alike(built("global-local")(X, ENTERING), globally + default.local(normed + globally))
    after = built("local-global")
    assert alike(after(X, ENTERING), locally + after.globally(normed + locally, ENTERING))
    pixels = built("pixels")
    q, k, v = default.slot_attn.qkv(normed.reshape(2, 72, 32)).chunk(3, -1)  # one head of 32 channels
    mixed = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v
    assert alike(pixels(X, ENTERING), default.slot_attn.proj(mixed).reshape(X.shape) + locally)


@torch.no_grad()
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_k_means(rounds: int):
    """Each pixel has the content of the one slot that it is nearest to, the mean of its pixels; worked out by hand."""
    model = mixer(assignment="hard", rounds=rounds, slot_attention=False)
    normed = F.layer_norm(X, (32,), eps=1e-6).reshape(2, 72, 32)
    seeds = pool_seeds(ENTERING, 2, 3)
    expected = torch.zeros_like(normed)
    for image in range(2):
        centres = seeds[image]
        for _ in range(rounds):
            nearest = (F.normalize(normed[image], dim=1) @ F.normalize(centres, dim=1).T).argmax(1)
            means = [normed[image][nearest == m] for m in range(6)]
            centres = torch.stack([of.mean(0) if len(of) else normed[image].mean(0) for of in means])
        expected[image] = centres[nearest]
    assert alike(model.globally(normed.reshape(X.shape), ENTERING).reshape(2, 72, 32), expected)


@torch.no_grad()
def test_static_patches():
    """Slots are the means of squares, and each square gets its own back."""
    x = torch.randn(2, 8, 9, 32)
    model = mixer(assignment="static", slot_attention=False)
    normed = F.layer_norm(x, (32,), eps=1e-6)
    means = F.adaptive_avg_pool2d(normed.permute(0, 3, 1, 2), (2, 3))
    expected = F.interpolate(means, (8, 9), mode="nearest").permute(0, 2, 3, 1)
    assert alike(model.globally(normed, ENTERING), expected)


@torch.no_grad()
def test_seeds_after_the_norm():
    a, b = mixer(seeds_from="normed"), mixer()
    normed = a.norm(X)
    assert alike(a(X, ENTERING), b(X, normed))
    assert not alike(a(X, ENTERING), b(X, ENTERING))


@torch.no_grad()
def test_no_kernel_and_no_attention():
    model = mixer(kernel_size=0, slot_attention=False, integration="local")
    first, _, last = model.local
    assert alike(model(X, ENTERING), last(first(model.norm(X))))
    assert not list(mixer(slot_attention=False).slot_attn.parameters())


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_a_gate_on_what_slots_give(residual: bool):
    """At 0 the block is its local branch; else each channel of the global one has its factor."""
    plain, gated = mixer(slot_residual=residual), mixer(slot_residual=residual, slot_gate=0.0)
    assert not gated.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    normed = plain.norm(X)
    assert alike(gated(X, ENTERING), plain.local(normed))
    gated.slot_gate.gamma.copy_(torch.linspace(-1, 2, 32))
    assert alike(gated.globally(normed, ENTERING), plain.globally(normed, ENTERING) * torch.linspace(-1, 2, 32))


def test_gated_slots_learn_from_the_first_steps():
    model = mixer(slot_gate=0.0)
    model(X, ENTERING).square().sum().backward()
    assert model.slot_gate.gamma.grad is not None and model.slot_gate.gamma.grad.abs().min() > 0


ROWS = [
    {"integration": kind} for kind in ("local", "global", "local-global", "global-local", "pixels")
] + [
    {"assignment": "hard", "rounds": 2}, {"assignment": "static"}, {"seeds": "learned"}, {"seeds_from": "normed"},
    {"kernel_size": 0}, {"kernel_size": 9}, {"slot_attention": False, "slot_residual": True}, {"slot_gate": 0.1},
    {"overlap": False, "overlap_stem": True}, {"overlap": False, "pos_conv": True, "mlp_conv": True},
    {"overlap_transitions": False}, {"mixers": ("glmix", "local", "glmix", "attention")},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_network_of_each_row(row: dict[str, Any]):
    """It learns (every parameter has a gradient, but for the scale of what has none), and its slots can be looked at."""
    model = timm.create_model("glnet_4g", **TINY | row)
    images = torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    hard = row.get("assignment", "soft") != "soft"
    assert without == {f"{name}.mixer.similarity.scale" for name in model.slot_mixers() if hard}
    if row.get("integration") in ("local", "pixels"):
        with pytest.raises(ValueError, match="no GLMix blocks"):
            slot_maps(model, images)
        return
    maps = slot_maps(model, images, attention=True)
    assert [m.block for m in maps] == list(model.slot_mixers())
    for found in maps:
        assignment = found.assignment
        assert torch.allclose(assignment.sum(1), torch.ones_like(assignment[:, 0]), atol=1e-5)
        if hard:
            assert set(assignment.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"integration": "both"}, "integration: 'parallel' or 'local'"),
        ({"assignment": "k-means"}, "assignment: 'soft' or 'hard' or 'static'"),
        ({"seeds": "random"}, "seeds: 'pooled' or 'learned'"),
        ({"seeds_from": "x"}, "seeds_from: 'entering' or 'normed'"),
        ({"rounds": 2}, "for the assignment 'hard' alone"),
        ({"assignment": "static", "seeds": "learned"}, "slot grid, with seeds 'pooled'"),
        ({"kernel_size": 4}, "odd, or 0"),
        ({"mixers": ("glmix", "global", "glmix", "attention")}, "mixers: 'glmix' or 'attention'"),
    ],
)
def test_mistakes(row: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        timm.create_model("glnet_4g", **TINY | row)
