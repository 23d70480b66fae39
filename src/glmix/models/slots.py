"""Soft clustering and dispatching, as pure functions: the readable truth of the global branch.

Shapes: B images, H x W grid, N = H*W pixels, M slots, C channels. Tensors carry theirs: `x_BHWC`, `slots_BMC`.

    seeds_BMC   = pool_seeds(x_BHWC, h, w)               # or others: seeds.py
    logits_BMN  = similarity(seeds_BMC, x_BNC, scale)    # cosine times a learned scale
    slots_BMC   = cluster(logits_BMN, x_BNC)             # softmax over pixels: weighted means
    ...                                                  # attention among the slots
    x_BNC       = dispatch(logits_BMN, slots_BMC)        # softmax over slots: back to the grid

Source: "Revisiting the Integration of Convolution and Attention for Vision Backbone" (NeurIPS 2024), section 3.
Lengths and both softmaxes are computed in float32 at least, whatever the dtype of the features.
"""

import torch
from timm.models import register_notrace_function
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it is in a half format, else as it is (float64 stays float64)."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def averaging_matrix(size: int, bins: int, like: Tensor) -> Tensor:
    """Matrix (bins, size) whose rows average the bins of adaptive average pooling along one axis.

    Bin i covers floor(i*size/bins) .. ceil((i+1)*size/bins), so bins overlap where `size` is no multiple, and repeat
    where it is smaller. Two such products are `adaptive_avg_pool2d`, but deterministic on CUDA and exportable.
    """
    pixel = torch.arange(size, device=like.device)
    bin_ = torch.arange(bins, device=like.device)
    start = (bin_ * size) // bins
    end = ((bin_ + 1) * size + (bins - 1)) // bins
    inside = (pixel >= start.unsqueeze(1)) & (pixel < end.unsqueeze(1))
    return inside.to(like.dtype) / (end - start).unsqueeze(1).to(like.dtype)


@register_notrace_function
def pool_seeds(x_BHWC: Tensor, slot_h: int, slot_w: int) -> Tensor:
    """Seeds (B, M, C): the features averaged over a grid of `slot_h` x `slot_w` bins (M = slot_h * slot_w).

    A grid with fewer rows or columns than bins gives repeated seeds, hence equal slots; nothing fails.
    """
    B, H, W, C = x_BHWC.shape
    rows = averaging_matrix(H, slot_h, x_BHWC)
    columns = averaging_matrix(W, slot_w, x_BHWC)
    # columns first: a free width W that is folded into C cannot be unfolded again when a program is exported
    x_BHwC = torch.matmul(columns, x_BHWC)
    return torch.matmul(rows, x_BHwC.reshape(B, H, slot_w * C)).reshape(B, slot_h * slot_w, C)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least. A row of zeros stays zero and passes no gradient.

    (Division by a tiny floor, as in `F.normalize`, has the same values, but a gradient of 1e12 at zero.)
    """
    x = at_least_float32(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    nonzero = length > 1e-12
    return torch.where(nonzero, x / torch.where(nonzero, length, torch.ones_like(length)), torch.zeros_like(x))


@register_notrace_function
def similarity(seeds_BMC: Tensor, x_BNC: Tensor, scale: Tensor) -> Tensor:
    """Logits (B, M, N): `scale` times the cosine between every seed and every pixel.

    `seeds_BMC` may have a batch of 1 (learned seeds). The product runs in the features' dtype (autocast applies).
    """
    seeds = (unit_rows(seeds_BMC) * at_least_float32(scale)).to(x_BNC.dtype)
    return torch.matmul(seeds, unit_rows(x_BNC).to(x_BNC.dtype).transpose(-2, -1))


@register_notrace_function
def cluster(logits_BMN: Tensor, x_BNC: Tensor) -> Tensor:
    """Slots (B, M, C): each the mean of all pixels, weighted by a softmax over pixels."""
    return torch.matmul(torch.softmax(at_least_float32(logits_BMN), dim=2).to(x_BNC.dtype), x_BNC)


@register_notrace_function
def dispatch(logits_BMN: Tensor, slots_BMC: Tensor) -> Tensor:
    """Pixels (B, N, C): each the mean of all slots, weighted by a softmax over slots."""
    weights = torch.softmax(at_least_float32(logits_BMN), dim=1).to(slots_BMC.dtype)
    return torch.matmul(weights.transpose(-2, -1), slots_BMC)


FAR = -1e4  # a logit whose softmax is 0 beside 0, and finite: a slot without pixels is the mean of all, and nobody's


def hardened(logits_BMN: Tensor, far: float = FAR) -> Tensor:
    """Logits of an assignment that is all or nothing: 0 for each pixel's most similar slot, `far` for the others."""
    best_B1N = logits_BMN.argmax(1, keepdim=True)
    return torch.full_like(logits_BMN, far).scatter(1, best_B1N, 0.0)


@register_notrace_function
def fixed_patches(x_BHWC: Tensor, slot_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Square patches as seeds, and pixels that are similar to the patch they lie in alone: unit vectors (B, M or N, M)."""
    B, H, W, _ = x_BHWC.shape
    slot_h, slot_w = slot_grid
    rows = torch.arange(H, device=x_BHWC.device) * slot_h // H
    columns = torch.arange(W, device=x_BHWC.device) * slot_w // W
    patch = (rows.unsqueeze(1) * slot_w + columns).flatten()
    seeds = torch.eye(slot_h * slot_w, dtype=x_BHWC.dtype, device=x_BHWC.device)
    return seeds.expand(B, -1, -1), seeds[patch].expand(B, -1, -1)
