"""How good frozen features are: nearest neighbours and a linear classifier, from training images to validation images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmix.data.samples import Skipped, Source
from glmix.errors import UserError, needs
from glmix.training.processes import Processes, gathered
from glmix.use.streams import Stream, nothing_read

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as in "Emerging Properties in Self-Supervised Vision Transformers" (DINO)
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # inverse ones, of the linear classifier's regularisation


@dataclass(frozen=True)
class Labelled:
    """Features (N, D) of the images that could be read, and their classes (N,)."""

    features: NDArray[np.float32]
    targets: NDArray[np.int64]
    skipped: list[Skipped]


def labelled_features(stream: Stream, source: Source, processes: Processes) -> Labelled:
    """Of all of a source, each process its share.

    Raises:
        UserError: none can be read.
    """
    mine = {
        n: r
        for records in stream.records(range(processes.rank, stream.batches, processes.count))
        for n, r in records.items()
    }
    found = dict(sorted((number, record) for part in gathered(mine) for number, record in part.items()))
    used = [number for number, record in found.items() if "answer" in record]
    skipped = [Skipped(source.files[n], record["error"]) for n, record in found.items() if "error" in record]
    if not used:
        number, record = next(iter(found.items()))
        raise nothing_read(source, number, record["error"])
    features = np.stack([found[number]["answer"] for number in used])
    return Labelled(features, np.array([source.targets[number] for number in used]), skipped)


def nearest(train: Labelled, val: Labelled) -> float:
    """Top-1 in percent of the `NEIGHBOURS` nearest training images by cosine, each weighing exp(cosine / temperature)."""
    with needs("evaluate"):
        from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: NDArray[Any]) -> NDArray[Any]:
        return np.exp((1 - distances) / TEMPERATURE)

    count = min(NEIGHBOURS, len(train.targets))
    classifier = KNeighborsClassifier(count, metric="cosine", weights=weights)
    return 100 * float(classifier.fit(train.features, train.targets).score(val.features, val.targets))


def linear(train: Labelled, val: Labelled) -> float:
    """Top-1 in percent of logistic regression of standardised features, its strength chosen on a tenth of the training.

    Raises:
        UserError: what is left for fitting is of one class, or nothing.
    """
    with needs("evaluate"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, PredefinedSplit
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    held = np.where(np.random.default_rng(0).permutation(len(train.targets)) % 10 == 0, 0, -1)
    if len(np.unique(train.targets[held < 0])) < 2:
        raise UserError(
            f"--linear: {len(train.targets)} training images are too few for two classes; raise --limit, or leave it out"
        )
    chain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    search = GridSearchCV(chain, {"logisticregression__C": STRENGTHS}, cv=PredefinedSplit(held))
    return 100 * float(search.fit(train.features, train.targets).score(val.features, val.targets))
