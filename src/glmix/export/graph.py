"""The folded network in the form that engines run fastest: features as (B, C, H, W) throughout.

Inside a stage the network holds its features channels-last, as (B, H, W, C), which PyTorch's own kernels like. Engines lay
tensors out in memory themselves; to them every permutation is one more pass over all features, four for a depthwise
convolution. Here 1x1 convolutions stand for linear layers, the global branch multiplies matrices (C, N), and nothing is
permuted.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmix.models.fold import is_published
from glmix.models.glnet import Block, DepthwiseConv, GLMix, GridAttention, Stage
from glmix.models.seeds import PooledSeeds
from glmix.models.slots import averaging_matrix

IN_PARTS = ("openvino",)  # engines that are faster with the parts of LayerNorm


def for_engine(folded: nn.Module, engine: str) -> nn.Module:
    """A copy of what `optimize_for_inference` made, in the form for an engine: 'openvino', 'onnxruntime' or 'torch'."""
    made = copy.deepcopy(folded)
    for part in made.modules():
        if engine != "torch" and type(part) is Stage and all(_has_this_form(block) for block in part.blocks):
            part.__class__ = ChannelsFirstStage
            part.norm_in_parts = engine in IN_PARTS  # type: ignore[assignment]
    return made


def _has_this_form(block: nn.Module) -> bool:
    assert isinstance(block, Block)
    mixer = block.mixer
    return isinstance(mixer, GridAttention) or (
        isinstance(mixer, GLMix) and is_published(mixer) and mixer.assignment == "soft"
    )


def _pointwise(linear: Any, x_BCHW: Tensor) -> Tensor:
    return F.conv2d(x_BCHW, linear.weight[:, :, None, None], linear.bias)


def _depthwise(conv: nn.Module, x_BCHW: Tensor) -> Tensor:
    if not isinstance(conv, DepthwiseConv):
        return x_BCHW
    y = F.conv2d(x_BCHW, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return x_BCHW + y if conv.residual else y


class ChannelsFirstStage(Stage):
    """A folded `Stage` on (B, C, H, W)."""

    norm_in_parts: bool

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = self.block(block, x)
        return x

    def block(self, block: Any, entering: Tensor) -> Tensor:
        x = _depthwise(block.pos_conv, entering)
        normed = self.norm(block.mixer.norm, x)
        if isinstance(block.mixer, GLMix):
            x = x + self.mixed(block.mixer, normed, entering)
        else:
            x = x + self.attended(block.mixer.attn, normed)
        mlp = block.mlp
        hidden = _depthwise(mlp.conv, _pointwise(mlp.fc1, self.norm(mlp.norm, x)))
        return x + _pointwise(mlp.fc2, mlp.act(hidden))

    def norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """LayerNorm over channels; OpenVINO has it for the last dimension alone, but runs its parts in any layout."""
        if not self.norm_in_parts:
            return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        centred = x - x.mean(1, keepdim=True)
        shorter = ((centred * centred).mean(1, keepdim=True) + norm.eps).rsqrt()
        return centred * shorter * norm.weight[:, None, None] + norm.bias[:, None, None]

    def pooled(self, seeds: Any, x: Tensor) -> Tensor:
        """Seeds (B, M, C), as the module of seeds makes them of (B, H, W, C)."""
        if not isinstance(seeds, PooledSeeds):
            return seeds(x)
        rows, columns = (averaging_matrix(n, bins, x) for n, bins in zip(x.shape[2:], seeds.slot_grid, strict=True))
        averages_MN = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)
        return torch.matmul(x.flatten(2), averages_MN.t()).transpose(
            1, 2
        )  # one product: engines run it as a linear layer

    def mixed(self, mixer: Any, normed: Tensor, entering: Tensor) -> Tensor:
        """Both branches of a GLMix block; as in `glmix.models.slots`, with pixels last."""
        normed_BCN = normed.flatten(2)
        seeds_BMC = self.pooled(mixer.seeds, entering if mixer.seeds_from == "entering" else normed)
        log_size_BM = None
        if mixer.merging is not None:
            seeds_BMC, log_size_BM = mixer.merging(seeds_BMC)
        length = (seeds_BMC * seeds_BMC).sum(-1, keepdim=True) + 1e-24
        seeds_BMC = seeds_BMC * (mixer.similarity.scale * length.rsqrt())
        shorter_B1N = ((normed_BCN * normed_BCN).sum(1, keepdim=True) + 1e-24).rsqrt()
        logits_BMN = torch.matmul(seeds_BMC, normed_BCN) * shorter_B1N
        slots_BMC = mixer.attend(torch.matmul(logits_BMN.softmax(2), normed_BCN.transpose(1, 2)), log_size_BM)
        if log_size_BM is not None:
            logits_BMN = logits_BMN + log_size_BM.unsqueeze(2)
        globally = torch.matmul(slots_BMC.transpose(1, 2), logits_BMN.softmax(1)).reshape(normed.shape)
        first, conv, last = mixer.local
        return globally + _pointwise(last, _depthwise(conv, _pointwise(first, normed)))

    def attended(self, attention: Any, normed: Tensor) -> Tensor:
        return attention(normed.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(normed.shape)
