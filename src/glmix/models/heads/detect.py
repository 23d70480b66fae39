"""Detectors on the stages of a backbone: RetinaNet and Mask R-CNN, of torchvision's parts.

Sources: "Focal Loss for Dense Object Detection" (Lin et al., 2017) and "Mask R-CNN" (He et al., 2017), as torchvision has
them: `box_head: v1` is its first form, which papers compare backbones under, `v2` its second, with GroupNorm and a
head of convolutions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher, _topk_min
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import LastLevelMaxPool
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from glmix.models.heads.pyramid import Pyramid

Target = dict[str, Tensor]  # of an image: boxes (n, 4) x0 y0 x1 y1 in its pixels, labels (n,) from 0, masks (n, H, W)
Found = dict[str, Tensor]  # in an image: boxes (n, 4), scores (n,) falling, labels (n,), masks (n, 1, 28, 28) in boxes

DETECTIONS = 100  # of an image at most, as COCO's measure counts
LEAST_SCORE = 0.05
PUBLISHED_ANCHORS = (32, 64, 128, 256, 512)  # pixels: sides of the anchors, of five levels
GROUPS = 32  # of GroupNorm


class InFloat32(nn.Module):
    """A module whose outputs, tensors or lists and dictionaries of them, are float32 under autocast too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module  # not `module`, a name that loading strips as DDP's

    def forward(self, *inputs: Any) -> Any:
        return _in_float32(self.inner(*inputs))


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, dict):
        return {key: _in_float32(part) for key, part in value.items()}
    return type(value)(_in_float32(part) for part in value)


class Detector(Pyramid):
    """What both detectors share: a pyramid of features, and how they are called.

    Args:
        backbone: as `Pyramid` takes it.
        extra: makes coarser levels, of the channels of the last stage and those of the pyramid.
        first: the finest stage that is used.
        head_channels: of the pyramid and all that stands on it; 0 for 256, and 64 on small backbones.
        anchors: sides of the anchors in pixels, one for each level, finest first.
    """

    def __init__(self, backbone: Any, extra: Any, first: int, head_channels: int, anchors: Sequence[int]) -> None:
        super().__init__(backbone)
        self.first = first
        for unused in range(first):
            self.norms[unused] = nn.Identity()  # distributed training waits for weights without gradient
        self.width = head_channels or self.usual_width(self.backbone, 256)
        self.anchor_sides = tuple(anchors) or PUBLISHED_ANCHORS
        if len(self.anchor_sides) != len(PUBLISHED_ANCHORS):
            raise ValueError(f"anchors {list(anchors)}: one side for each of {len(PUBLISHED_ANCHORS)} levels")
        self.fpn = FeaturePyramidNetwork(self.channels[first:], self.width, extra)

    def features(self, images: Tensor) -> list[Tensor]:
        """Levels (B, width, H / stride, W / stride) of images (B, 3, H, W), finest first."""
        stages = self.stages(images)[self.first :]
        return list(self.fpn({str(i): stage for i, stage in enumerate(stages)}).values())

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, targets: list[Target] | None = None
    ) -> Any:
        """Losses by name in training, and in use what is found in each image.

        Args:
            images: (B, 3, H, W), resized, normalised and filled to one size.
            sizes: heights and widths of what is no filling; None where all is image.
            targets: in training.
        """
        seen = ImageList(images, list(sizes) if sizes else [tuple(images.shape[-2:])] * len(images))
        levels = self.features(images)
        return self.losses(seen, levels, targets or []) if self.training else self.found(seen, levels)

    def every_layer(self, images: Tensor) -> None:
        """Run all that is learned on `images`, as often as in use, to count it; nothing depends on what is seen."""
        raise NotImplementedError

    def losses(self, seen: ImageList, levels: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        raise NotImplementedError

    def found(self, seen: ImageList, levels: list[Tensor]) -> list[Found]:
        raise NotImplementedError


class RetinaNet(Detector):
    """One stage: at every place of five levels, of strides 8 to 128, nine anchors are classified and moved.

    The two coarsest levels, P6 and P7, are made of the last stage, as the paper has it.

    Args:
        backbone: as `Pyramid` takes it.
        classes: their number.
        head_channels, anchors: as of `Detector`.
        box_head: v1, or v2: GroupNorm in the head, and boxes learn by GIoU.
    """

    CANDIDATES, OVERLAP = 1000, 0.5  # boxes of a level before suppression, and the IoU from which it acts

    def __init__(
        self,
        backbone: Any,
        classes: int,
        head_channels: int = 0,
        anchors: Sequence[int] = (),
        box_head: Literal["v1", "v2"] = "v1",
    ) -> None:
        super().__init__(backbone, None, 1, head_channels, anchors)
        last, width = self.channels[-1], self.width
        coarser = LastLevelP6P7(last, width)
        coarser.use_P5 = False  # torchvision's takes P5 where it happens to have as many channels
        self.fpn.extra_blocks = coarser
        sides = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in self.anchor_sides)
        self.anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
        norm = partial(nn.GroupNorm, min(GROUPS, width)) if box_head == "v2" else None
        head = RetinaNetHead(width, self.anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
        if box_head == "v2":
            head.regression_head._loss_type = "giou"
        self.head = head
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def every_layer(self, images: Tensor) -> None:
        self.head(self.features(images))

    def losses(self, seen: ImageList, levels: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        outputs = _in_float32(self.head(levels))
        with torch.autocast(seen.tensors.device.type, enabled=False):
            anchors = self.anchors(seen, levels)
            matched = [self._matched(each, target["boxes"]) for each, target in zip(anchors, targets, strict=True)]
            return self.head.compute_loss(targets, outputs, anchors, matched)

    def _matched(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Which of the boxes each anchor is to find; below 0: none, or of no account."""
        if not len(boxes):
            return torch.full((len(anchors),), self.matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        return self.matcher(box_iou(boxes, anchors))

    def found(self, seen: ImageList, levels: list[Tensor]) -> list[Found]:
        outputs = _in_float32(self.head(levels))
        anchors = self.anchors(seen, levels)
        counts = [level.shape[-2] * level.shape[-1] * self.anchors.num_anchors_per_location()[0] for level in levels]
        return [
            self._found_in(logits, moves, sides, counts, size)
            for logits, moves, sides, size in zip(
                outputs["cls_logits"], outputs["bbox_regression"], anchors, seen.image_sizes, strict=True
            )
        ]

    def _found_in(self, logits: Tensor, moves: Tensor, anchors: Tensor, counts: list[int], size: Any) -> Found:
        """What is found in one image, of (A, classes) logits and (A, 4) moves of its A anchors, level after level."""
        boxes, scores, labels = [], [], []
        parts = zip(logits.split(counts), moves.split(counts), anchors.split(counts), strict=True)
        for logits_AK, moves_A4, anchors_A4 in parts:
            every = logits_AK.sigmoid().flatten()
            likely = (every > LEAST_SCORE).nonzero()[:, 0]
            best, order = every[likely].topk(_topk_min(likely, self.CANDIDATES, 0))
            place = likely[order]
            anchor = place // logits_AK.shape[1]
            scores.append(best)
            labels.append(place % logits_AK.shape[1])
            moved = self.coder.decode_single(moves_A4[anchor], anchors_A4[anchor])
            boxes.append(clip_boxes_to_image(moved, size))
        found = {"boxes": torch.cat(boxes), "scores": torch.cat(scores), "labels": torch.cat(labels)}
        kept = batched_nms(found["boxes"], found["scores"], found["labels"], self.OVERLAP)[:DETECTIONS]
        return {name: value[kept] for name, value in found.items()}


class MaskRCNN(Detector):
    """Two stages: regions that may hold an object, and for each its class, its box and its mask of 28 by 28.

    Args:
        backbone: as `Pyramid` takes it.
        classes: their number.
        head_channels, anchors: as of `Detector`.
        box_head: v1, two linear layers; v2, four convolutions and a linear layer, with GroupNorm, in the mask head too.
        regions: proposals of an image from which the second stage learns; 0 for 512, and 128 on narrow heads.
    """

    def __init__(
        self,
        backbone: Any,
        classes: int,
        head_channels: int = 0,
        anchors: Sequence[int] = (),
        box_head: Literal["v1", "v2"] = "v1",
        regions: int = 0,
    ) -> None:
        super().__init__(backbone, LastLevelMaxPool(), 0, head_channels, anchors)
        width, v2 = self.width, box_head == "v2"
        narrow = width < 128
        norm = partial(nn.GroupNorm, min(GROUPS, width)) if v2 else None
        anchor_generator = AnchorGenerator(tuple((s,) for s in self.anchor_sides), ((0.5, 1.0, 2.0),) * 5)
        each = anchor_generator.num_anchors_per_location()[0]
        self.rpn = RegionProposalNetwork(
            anchor_generator,
            InFloat32(RPNHead(width, each, conv_depth=2 if v2 else 1)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 500 if narrow else 2000, "testing": 300 if narrow else 1000},
            nms_thresh=0.7,
        )
        levels = [str(i) for i in range(len(self.channels))]
        hidden = 256 if narrow else 1024
        if v2:
            head: nn.Module = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm_layer=norm)
        else:
            head = TwoMLPHead(width * 7 * 7, hidden)
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            head,
            InFloat32(FastRCNNPredictor(hidden, classes + 1)),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions or (128 if narrow else 512),
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=LEAST_SCORE,
            nms_thresh=0.5,
            detections_per_img=DETECTIONS,
            mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
            mask_predictor=InFloat32(MaskRCNNPredictor(width, width, classes + 1)),
        )

    def every_layer(self, images: Tensor) -> None:
        self.rpn.head(self.features(images))
        regions = self.rpn.post_nms_top_n()
        heads = self.roi_heads
        heads.box_predictor(heads.box_head(images.new_empty(regions, self.width, 7, 7)))
        heads.mask_predictor(heads.mask_head(images.new_empty(DETECTIONS, self.width, 14, 14)))

    def losses(self, seen: ImageList, levels: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        counted = [target | {"labels": target["labels"] + 1} for target in targets]  # 0 is background there
        features = {str(i): level for i, level in enumerate(levels)}
        proposals, of_regions = self.rpn(seen, features, counted)
        _, of_objects = self.roi_heads(features, proposals, seen.image_sizes, counted)
        return of_regions | of_objects

    def found(self, seen: ImageList, levels: list[Tensor]) -> list[Found]:
        features = {str(i): level for i, level in enumerate(levels)}
        proposals, _ = self.rpn(seen, features)
        found, _ = self.roi_heads(features, proposals, seen.image_sizes)
        return [each | {"labels": each["labels"] - 1} for each in found]
