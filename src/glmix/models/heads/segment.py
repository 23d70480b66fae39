"""Segmenters on the stages of a backbone: UPerNet and Semantic FPN, as the papers that compare backbones use them.

Sources: "Unified Perceptual Parsing for Scene Understanding" (Xiao et al., 2018), 512 channels, pooled at 1, 2, 3 and 6
places, with an auxiliary FCN on the third stage; "Panoptic Feature Pyramid Networks" (Kirillov et al., 2019), 256
channels in the pyramid and 128 behind it.

Shapes: images (B, 3, H, W), stages C2 to C5 at strides 4 to 32, scores (B, classes, H, W).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmix.models.heads.pyramid import Pyramid
from glmix.models.slots import averaging_matrix

POOLED = (1, 2, 3, 6)  # places along each side, of UPerNet's pooling
AUXILIARY = 2  # the stage that the auxiliary head looks at, counted from 0
DROPOUT = 0.1


def conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """A convolution that keeps the resolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the resolution of another, bilinear."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def pooled(x_BCHW: Tensor, places: int) -> Tensor:
    """Means over `places` x `places` bins, as adaptive average pooling has them; matrix products, which export."""
    rows, columns = (averaging_matrix(side, places, x_BCHW) for side in x_BCHW.shape[-2:])
    return rows @ F.linear(x_BCHW, columns)


class Segmenter(Pyramid):
    """What both segmenters share: scores at the image's resolution, and in training those of the auxiliary head too.

    Args:
        backbone: as `Pyramid` takes it.
        classes: their number.
        auxiliary: channels of the auxiliary head; 0 for none.
        last: channels of the features that places are classified by.
    """

    def __init__(self, backbone: Any, classes: int, auxiliary: int, last: int) -> None:
        super().__init__(backbone)
        self.classify = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(last, classes, 1))
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                conv(self.channels[AUXILIARY], auxiliary, 3), nn.Dropout2d(DROPOUT), nn.Conv2d(auxiliary, classes, 1)
            )

    def features(self, stages: list[Tensor]) -> Tensor:
        """Features (B, channels, H / 4, W / 4) of the stages."""
        raise NotImplementedError

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the classes at the resolution of the images, and those of the auxiliary head, if there is one."""
        stages = self.stages(images)
        auxiliary = None if self.auxiliary is None else enlarged(self.auxiliary(stages[AUXILIARY]), images)
        return enlarged(self.classify(self.features(stages)), images), auxiliary

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes, H, W) of images (B, 3, H, W)."""
        return enlarged(self.classify(self.features(self.stages(images))), images)


class UPerNet(Segmenter):
    """Pooled context at the coarsest stage, a pyramid from there to the finest, and all of it together.

    Args:
        backbone, classes: as `Segmenter`.
        head_channels: 0 for 512, and 64 on small backbones.
    """

    def __init__(self, backbone: Any, classes: int, head_channels: int = 0) -> None:
        width = head_channels or self.usual_width(backbone, 512)
        super().__init__(backbone, classes, min(width, 256), width)
        *finer, coarsest = self.channels
        self.context = nn.ModuleList(conv(coarsest, width, 1) for _ in POOLED)
        self.bottleneck = conv(coarsest + len(POOLED) * width, width, 3)
        self.lateral = nn.ModuleList(conv(channels, width, 1) for channels in finer)
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in finer)
        self.fuse = conv(len(self.channels) * width, width, 3)

    def features(self, stages: list[Tensor]) -> Tensor:
        *finer, coarsest = stages
        context = [
            enlarged(reduce(pooled(coarsest, places)), coarsest)
            for reduce, places in zip(self.context, POOLED, strict=True)
        ]
        levels = [self.bottleneck(torch.cat([coarsest, *context], 1))]
        for lateral, stage in zip(list(self.lateral)[::-1], finer[::-1], strict=True):
            narrow = lateral(stage)
            levels.insert(0, narrow + enlarged(levels[0], narrow))
        smooth = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=False)] + [levels[-1]]
        return self.fuse(torch.cat([smooth[0], *(enlarged(level, smooth[0]) for level in smooth[1:])], 1))


class SemanticFPN(Segmenter):
    """A feature pyramid whose levels are brought to the finest one's resolution, by steps of two, and added.

    Args:
        backbone, classes: as `Segmenter`.
        head_channels: of the pyramid, and half of them behind it; 0 for 256, and 64 on small backbones.
    """

    def __init__(self, backbone: Any, classes: int, head_channels: int = 0) -> None:
        width = head_channels or self.usual_width(backbone, 256)
        super().__init__(backbone, classes, 0, width // 2)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in self.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.channels)
        # a level at stride 4 * 2 ** n takes n steps up, the finest one a step at its own resolution
        self.ascend = nn.ModuleList(
            nn.Sequential(*(conv(width if i == 0 else width // 2, width // 2, 3) for i in range(max(level, 1))))
            for level in range(len(self.channels))
        )

    def features(self, stages: list[Tensor]) -> Tensor:
        levels: list[Tensor] = []
        for lateral, stage in zip(list(self.lateral)[::-1], stages[::-1], strict=True):
            narrow = lateral(stage)
            levels.insert(0, narrow + enlarged(levels[0], narrow) if levels else narrow)
        smooth = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        total = self.ascend[0](smooth[0])
        for level in range(1, len(smooth)):
            x = smooth[level]
            for step, finer in zip(self.ascend[level].children(), smooth[:level][::-1], strict=True):
                x = enlarged(step(x), finer)
            total = total + x
        return total
