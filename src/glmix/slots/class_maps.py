"""Where in an image the evidence for a class lies, as a classifier sees it: class activation maps.

Shapes: B images, K classes, C channels, h x w places of a grid.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from glmix.data.prepare import LEAST_SIDE, Preparation
from glmix.models import GLNet
from glmix.slots.look import prepare_whole

MapKind = Literal["gradient", "grad-cam", "cam"]
STRIDE = 4  # pixels of the input per place of the mean map: as fine as the finest grid of most networks
SCALES = (0.5, 1.0, 1.5, 2.0)  # of IRN's protocol


def linear_classifier(model: GLNet) -> nn.Linear:
    """The layer that scores the mean features of an image.

    Raises:
        ValueError: it is no linear layer behind average pooling, so no place has a share in a score.
    """
    layer: Any = model.get_classifier()
    if not isinstance(layer, nn.Linear) or model.head.global_pool.pool_type != "avg":
        raise ValueError("class maps are of classifiers that average all places, then score by a linear layer")
    return layer


def class_maps(model: GLNet, images: Tensor, classifier: nn.Linear, classes: Sequence[int], kind: MapKind) -> Tensor:
    """Evidence (B, K, h, w) of the places of a grid for the score of each class; below 0 what speaks against it.

    - 'cam': the classifier's weights applied to each place of the last grid. (Zhou et al., "Learning Deep Features for
      Discriminative Localization", 2016.)
    - 'grad-cam': the score's gradient with regard to what enters the last stage, averaged over places, weighs its
      channels. (Selvaraju et al., "Grad-CAM", 2017.)
    - 'gradient': that gradient times the features, place by place, summed over channels. (HiResCAM; Draelos and Carin,
      2020.)

    Args:
        model: a GLNet in evaluation mode, on the device of `images`.
        images: (B, C, H, W), prepared.
        classifier: of its pooled features: the model's own (`linear_classifier`), or another.
        classes: K rows of `classifier`, one at least.
    """
    with torch.no_grad():
        entering = model.stages[:-1](model.stem(images))
        if kind == "cam":
            features = model.norm(model.stages[-1](entering))
            return torch.einsum("bchw,kc->bkhw", features, classifier.weight[list(classes)])
    entering = entering.detach().requires_grad_()
    with torch.enable_grad():
        pooled = model.forward_head(model.norm(model.stages[-1](entering)), pre_logits=True)
        scores = classifier(pooled)
        slopes = [torch.autograd.grad(scores[:, k].sum(), entering, retain_graph=True)[0] for k in classes]
    found = []
    for slope in slopes:
        weights = slope.mean((2, 3), keepdim=True) if kind == "grad-cam" else slope
        found.append((weights * entering.detach()).sum(1))
    return torch.stack(found, 1)


def mean_maps(
    model: GLNet,
    photo: Image.Image,
    preparation: Preparation,
    classifier: nn.Linear,
    classes: Sequence[int],
    kind: MapKind = "gradient",
    scales: Sequence[float] = SCALES,
    flip: bool = True,
) -> Tensor:
    """What speaks for each class (K, h, w), the mean over sizes of the photo and, with `flip`, its mirror image; on the CPU.

    `STRIDE` pixels of the whole photo, as the network sees it at a scale of 1, are a place of it.
    """
    device = next(model.parameters()).device
    whole = prepare_whole(photo, preparation)
    size = [max(1, side // STRIDE) for side in whole.shape[1:]]
    seen = []
    for scale in scales:
        side = max(LEAST_SIDE, round(scale * min(preparation.size)))
        images = (whole if scale == 1 else prepare_whole(photo, preparation.at(side)))[None]
        images = torch.cat([images, images.flip(3)]) if flip else images
        maps = class_maps(model, images.to(device), classifier, classes, kind).float().relu().cpu()
        maps = F.interpolate(maps, size, mode="bilinear", antialias=True)
        seen.append((maps[:1] + maps[1:].flip(3)) / 2 if flip else maps)
    return torch.cat(seen).mean(0)


def highest_one(maps_Khw: Tensor) -> Tensor:
    """Maps (K, h, w) of which each has 1 as its largest value; one without any evidence stays 0."""
    top = maps_Khw.amax((1, 2), keepdim=True)
    return torch.where(top > 0, maps_Khw / torch.where(top > 0, top, 1), 0)
