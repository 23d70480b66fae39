"""The same network for inference alone: what can be computed once is folded into the weights.

`optimize_for_inference` copies a model and, in the copy,

- makes one kernel of `x + conv(x)`, and one convolution of BatchNorm and the convolution beside it;
- folds LayerScale, and the gate of slots, into the linear layer before it, the final norm into the classifiers, and the bias of a GLMix block's
  local branch into its slots (each place gets a mean of slots whose weights sum to 1);
- divides similarities by the length of the features, and not the features: M x N numbers instead of N x C;
- lets blocks go over large grids row by row, so that what a few rows need stays in the cache, and memory stays small:
  of a large grid neither norm nor similarities are ever there as a whole;
- keeps linear layers in oneDNN's own layout as well, which saves packing them anew for every image.

The last two are for a CPU that runs the module itself; compilers and exporters see the plain form. Nothing but PyTorch is
needed.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from timm.models._features import FeatureDictNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glmix.models.glnet import (
    MLP,
    Attention,
    Block,
    DepthwiseConv,
    GLMix,
    GLNet,
    GridAttention,
    LayerScale,
    SlotSimilarity,
)
from glmix.models.seeds import PooledSeeds
from glmix.models.slots import at_least_float32, pool_seeds

ROWS_BYTES = (
    2**22
)  # of features that a block computes at a time, for each thread: they stay in the cache, by measurement


def optimize_for_inference(model: nn.Module, sdpa: bool = False) -> nn.Module:
    """A copy of `model` that computes the same faster, in evaluation mode, with weights that learn no more.

    Args:
        model: a GLNet, or anything that holds one (a head's `backbone`, a feature extractor), on any device.
        sdpa: cluster and dispatch by PyTorch's fused attention, of which each is one head. Off, as no measurement speaks
            for it yet; `glmix bench --engines fast,sdpa --memory` makes one.

    Returns:
        The copy: modules of PyTorch, exported and scripted as the model's are. Outputs differ by rounding alone.

    Raises:
        ValueError: there is no GLNet in `model`.
    """
    folded = copy.deepcopy(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    parts = list(folded.modules())
    if not any(isinstance(part, Block) for part in parts):
        raise ValueError(f"{type(model).__name__} holds no GLNet, so there is nothing to fold")
    for part in parts:
        if isinstance(part, Block):
            _fold_block(part)
        elif isinstance(part, FeatureDictNet) or type(part).forward is nn.Sequential.forward:
            _fold_norms(part)
    for part in parts:
        for kind, other in _FASTER.items():
            if type(part) is kind and not (isinstance(part, GLMix) and not is_published(part)):
                attends = sdpa and isinstance(part, GLMix) and part.assignment == "soft"
                part.__class__ = GLMixBySDPA if attends else other  # the same weights, computed with otherwise
    for part in list(folded.modules()):
        if isinstance(part, FoldedGLNet):
            part.fold_classifiers()
    folded = folded.to(memory_format=torch.channels_last)
    for part in list(folded.modules()):
        if type(part) is nn.Linear:
            part.__class__ = PackedLinear
            part.pack()  # type: ignore[operator]
    return folded.eval()


# --- into the weights ------------------------------------------------------------------------------------------------


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation mode multiplies with and adds."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _behind(norm: nn.BatchNorm2d, layer: Any) -> Any:
    """A copy of a linear layer or a convolution that does the norm before it too."""
    scale, shift = _scale_and_shift(norm)
    layer = copy.deepcopy(layer)
    each = (1, -1) + (1,) * (layer.weight.ndim - 2)
    added = (layer.weight * shift.view(each)).flatten(1).sum(1)
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added, requires_grad=False)
    layer.weight = nn.Parameter(layer.weight * scale.view(each), requires_grad=False)
    return layer


def _fold_norms(chain: nn.Module) -> None:
    """Every BatchNorm of a chain of modules into the convolution before it, or behind it if that pads nothing."""
    modules: dict[str, Any] = chain._modules
    names = list(modules)
    for first, second in zip(names, names[1:]):  # noqa: RUF007  (pairs of what the loop itself changes)
        before, after = modules[first], modules[second]
        if type(before) is nn.Conv2d and type(after) is nn.BatchNorm2d:
            modules[first], modules[second] = fuse_conv_bn_eval(before, after).requires_grad_(False), nn.Identity()
        elif (
            type(before) is nn.BatchNorm2d and type(after) is nn.Conv2d and after.groups == 1 and not any(after.padding)
        ):
            # zeros round the grid would have to be other values before the norm, so not where there are such
            modules[first], modules[second] = nn.Identity(), _behind(before, after)


def _into(linears: list[Any], scale: nn.Module) -> nn.Module:
    """Let linear layers do the LayerScale behind them, if there is one; what is left of it."""
    if isinstance(scale, LayerScale):
        for linear in linears:
            linear.weight.data *= scale.gamma[:, None]
            linear.bias.data *= scale.gamma
    return nn.Identity()


def is_published(mixer: GLMix) -> bool:
    """Whether both branches stand side by side and end in linear layers; of other rows of the ablations not all do."""
    return mixer.integration == "parallel" and isinstance(mixer.slot_attn, Attention)


def _fold_block(block: Any) -> None:
    block.ls2 = _into([block.mlp.fc2], block.ls2)
    mixer = block.mixer
    if isinstance(block.mixer, GridAttention):
        block.ls1 = _into([mixer.attn.proj], block.ls1)
    elif is_published(block.mixer):
        globally, locally = mixer.slot_proj if mixer.slot_residual else mixer.slot_attn.proj, mixer.local[2]
        mixer.slot_gate = _into([globally], mixer.slot_gate)
        block.ls1 = _into([globally, locally], block.ls1)
        if locally.bias is not None:
            globally.bias.data += locally.bias
            locally.bias = None
    for conv in (part for part in block.modules() if isinstance(part, DepthwiseConv) and part.residual):
        middle = conv.kernel_size[0] // 2
        conv.weight.data[:, 0, middle, middle] += 1
        conv.residual = False


# --- faster forms of modules -----------------------------------------------------------------------------------------


def _runs_here(x: Tensor) -> bool:
    """Whether `x` holds numbers to be computed with on a CPU, now: nothing is traced, and no gradient is wanted."""
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    seen = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return not seen and not (torch.is_grad_enabled() and x.requires_grad)


def _pieces(grid: torch.Size, channels: int, size: int) -> Iterator[tuple[slice, int, int]]:
    """Parts of (B, H, W, ...) whose `channels` of `size` bytes fit in the cache: images, first row, row behind the last."""
    B, H, W = grid[:3]
    room = ROWS_BYTES * torch.get_num_threads() // (W * channels * size)  # rows
    if room >= B * H:
        yield slice(0, B), 0, H
        return
    parts = -(-H // max(room, 1))
    rows = -(-H // parts)
    for image in range(B):
        for top in range(0, H, rows):
            yield slice(image, image + 1), top, min(top + rows, H)


def _by_rows(x_BHWC: Tensor, channels: int, halo: int, compute: Callable[..., Tensor]) -> Tensor:
    """`compute(images, rows)` of each part of a grid, put together.

    A part's rows are handed over with `halo` more on both sides where there are such: as (first, last, first and last
    of the part among these).
    """
    H = x_BHWC.shape[1]
    out: Tensor | None = None
    for images, top, bottom in _pieces(x_BHWC.shape, channels, x_BHWC.element_size()):
        low, high = max(top - halo, 0), min(bottom + halo, H)
        part = compute(images, slice(low, high), slice(top - low, bottom - low))
        if images.stop - images.start == len(x_BHWC) and bottom - top == H:
            return part
        if out is None:
            out = torch.empty_like(x_BHWC)
        out[images, top:bottom] = part
    assert out is not None
    return out


def unit_seeds(seeds_BMC: Tensor, scale: Tensor) -> Tensor:
    """Seeds of unit length times `scale`, in float32 at least."""
    seeds = at_least_float32(seeds_BMC)
    return seeds * (at_least_float32(scale) / torch.linalg.vector_norm(seeds, dim=-1, keepdim=True).clamp(min=1e-12))


def shorter(x_BNC: Tensor) -> Tensor:
    """By what features (B, N) have unit length, in float32 at least."""
    return torch.linalg.vector_norm(at_least_float32(x_BNC), dim=-1).clamp(min=1e-12).reciprocal()


@register_notrace_function
def cosine_by_length(seeds_BMC: Tensor, x_BNC: Tensor, scale: Tensor) -> Tensor:
    """As `glmix.models.slots.similarity`, with the length of each pixel's features divided out of the product."""
    seeds_BMC, shorter_BN = unit_seeds(seeds_BMC, scale).to(x_BNC.dtype), shorter(x_BNC).to(x_BNC.dtype)
    return torch.matmul(seeds_BMC, x_BNC.transpose(-2, -1)) * shorter_BN.unsqueeze(1)


@register_notrace_function
def attending(seeds_BMC: Tensor, x_BNC: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds (B, M, C) and pixels (B, N, C) whose products are the similarities, for fused attention."""
    seeds_BMC = unit_seeds(seeds_BMC, scale).to(x_BNC.dtype).expand(x_BNC.shape[0], -1, -1)
    return seeds_BMC, (x_BNC * shorter(x_BNC).unsqueeze(2)).to(x_BNC.dtype)


for _name in ("cosine_by_length", "attending"):
    torch.fx.wrap(_name)


class LengthSimilarity(SlotSimilarity):
    """`SlotSimilarity` by `cosine_by_length`."""

    def forward(self, seeds_BMC: Tensor, x_BNC: Tensor) -> Tensor:
        return cosine_by_length(seeds_BMC, x_BNC, self.scale)


class DirectlyPooledSeeds(PooledSeeds):
    """`PooledSeeds` by PyTorch's own pooling, which is one step and cannot be exported."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if _runs_here(x_BHWC):
                pooled = F.adaptive_avg_pool2d(x_BHWC.permute(0, 3, 1, 2), self.slot_grid)
                return pooled.flatten(2).transpose(1, 2)
        return pool_seeds(x_BHWC, self.slot_grid[0], self.slot_grid[1])


class GLMixByRows(GLMix):
    """`GLMix` that goes over large grids a few rows at a time: norm, similarities and both branches."""

    def forward(self, x_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if _runs_here(x_BHWC):
                return self.by_rows(x_BHWC, entering_BHWC)
        normed_BHWC = self.norm(x_BHWC)
        return self.globally(normed_BHWC, entering_BHWC) + self.local(normed_BHWC)

    @torch.jit.unused
    def by_rows(self, x_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        C = x_BHWC.shape[3]
        parts = list(_pieces(x_BHWC.shape, 3 * C, x_BHWC.element_size()))
        whole = (
            len(parts) == 1 or self.assignment != "soft" or self.seeds_from != "entering" or self.merging is not None
        )
        seeds_BMC: Any = None
        logits_BMN: Any = None
        if whole or self.similarity._forward_hooks:  # somebody looks at the similarities
            x_BHWC = self.norm(x_BHWC)
            logits_BMN, slots_BMC = self.gather(x_BHWC, entering_BHWC)
        else:
            seeds_BMC = self.seeds(entering_BHWC).expand(len(x_BHWC), -1, -1)
            slots_BMC = self.attend(
                torch.cat([self.gathered(seeds_BMC, x_BHWC, image) for image in range(len(x_BHWC))])
            )
        branch: Any = self.local
        first, conv, last = branch

        def compute(images: slice, rows: slice, kept: slice) -> Tensor:
            normed = x_BHWC[images, rows]
            if logits_BMN is None:
                normed = self.norm(normed)
                logits = self.similarity(seeds_BMC[images], normed[:, kept].flatten(1, 2))
            else:
                W = x_BHWC.shape[2]
                logits = logits_BMN[images, :, (rows.start + kept.start) * W : (rows.start + kept.stop) * W]
            local = last(conv(first(normed))[:, kept])
            weights = torch.softmax(at_least_float32(logits), 1).to(local.dtype)
            mixed = torch.baddbmm(local.reshape(len(local), -1, C), weights.transpose(1, 2), slots_BMC[images])
            return mixed.view(local.shape)

        halo = conv.kernel_size[0] // 2 if isinstance(conv, DepthwiseConv) else 0
        return _by_rows(x_BHWC, 3 * C, halo, compute)

    def gathered(self, seeds_BMC: Tensor, x_BHWC: Tensor, image: int) -> Tensor:
        """Slots (1, M, C) of an image: sums over its rows, each weighted relative to the highest similarity so far."""
        M, C = seeds_BMC.shape[1:]
        sums_MC = at_least_float32(x_BHWC.new_zeros(M, C))
        total_M, highest_M = sums_MC.new_zeros(M), sums_MC.new_full((M,), -torch.inf)
        for _, top, bottom in _pieces(x_BHWC[:1].shape, 3 * C, x_BHWC.element_size()):
            normed_1NC = self.norm(x_BHWC[image : image + 1, top:bottom]).flatten(1, 2)
            logits_MN = at_least_float32(self.similarity(seeds_BMC[image : image + 1], normed_1NC))[0]
            higher_M = torch.maximum(highest_M, logits_MN.amax(1))
            weights_MN = (logits_MN - higher_M.unsqueeze(1)).exp()
            kept_M = (highest_M - higher_M).exp()
            total_M = total_M * kept_M + weights_MN.sum(1)
            sums_MC = sums_MC * kept_M.unsqueeze(1) + torch.matmul(weights_MN.to(x_BHWC.dtype), normed_1NC[0])
            highest_M = higher_M
        return (sums_MC / total_M.unsqueeze(1)).to(x_BHWC.dtype).unsqueeze(0)


class GLMixBySDPA(GLMix):
    """`GLMix` whose clustering and dispatching are attention of one head each; similarities never come into memory."""

    def forward(self, x_BHWC: Tensor, entering_BHWC: Tensor) -> Tensor:
        normed_BHWC = self.norm(x_BHWC)
        if not torch.jit.is_scripting():
            looked_at = self.similarity._forward_hooks or self.merging is not None
            if looked_at or torch.jit.is_tracing() or torch.compiler.is_exporting():
                # somebody looks at the similarities, sizes are added to them, or free ones wanted, which attention narrows
                return self.globally(normed_BHWC, entering_BHWC) + self.local(normed_BHWC)
        normed_BNC = normed_BHWC.flatten(1, 2)
        seeds_BMC = self.seeds(entering_BHWC if self.seeds_from == "entering" else normed_BHWC)
        seeds_BMC, unit_BNC = attending(seeds_BMC, normed_BNC, self.similarity.scale)
        clustered_BMC = F.scaled_dot_product_attention(
            seeds_BMC.unsqueeze(1), unit_BNC.unsqueeze(1), normed_BNC.unsqueeze(1), scale=1.0
        ).squeeze(1)
        dispatched_BNC = F.scaled_dot_product_attention(
            unit_BNC.unsqueeze(1), seeds_BMC.unsqueeze(1), self.attend(clustered_BMC).unsqueeze(1), scale=1.0
        ).squeeze(1)
        return dispatched_BNC.reshape(normed_BHWC.shape) + self.local(normed_BHWC)


class BlockInPlace(Block):
    """`Block` that adds what enters a branch to what the branch has made, where nobody else looks at that."""

    def forward(self, entering_BHWC: Tensor) -> Tensor:
        x_BHWC = self.pos_conv(entering_BHWC)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if _runs_here(x_BHWC) and not (self.mixer._forward_hooks or self.mlp._forward_hooks):
                x_BHWC = self.ls1(self.mixer(x_BHWC, entering_BHWC)).add_(x_BHWC)
                return self.ls2(self.mlp(x_BHWC)).add_(x_BHWC)
        x_BHWC = x_BHWC + self.ls1(self.mixer(x_BHWC, entering_BHWC))
        return x_BHWC + self.ls2(self.mlp(x_BHWC))


class MLPByRows(MLP):
    """`MLP` that has the hidden channels of a few rows at a time."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if _runs_here(x_BHWC):
                return self.by_rows(x_BHWC)
        return self.fc2(self.act(self.conv(self.fc1(self.norm(x_BHWC)))))

    @torch.jit.unused
    def by_rows(self, x_BHWC: Tensor) -> Tensor:
        def compute(images: slice, rows: slice, kept: slice) -> Tensor:
            hidden = self.conv(self.fc1(self.norm(x_BHWC[images, rows])))[:, kept]
            return self.fc2(torch.ops.aten.gelu_(hidden))

        halo = 1 if isinstance(self.conv, DepthwiseConv) else 0
        return _by_rows(x_BHWC, self.fc1.out_features, halo, compute)


class PackedLinear(nn.Linear):
    """A linear layer whose weights are kept in oneDNN's layout as well, for as long as they stay on the CPU."""

    __jit_ignored_attributes__ = ("packed",)

    def pack(self) -> None:
        """Lay the weights out anew; after every change of them."""
        known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        fits = self.weight.device.type == "cpu" and (
            self.weight.dtype == torch.float32
            or (self.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        packed = [torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)] if known and fits else []
        self.packed: list[Tensor] = packed  # in a list: no tensor that exporters would keep too

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves alone what stands in this `if`)
            if self.fits(x):
                return torch.ops.mkldnn._linear_pointwise(x, self.packed[0], self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    @torch.jit.unused
    def fits(self, x: Tensor) -> bool:
        """Whether the packed weights are those for `x`."""
        plain = _runs_here(x) and not torch.is_autocast_enabled("cpu")
        return plain and bool(self.packed) and x.dtype == self.weight.dtype

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        super()._apply(*args, **kwargs)
        self.pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


class Classifiers(nn.Module):
    """Final norm, mean over places, and both classifiers of a GLNet: as linear layers alone, (B, C, H, W) to logits."""

    def __init__(self, norm: nn.BatchNorm2d, net: GLNet) -> None:
        super().__init__()
        self.fc = _behind(norm, net.head.fc)
        self.second = net.token_labeling
        self.dense = _behind(norm, net.aux_head) if self.second else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(x.mean((2, 3)))
        if self.second:
            logits = logits + 0.5 * self.dense(x.flatten(2).transpose(1, 2)).amax(1)
        return logits


class FoldedGLNet(GLNet):
    """A GLNet whose `forward` has the final norm in its classifiers; what gives normed features still norms them."""

    def fold_classifiers(self) -> None:
        """Make the classifiers of `forward` anew; after every change of norm, pooling or head."""
        self.classifiers: nn.Module | None = None
        averaged = isinstance(self.head.fc, nn.Linear) and self.head.global_pool.pool_type == "avg"
        if averaged and isinstance(self.norm, nn.BatchNorm2d):
            self.classifiers = Classifiers(self.norm, self).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        if self.classifiers is not None:
            return self.classifiers(x)
        return self.forward_head(self.norm(x))

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.fold_classifiers()

    @torch.jit.ignore
    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.fold_classifiers()
        return taken


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    GLNet: FoldedGLNet,
    Block: BlockInPlace,
    GLMix: GLMixByRows,
    MLP: MLPByRows,
    SlotSimilarity: LengthSimilarity,
    PooledSeeds: DirectlyPooledSeeds,
}
