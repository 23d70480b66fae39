"""GLNet: the backbone of "Revisiting the Integration of Convolution and Attention for Vision Backbone" (NeurIPS 2024).

One file holds the network and all its variants. Importing it registers them in timm.

Shapes: B images, H x W grid, N = H*W pixels, M slots, C channels. Between modules of the network features are
(B, C, H, W), as timm's contract wants; inside a stage they are held channels-last, `x_BHWC`, where a 1x1 convolution
is a linear layer and LayerNorm needs no permutation.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from glmix.errors import UserError
from glmix.models.description import renamed_options
from glmix.models.merging import SeedMerging
from glmix.models.seeds import SEEDS, checked_grid
from glmix.models.slots import at_least_float32, cluster, dispatch, fixed_patches, hardened, similarity
from glmix.models.weights import SHIPPED_FOLDER, count_classes, find_weights, fit_state_dict, read_checkpoint

# torchvision's tracer keeps these whole, as timm's does: they ask for dtypes, which a trace does not know
for _name in ("similarity", "cluster", "dispatch", "fixed_patches"):
    torch.fx.wrap(_name)

INTEGRATIONS = ("parallel", "local", "global", "local-global", "global-local", "pixels")
HEAD_DIM = 32  # channels of an attention head, in every variant
NO_SLOTS = "this network was built without slots"


class Attention(nn.Module):
    """Multi-head self-attention heads of 32 channels, among all places of (B, N, C) or (B, H, W, C)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"width {dim} is no multiple of the {HEAD_DIM} channels of an attention head")
        self.num_heads, self.head_dim = dim // HEAD_DIM, HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        init_linear(self.proj)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (3, B, heads, N, 32)."""
        return self.qkv(x).reshape(x.shape[0], -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, log_size_BN: Tensor | None = None) -> Tensor:
        """`log_size_BN`: of places that stand for several equal ones, the logarithm of how many."""
        q, k, v = self.project(x).unbind(0)
        bias = None if log_size_BN is None else log_size_BN.to(q.dtype).unsqueeze(1).unsqueeze(2)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(x.shape))


class NoAttention(nn.Identity):
    """In place of `Attention`, where slots do not attend to each other."""

    def forward(self, x: Tensor, log_size_BN: Tensor | None = None) -> Tensor:
        return x


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a channels-last grid (B, H, W, C), size kept; `residual` adds its input."""

    def __init__(self, dim: int, kernel_size: int, residual: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)
        self.residual = residual

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y = self._conv_forward(x_BHWC.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)
        return x_BHWC + y if self.residual else y


class LayerScale(nn.Module):
    """A learned factor per channel, `init` at first."""

    def __init__(self, dim: int, init: float, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def check_choice(option: str, value: Any, known: Iterable[str]) -> None:
    """Raise a ValueError that names those there are, if an option's value is none of the `known`."""
    if value not in known:
        raise ValueError(f"{option}: {' or '.join(map(repr, known))}, not {value!r}")


class SlotSimilarity(nn.Module):
    """Similarity logits (B, M, N) of seeds and pixels, with the learned scale. `glmix.slot_maps` listens here."""

    def __init__(self, scale: float, device=None, dtype=None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), scale, device=device, dtype=dtype))

    def forward(self, seeds_BMC: Tensor, x_BNC: Tensor) -> Tensor:
        return similarity(seeds_BMC, x_BNC, self.scale)


class KMeans(SlotSimilarity):
    """Logits of an assignment that is all or nothing, by `rounds` of k-means from the seeds (paper, ablation).

    No gradient goes through the choice, so the scale never moves.
    """

    def __init__(self, scale: float, rounds: int, device=None, dtype=None) -> None:
        super().__init__(scale, device, dtype)
        self.rounds = rounds

    def forward(self, seeds_BMC: Tensor, x_BNC: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BMN = hardened(similarity(seeds_BMC, x_BNC, self.scale))
            for _ in range(self.rounds - 1):
                means_BMC = cluster(logits_BMN, x_BNC)
                logits_BMN = hardened(similarity(means_BMC, x_BNC, self.scale))
        return logits_BMN


class GLMix(nn.Module):
    """The paper's mixer: attention among slots for the global view, depthwise convolution for the local one.

    The options behind the `*` are those of the block, and stand here alone: `GLNet` hands them on.

    Args:
        dim: channels.
        stride: pixels of the image per place of the grid, for `glmix.slot_maps` to tell.
        seeds: where slots begin: 'pooled' from a grid, or 'learned' (variant `paramslot`).
        slot_grid: rows and columns of the pooled seeds; of learned ones, their product is the number.
        slot_scale: first value of the learned similarity scale; None for the reference's dim ** -0.5.
        slot_residual: LayerNorm before and a residual around the slot attention, and a linear layer of the attended
            slots. Not in the paper: short trainings need it for slots that carry information.
        kernel_size: of the local depthwise convolution; 0 for none.

    These are the rows of the paper's ablations, and stand where the published variants do not have them:

        integration: 'parallel'; 'local' or 'global', one branch alone; 'local-global' or 'global-local', one after the
            other, the second of which sees what the first adds; 'pixels', the convolution beside attention among all
            pixels, without slots (as ACmix).
        assignment: 'soft'; 'hard', k-means of so many `rounds`; 'static', fixed patches of the slot grid.
        rounds: of k-means.
        seeds_from: where seeds are pooled, from what enters the block ('entering') or after the norm ('normed').
        slot_attention: whether slots attend to each other.
        slot_gate: first value of a learned factor of each channel of what slots give back, None for none. From 0 on, a
            network begins as if it had no slots, and takes from them what it can use (as ReZero does with residuals).

    Raises:
        ValueError: a value that these do not have, or a slot grid without places or with too many.
    """

    def __init__(
        self,
        dim: int,
        stride: int = 1,
        device=None,
        dtype=None,
        *,
        seeds: str = "pooled",
        slot_grid: tuple[int, int] = (8, 8),
        slot_scale: float | None = None,
        slot_residual: bool = False,
        kernel_size: int = 5,
        integration: str = "parallel",
        assignment: str = "soft",
        rounds: int = 1,
        seeds_from: str = "entering",
        slot_attention: bool = True,
        slot_gate: float | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("seeds", seeds, SEEDS)
        check_choice("integration", integration, INTEGRATIONS)
        check_choice("assignment", assignment, ("soft", "hard", "static"))
        check_choice("seeds_from", seeds_from, ("entering", "normed"))
        if rounds < 1 or (rounds > 1 and assignment != "hard"):
            raise ValueError(f"rounds {rounds}: at least 1, and more than that for the assignment 'hard' alone")
        if assignment == "static" and seeds != "pooled":
            raise ValueError("the assignment 'static' is to the places of the slot grid, with seeds 'pooled'")
        if kernel_size < 0 or (kernel_size % 2 == 0 and kernel_size):
            raise ValueError(f"kernel_size is odd, or 0 for no convolution, not {kernel_size}")
        self.stride = stride
        self.integration, self.assignment, self.seeds_from = integration, assignment, seeds_from
        self.slot_residual = slot_residual
        self.raised_scale = slot_scale is not None
        self.has_slots = integration not in ("local", "pixels")
        if self.has_slots:
            self.seeds = SEEDS[seeds](dim, slot_grid, **dd)
        self.merging: SeedMerging | None = None  # see `GLNet.set_slot_merging`
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        if self.has_slots:
            scale = dim**-0.5 if slot_scale is None else slot_scale
            self.similarity = SlotSimilarity(scale, **dd) if assignment == "soft" else KMeans(scale, rounds, **dd)
        self.slot_norm = nn.LayerNorm(dim, eps=1e-6, **dd) if slot_residual and self.has_slots else nn.Identity()
        self.slot_attn: nn.Module = NoAttention()
        if slot_attention and integration != "local":
            self.slot_attn = Attention(dim, **dd)
        self.slot_proj: nn.Module = nn.Identity()
        if slot_residual and self.has_slots:
            self.slot_proj = init_linear(nn.Linear(dim, dim, **dd))
        self.slot_gate: nn.Module = nn.Identity()
        if slot_gate is not None and self.has_slots:
            self.slot_gate = LayerScale(dim, slot_gate, **dd)
        self.local: nn.Module = nn.Identity()
        if integration != "global":
            conv = DepthwiseConv(dim, kernel_size, **dd) if kernel_size else nn.Identity()
            self.local = nn.Sequential(nn.Linear(dim, dim, **dd), conv, nn.Linear(dim, dim, **dd))

    def attend(self, slots_BMC: Tensor, log_size_BM: Tensor | None = None) -> Tensor:
        """Attention among the slots, (B, M, C) to (B, M, C); with log sizes of slots that stand for several.

        Linear layer and gate stand here: behind dispatching, whose weights sum to 1, they would do the same to every
        pixel.
        """
        mixed = self.slot_attn(self.slot_norm(slots_BMC), log_size_BM)
        return self.slot_gate(self.slot_proj(slots_BMC + mixed) if self.slot_residual else mixed)

    def gather(self, normed_BHWC: Tensor, entering_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (B, M, N) of slots and pixels, and the slots (B, M, C) after their attention."""
        normed_BNC = normed_BHWC.flatten(1, 2)
        # as in the reference, seeds are pooled from what enters the block, and compared with pixels after the norm
        seeds_BMC = self.seeds(entering_BHWC if self.seeds_from == "entering" else normed_BHWC)
        if self.merging is not None:
            return self.gather_merged(seeds_BMC, normed_BNC)
        grid = self.seeds.slot_grid
        if grid is not None and self.assignment == "static":  # in this order, for TorchScript: learned seeds have none
            patches_BMM, places_BNM = fixed_patches(normed_BHWC, grid)
            logits_BMN = self.similarity(patches_BMM, places_BNM)
        else:
            logits_BMN = self.similarity(seeds_BMC, normed_BNC)
        return logits_BMN, self.attend(cluster(logits_BMN, normed_BNC))

    @torch.jit.unused
    def gather_merged(self, seeds_BMC: Tensor, normed_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """As `gather`, of seeds that are merged where they are alike; similarities hold the slots' log sizes.

        To clustering, a softmax over pixels, what is the same for all of a slot's similarities makes no difference.
        """
        assert self.merging is not None
        seeds_BMC, log_size_BM = self.merging(seeds_BMC)
        logits_BMN = self.similarity(seeds_BMC, normed_BNC)
        slots_BMC = self.attend(cluster(logits_BMN, normed_BNC), log_size_BM)
        return at_least_float32(logits_BMN) + log_size_BM.unsqueeze(2), slots_BMC

    def globally(self, normed_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        """The global branch: clustering, attention among slots, dispatching."""
        if not self.has_slots:
            return self.slot_attn(normed_BHWC)
        logits_BMN, slots_BMC = self.gather(normed_BHWC, entering_BHWC)
        return dispatch(logits_BMN, slots_BMC).reshape(normed_BHWC.shape)

    def forward(self, x_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        normed_BHWC = self.norm(x_BHWC)
        if self.integration == "parallel" or self.integration == "pixels":
            return self.globally(normed_BHWC, entering_BHWC) + self.local(normed_BHWC)
        if self.integration == "local-global":
            locally_BHWC = self.local(normed_BHWC)
            return locally_BHWC + self.globally(normed_BHWC + locally_BHWC, entering_BHWC)
        if self.integration == "global-local":
            globally_BHWC = self.globally(normed_BHWC, entering_BHWC)
            return globally_BHWC + self.local(normed_BHWC + globally_BHWC)
        return self.local(normed_BHWC) if self.integration == "local" else self.globally(normed_BHWC, entering_BHWC)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Learned seeds were a parameter of the block itself when older resume points were written."""
        if f"{prefix}seeds" in state_dict:
            state_dict[f"{prefix}seeds.values"] = state_dict.pop(f"{prefix}seeds")
        super()._load_from_state_dict(state_dict, prefix, *args)


GLMIX_OPTIONS = frozenset(
    name for name, p in inspect.signature(GLMix).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
)


class _LinearOfGELU(torch.autograd.Function):
    """`F.linear(F.gelu(x), weight, bias)` that keeps `x` alone for the backward pass, and has GELU once more there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (out,) = gradients
        rows = out.flatten(0, -2)
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            torch.ops.aten.gelu_backward(torch.matmul(out, weight), x) if to_x else None,
            torch.matmul(rows.t(), F.gelu(x).flatten(0, -2)) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)`; GELU's outputs are not kept for the backward pass, but computed anew.

    They are the largest of all activations, and the cheapest to have again.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # as autocast has it for linear layers, which it does not see in here
        kind = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
    out: Tensor = _LinearOfGELU.apply(x, weight, bias)
    return out


class GridAttention(nn.Module):
    """Norm, then attention among all pixels of a grid (B, H, W, C): the mixer of the last stage."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = Attention(dim, device=device, dtype=dtype)

    def forward(self, x_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        return self.attn(self.norm(x_BHWC))


class MLP(nn.Module):
    """Norm, then two linear layers with GELU between, and before it a 3x3 depthwise convolution if `conv`."""

    def __init__(self, dim: int, hidden: int, conv: bool, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = DepthwiseConv(hidden, 3, residual=True, **dd) if conv else nn.Identity()
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        hidden_BHWC = self.conv(self.fc1(self.norm(x_BHWC)))
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if self.learns_from(hidden_BHWC):
                return linear_of_gelu(hidden_BHWC, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(hidden_BHWC))

    @torch.jit.unused
    def learns_from(self, hidden_BHWC: Tensor) -> bool:
        """Whether a backward pass is to come, through a last layer that nobody has changed or listens to."""
        if not isinstance(hidden_BHWC, Tensor) or not torch.is_grad_enabled() or not hidden_BHWC.requires_grad:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False  # compilers choose themselves what they keep
        last = self.fc2
        return type(last) is nn.Linear and not last._forward_hooks and not last._forward_pre_hooks


class Block(nn.Module):
    """Position convolution, mixer and MLP, each with a residual (paper, figure 2), on a grid (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        pos_conv: bool,
        mlp_conv: bool,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_conv = DepthwiseConv(dim, 3, residual=True, **dd) if pos_conv else nn.Identity()
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.mlp = MLP(dim, int(mlp_ratio * dim), mlp_conv, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path)
        if isinstance(mixer, GridAttention) and not mlp_conv:  # the one MLP that the reference makes of linear layers;
            init_linear(self.mlp.fc1)  # the others are 1x1 convolutions there and keep a convolution's first values
            init_linear(self.mlp.fc2)

    def forward(self, entering_BHWC: Tensor) -> Tensor:
        x_BHWC = self.pos_conv(entering_BHWC)
        x_BHWC = x_BHWC + self.drop_path1(self.ls1(self.mixer(x_BHWC, entering_BHWC)))
        return x_BHWC + self.drop_path2(self.ls2(self.mlp(x_BHWC)))


class Stage(nn.Module):
    """Transition to half the resolution (none in the first stage), then blocks; (B, C, H, W) in and out."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


def init_linear(layer: nn.Linear) -> nn.Linear:
    """`layer` with the first values of what is a linear layer in the reference (1x1 convolutions keep PyTorch's)."""
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def make_stem(in_chans: int, dim: int, overlap: bool, stride: int, **dd) -> nn.Sequential:
    """Image to features at 1/4 or 1/2 of its size: two 3x3 convolutions, or one over patches that do not overlap."""
    if stride not in (2, 4):
        raise ValueError(f"stem_stride is 4, or 2 for images of about 64 px, not {stride}")
    if not overlap:
        return nn.Sequential(nn.Conv2d(in_chans, dim, stride, stride, **dd), nn.BatchNorm2d(dim, **dd))
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride // 2, 1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def make_transition(dim: int, next_dim: int, overlap: bool, **dd) -> nn.Sequential:
    """Half the resolution: a 3x3 convolution, then norm; or norm, then a 2x2 convolution."""
    if overlap:
        return nn.Sequential(nn.Conv2d(dim, next_dim, 3, 2, 1, **dd), nn.BatchNorm2d(next_dim, **dd))
    return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, next_dim, 2, 2, **dd))


class GLNet(nn.Module):
    """The GLNet backbone and classifier, with timm's model contract.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 removes the classifier.
        global_pool: timm's pooling name; '' keeps the grid.
        dims: channels of each stage (multiples of 32).
        depths: blocks of each stage.
        mixers: of each stage, 'glmix', 'attention', 'alternate' (glmix and attention in turn), or 'local' (glmix
            without its global branch).
        mlp_ratio: hidden channels of the MLP, times the width.
        overlap: deep overlapping stem, 3x3 transitions, and 3x3 convolutions for position and in the MLP;
            else patches that do not overlap, as in Swin. Four steps of the road from `glnet_stl` to `glnet_4g`, which
            these take one at a time, where they are not None:
        overlap_stem, overlap_transitions, pos_conv, mlp_conv: one each of what `overlap` has.
        stem_stride: 4, or 2 for images of about 64 px; strides are stem_stride times 1, 2, 4, 8.
        layer_scale: first value of LayerScale; None for none.
        token_labeling: a second head labels every place of the grid; half its maximum is added to the logits.
        dense_classes: classes of that head, where they are others than the classifier's: those of a teacher. Nothing
            of it is then added to the logits. 0 for the classifier's.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        glmix_options: those of `GLMix`: `seeds`, `slot_grid`, `slot_scale`, ...

    Raises:
        TypeError: an option that neither the network nor its block has.
        ValueError: an option's value that cannot be.

    Source: paper, section 3 and table 7; numbers held to the reference implementation by tests/test_golden.py.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (4, 4, 18, 4),
        mixers: Sequence[str] = ("glmix", "glmix", "alternate", "attention"),
        mlp_ratio: float = 3.0,
        overlap: bool = True,
        overlap_stem: bool | None = None,
        overlap_transitions: bool | None = None,
        pos_conv: bool | None = None,
        mlp_conv: bool | None = None,
        stem_stride: int = 4,
        layer_scale: float | None = None,
        token_labeling: bool = False,
        dense_classes: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **glmix_options: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for kind in mixers:
            check_choice("mixers", kind, ("glmix", "attention", "alternate", "local"))
        overlap_stem = overlap if overlap_stem is None else overlap_stem
        overlap_transitions = overlap if overlap_transitions is None else overlap_transitions
        pos_conv = overlap if pos_conv is None else pos_conv
        mlp_conv = overlap if mlp_conv is None else mlp_conv
        unknown = glmix_options.keys() - GLMIX_OPTIONS
        if unknown:
            raise TypeError(f"a GLNet has no option {', '.join(sorted(unknown))}")
        if len({len(dims), len(depths), len(mixers)}) > 1:
            raise ValueError(f"as many dims as depths and mixers, not {len(dims)}, {len(depths)} and {len(mixers)}")
        if any(dim < 32 or dim % 32 for dim in dims) or min(depths) < 1:
            raise ValueError(f"dims are multiples of 32, and depths at least 1, not {list(dims)} and {list(depths)}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        def mixer(stage: int, block: int) -> nn.Module:
            kind = mixers[stage]
            if kind == "attention" or (kind == "alternate" and block % 2):
                return GridAttention(dims[stage], **dd)
            options = glmix_options | ({"integration": "local"} if kind == "local" else {})
            return GLMix(dims[stage], stem_stride * 2**stage, **dd, **options)

        self.stem = make_stem(in_chans, dims[0], overlap_stem, stem_stride, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential()
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = [
                Block(dim, mixer(i, j), mlp_ratio, pos_conv, mlp_conv, layer_scale, rates[i][j], **dd)
                for j in range(depths[i])
            ]
            downsample = make_transition(dims[i - 1], dim, overlap_transitions, **dd) if i else nn.Identity()
            self.stages.append(Stage(downsample, blocks))
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.token_labeling, self.dense_classes = token_labeling, dense_classes
        self.aux_head: nn.Module = nn.Identity()
        if token_labeling and num_classes:
            self.aux_head = nn.Linear(dims[-1], dense_classes or num_classes, **dd)
        self._init_heads()

    def _init_heads(self) -> None:
        if isinstance(self.head.fc, nn.Linear):  # the head for places keeps PyTorch's first values, as the reference's
            init_linear(self.head.fc)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: a raised slot scale (the reference decays its own)."""
        return {f"{n}.mixer.similarity.scale" for n, mixer in self.slot_mixers().items() if mixer.raised_scale}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise learning rates: stem, then block by block."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def slot_mixers(self) -> dict[str, GLMix]:
        """Every GLMix mixer that has slots, by the name of its block (`stages.0.blocks.0`), in order of depth."""
        found = {n.removesuffix(".mixer"): m for n, m in self.named_modules() if isinstance(m, GLMix)}
        return {name: mixer for name, mixer in found.items() if mixer.has_slots}

    @torch.jit.ignore
    def set_slot_grid(self, slot_grid: tuple[int, int]) -> None:
        """Change the grid of pooled seeds of every GLMix block, after training too; no parameter depends on it.

        Raises:
            ValueError: it has no places or too many, or this model has no slots, or none that are pooled from a grid.
        """
        slot_grid = checked_grid(slot_grid)
        if not self.slot_mixers():
            raise ValueError(NO_SLOTS)
        for name, mixer in self.slot_mixers().items():
            if mixer.seeds.slot_grid is None:
                raise ValueError(f"the slots of {name} are learned, not pooled from a grid: their number is fixed")
            mixer.seeds.slot_grid = slot_grid

    @torch.jit.ignore
    def set_slot_merging(self, threshold: float | None = None, budget: int | None = None) -> None:
        """Let every GLMix block merge seeds that are alike, so that images have as many slots as they need; none: all.

        No parameter depends on it, and with none of both the network is what it was.

        Args:
            threshold: cosine, 0 to 1, from which seeds are merged; 1 merges those of one direction, and changes nothing.
            budget: instead, how many slots every image keeps.

        Raises:
            ValueError: both, one that cannot be, no slots, or such as hang on their number or place.
        """
        merging = None if threshold is None and budget is None else SeedMerging(threshold, budget)
        if merging is not None and not self.slot_mixers():
            raise ValueError(NO_SLOTS)
        for name, mixer in self.slot_mixers().items():
            if merging is not None and mixer.assignment != "soft":
                raise ValueError(
                    f"the slots of {name} have the assignment '{mixer.assignment}'; soft ones can be merged"
                )
            count = mixer.seeds.count()
            if budget is not None and budget > count:
                raise ValueError(f"the slots of {name} are {count}, so {budget} cannot be left: at most {count}")
        for mixer in self.slot_mixers().values():
            mixer.merging = copy.deepcopy(merging)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` (0: none), with freshly drawn weights; other pooling if given."""
        self.num_classes = num_classes
        first = next(self.parameters())
        dd: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if self.token_labeling:
            classes = num_classes and (self.dense_classes or num_classes)
            self.aux_head = nn.Linear(self.num_features, classes, **dd) if classes else nn.Identity()
            self.aux_head.train(self.training)
        self._init_heads()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, (B, C, H, W) each, before the final norm (`norm` applies it to the last).

        Args:
            x: images (B, C, H, W).
            indices: the last n stages if an int, all if None, else those listed.
            norm: apply the final norm to the last stage's output.
            stop_early: do not run stages beyond the last one wanted.
            output_fmt: 'NCHW', nothing else.
            intermediates_only: leave out the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is 'NCHW', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and max_index < last else self.norm(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages beyond the last one wanted, with final norm and classifier where they lose their input."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) after the final norm, from images (B, C, H, W)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_dense(self, x: Tensor) -> Tensor:
        """Class scores (B, H*W, classes) of every place of normed features (B, C, H, W): the token-labelling head."""
        return self.aux_head(x.flatten(2).transpose(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) from normed features; `pre_logits` stops at the pooled features (B, C)."""
        if pre_logits:
            return self.head(x, pre_logits=True)
        logits = self.head(x)
        if self.token_labeling and self.num_classes > 0 and not self.dense_classes:
            # inference as published: half of the dense maximum is added
            logits = logits + 0.5 * self.forward_dense(x).amax(1)
        return logits

    @torch.jit.ignore
    def forward_mixtoken(self, x: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Scores for training with token labels, of a batch of which each image has a part of another one in it.

        Inside a box, each image's features behind the stem are replaced by those of its partner in the batch reversed
        (`x.flip(0)`). Class scores are of the mixed images, without the dense maximum that inference adds; their
        labels are mixed by the box's share of the area. Dense scores are put back inside the box, so every place's
        score stands with the image it came from, and its token labels stay as they were.

        Args:
            x: images (B, C, H, W).
            box: first row, first column, row and column behind the last, in places of the last stage's grid (32 px).

        Returns:
            Class scores (B, classes), and dense scores (B, H*W, classes) of the last grid, row by row.

        Raises:
            ValueError: the model has no token-labelling head.

        Source: MixToken of "All Tokens Matter" (LV-ViT), with which the paper's `tklb` models were trained; numbers
        held to the reference implementation by tests/test_golden.py.
        """
        if not self.token_labeling:
            raise ValueError("this model has no token-labelling head; build it with token_labeling=True")
        top, left, bottom, right = box
        places = 2 ** (len(self.stages) - 1)  # of the stem's grid, per place of the last one and per axis

        def swap(grid_BCHW: Tensor, size: int) -> Tensor:
            inside = (..., slice(top * size, bottom * size), slice(left * size, right * size))
            swapped = grid_BCHW.clone()
            swapped[inside] = grid_BCHW.flip(0)[inside]
            return swapped

        x = self.norm(self.stages(swap(self.stem(x), places)))
        dense = self.forward_dense(x).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(x), swap(dense, 1).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# ---------------------------------------------------------------------------------------------------------------------
# Variants: the one place that knows them.

PUBLISHED_PAGE = "https://github.com/rayleizhu/GLMix#model-card"


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> GLNet:
    """Build through timm; weights are read by `glmix.models.weights`, which knows our files and the released ones.

    Options are the variant's `defaults`, those that a checkpoint of ours was trained with, and the caller's `kwargs`,
    the later ones winning.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    path, trained_with = None, {}
    if pretrained:
        path = find_weights(resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay))
        description, tensors = read_checkpoint(path)
        trained_with = description.model_args
        overlay.update(source="", file=None, state_dict=tensors, num_classes=count_classes(tensors))
    try:
        model = build_model_with_cfg(
            GLNet,
            variant,
            pretrained,
            pretrained_cfg_overlay=overlay or None,
            pretrained_filter_fn=fit_state_dict,
            pretrained_strict=True,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **{**defaults, **trained_with, **renamed_options(kwargs)},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if pretrained:
        for module in model.modules():  # a feature extractor and the network in it have a configuration each
            cfg: Any = getattr(module, "pretrained_cfg", {})
            cfg["state_dict"] = None  # loaded: keep no second copy
    return model


def _cfg(**changes: Any) -> dict[str, Any]:
    cfg = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "min_input_size": (3, 32, 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_name": "Revisiting the Integration of Convolution and Attention for Vision Backbone",
        "paper_ids": "arXiv:2411.14429",
        "origin_url": PUBLISHED_PAGE,
    }
    return cfg | changes


def _shipped(name: str, **changes: Any) -> dict[str, Any]:
    """Of weights that are in the package: with the file, timm counts them among those to be had."""
    return _cfg(file=str(SHIPPED_FOLDER / f"{name}.safetensors"), **changes)


_TOKEN_LABELING = {"classifier": ("head.fc", "aux_head"), "crop_pct": 0.96}
_SMALL = {"input_size": (3, 160, 160), "pool_size": (5, 5), "crop_pct": 1.0, "origin_url": None}

default_cfgs = generate_default_cfgs(
    {
        "glnet_stl.in1k": _cfg(),
        "glnet_stl_paramslot.in1k": _cfg(),
        "glnet_4g.in1k": _cfg(),
        "glnet_9g.in1k": _cfg(),
        "glnet_16g.in1k": _cfg(),
        "glnet_4g_tklb.in1k": _cfg(**_TOKEN_LABELING),
        "glnet_9g_tklb.in1k": _cfg(**_TOKEN_LABELING),
        "glnet_16g_tklb.untrained": _cfg(**_TOKEN_LABELING),
        "glnet_pico.untrained": _cfg(**_SMALL, num_classes=10),
        "glnet_pico_tklb.imagenette": _shipped(
            "glnet_pico_tklb.imagenette", **_TOKEN_LABELING | _SMALL, num_classes=10
        ),
        "glnet_nano.untrained": _cfg(**_SMALL),
    }
)

# top-1 on ImageNet-1k's validation split, parameters and multiply-adds at 224 px, as published (PUBLISHED_PAGE)
PUBLISHED: dict[str, dict[str, float]] = {
    "glnet_stl": {"top1": 82.5, "params_m": 30, "gmacs": 4.4},
    "glnet_stl_paramslot": {"top1": 82.1, "params_m": 30, "gmacs": 4.4},
    "glnet_4g": {"top1": 83.7, "params_m": 27, "gmacs": 4.5},
    "glnet_9g": {"top1": 84.5, "params_m": 60, "gmacs": 9.7},
    "glnet_16g": {"top1": 85.0, "params_m": 106, "gmacs": 16.7},
    "glnet_4g_tklb": {"top1": 84.4, "params_m": 27, "gmacs": 4.5},
    "glnet_9g_tklb": {"top1": 85.3, "params_m": 61, "gmacs": 9.7},
}

_STL = {
    "dims": (96, 192, 384, 768),
    "depths": (2, 2, 6, 2),
    "mixers": ("glmix", "glmix", "glmix", "attention"),
    "mlp_ratio": 4.0,
    "overlap": False,
}
_4G = {"dims": (64, 128, 256, 512)}
_9G = {"dims": (96, 192, 384, 768)}
_16G = {"dims": (128, 256, 512, 1024), "layer_scale": 1e-4}
# Short trainings on small images: sharp assignments from the start, and slots that keep their own content.
_ALIVE = {
    "mixers": ("glmix", "glmix", "glmix", "attention"),
    "slot_grid": (7, 7),
    "slot_scale": 20.0,
    "slot_residual": True,
}
_PICO = {"dims": (32, 64, 128, 256), "depths": (1, 2, 6, 1), **_ALIVE}


@register_model
def glnet_stl(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet in Swin-Tiny's layout: 30 M parameters, 4.4 G multiply-adds."""
    return _create("glnet_stl", pretrained, _STL, kwargs)


@register_model
def glnet_stl_paramslot(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """`glnet_stl` with learned seeds of the slots."""
    return _create("glnet_stl_paramslot", pretrained, {**_STL, "seeds": "learned"}, kwargs)


@register_model
def glnet_4g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-4G: 27 M parameters, 4.5 G multiply-adds."""
    return _create("glnet_4g", pretrained, _4G, kwargs)


@register_model
def glnet_9g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-9G: 60 M parameters, 9.7 G multiply-adds."""
    return _create("glnet_9g", pretrained, _9G, kwargs)


@register_model
def glnet_16g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-16G: 106 M parameters, 16.7 G multiply-adds."""
    return _create("glnet_16g", pretrained, _16G, kwargs)


@register_model
def glnet_4g_tklb(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-4G with the token-labelling head."""
    return _create("glnet_4g_tklb", pretrained, {**_4G, "token_labeling": True}, kwargs)


@register_model
def glnet_9g_tklb(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-9G with the token-labelling head."""
    return _create("glnet_9g_tklb", pretrained, {**_9G, "token_labeling": True}, kwargs)


@register_model
def glnet_16g_tklb(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet-16G with the token-labelling head; ours, never published."""
    return _create("glnet_16g_tklb", pretrained, {**_16G, "token_labeling": True}, kwargs)


@register_model
def glnet_pico(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """Ours, for small images and CPUs: 2.5 M parameters, slots that stay alive in short trainings."""
    return _create("glnet_pico", pretrained, _PICO, kwargs)


@register_model
def glnet_pico_tklb(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """`glnet_pico` with the token-labelling head; its weights for Imagenette are in the package."""
    return _create("glnet_pico_tklb", pretrained, {**_PICO, "token_labeling": True}, kwargs)


@register_model
def glnet_nano(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """Ours, for small images and CPUs: 5 M parameters, slots that stay alive in short trainings."""
    defaults = {"dims": (32, 64, 160, 320), "depths": (2, 2, 7, 2), **_ALIVE}
    return _create("glnet_nano", pretrained, defaults, kwargs)


MODEL_NAMES = tuple(default_cfgs)
