"""A linear classifier of frozen features for classes that a network was not trained on: from images' labels alone."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from glmix.data.masks import IGNORED
from glmix.data.prepare import Preparation
from glmix.data.samples import Source
from glmix.errors import needs
from glmix.models import GLNet
from glmix.slots.look import prepare_whole

STRENGTH = 0.01  # inverse one, of the regularisation, for standardised features


@torch.no_grad()
def features_and_labels(
    model: GLNet,
    preparation: Preparation,
    images: Source,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pooled features (n, C) of the images that can be read, and which classes their maps have (n, classes).

    Args:
        images: with maps of classes (H, W), of which 0 is the background, and no class here.
    """
    device, features, labels = next(model.parameters()).device, [], []
    for _, (photo, truth, _) in images.each([], progress):  # what cannot be read is named where it is measured
        there = np.zeros(len(images.classes), bool)
        there[np.unique(truth[truth != IGNORED])] = True
        pooled = model.forward_head(
            model.forward_features(prepare_whole(photo, preparation)[None].to(device)), pre_logits=True
        )
        features.append(pooled[0].double().cpu().numpy())
        labels.append(there[1:])
    width, classes = model.num_features, len(images.classes) - 1
    return np.array(features).reshape(-1, width), np.array(labels, bool).reshape(-1, classes)


def fit_label_head(features: NDArray[np.float64], labels: NDArray[np.bool_]) -> nn.Linear:
    """Logistic regression of each class (n, classes) from features (n, C), as one layer; a class of all or none stays 0."""
    with needs("evaluate"):
        from sklearn.linear_model import LogisticRegression
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    layer = nn.Linear(features.shape[1], labels.shape[1])
    weight, bias = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
    for number, there in enumerate(labels.T):
        if there.all() or not there.any():
            continue
        found = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500)
        found.fit((features - mean) / scale, there)
        row = found.coef_[0] / scale
        weight[number] = torch.from_numpy(row)
        bias[number] = float(found.intercept_[0] - row @ mean)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer.requires_grad_(False)


def mean_precision(layer: nn.Linear, features: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """Mean average precision in percent of the classes that some and not all images have."""
    with needs("evaluate"):
        from sklearn.metrics import average_precision_score
    with torch.no_grad():
        scores = layer(torch.from_numpy(features).float()).numpy()
    kept = labels.any(0) & ~labels.all(0)
    return 100 * float(average_precision_score(labels[:, kept], scores[:, kept]))
