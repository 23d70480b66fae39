"""Data sets of Hugging Face: by name from the hub, or local parquet files."""

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from PIL import Image

from glmix.data.images import decode, read_image
from glmix.data.samples import SampleSet, number_labels, pick_column, split_word
from glmix.errors import UserError, needs

HUB = "hf:"
LABELS = ("label", "labels", "class", "fine_label", "cls")


@dataclass(frozen=True)
class Table:
    """Images in a column of a `datasets.Dataset`, left encoded there: our decoding knows every mode, and names bad ones."""

    name: str
    rows: Any
    column: str

    def read(self, index: int) -> Image.Image:
        """The image in row `index`, decoded.

        Raises:
            BadImage: it cannot be read or decoded.
        """
        value = self.rows[index][self.column]
        content = value if isinstance(value, dict) else {"bytes": value}
        if content["bytes"] is None and content.get("path"):
            return read_image(content["path"])
        return decode(content["bytes"] or b"", f"{self.name}/{index}")


def scan_hub(source: str) -> tuple[SampleSet, list[str]]:
    """The labelled images of `hf:OWNER/NAME[:CONFIG]`, a .parquet file or a folder of them, and the split word of each.

    Files are named SPLIT/ROW. Rows without a label are passed over, as many a test set has none.

    Raises:
        UserError: it cannot be loaded, or has no column of images or of labels.
    """
    with needs("train"):
        import datasets  # takes a second, and most runs have no use for it
    if source.startswith(HUB):
        name, _, config = source.removeprefix(HUB).partition(":")
        query: dict[str, Any] = {"path": name, "name": config or None}
        remedy = f"give {HUB}OWNER/NAME[:CONFIG] where there is a network, or a folder of the data set's parquet files"
    else:
        query = {"path": "parquet", "data_files": _parquet_files(Path(source))}
        remedy = "fetch the parquet files again"
    try:
        splits = datasets.load_dataset(**query)
    except Exception as error:  # of the hub's, of arrow's and of several HTTP libraries' kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(f"{source}: {reason}; {remedy}") from error
    features = next(iter(splits.values())).features
    types = {name: str(getattr(feature, "dtype", feature)) for name, feature in features.items()}
    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    images += [name for name, kind in types.items() if kind == "binary" or "bytes" in kind]
    plain = [name for name, kind in types.items() if re.fullmatch(r"u?int\d+|(large_)?string", kind)]
    label = pick_column(plain, LABELS)
    label = label or next((name for name, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    if not images or label is None:
        kind = f"numbers or texts named {' or '.join(LABELS)}" if images else "images"
        raise UserError(f"{source}: no column of {kind}; found {', '.join(features)}; rename or add it")
    found = []
    for split, rows in splits.items():
        encoded = rows.select_columns(images[0])
        if isinstance(features[images[0]], datasets.Image):
            encoded = encoded.cast_column(images[0], datasets.Image(decode=False))
        table = Table(f"{source}/{split}", encoded, images[0])
        found += [(split, table, row, value) for row, value in enumerate(rows[label][:]) if value not in (None, -1)]
    labels, classes = number_labels([row[3] for row in found], getattr(features[label], "names", None), source)
    files = [f"{split}/{row}" for split, _, row, _ in found]
    places = [(table, row) for _, table, row, _ in found]
    return SampleSet(Path(source), files, labels, classes, places=places), [split_word(row[0]) for row in found]


def _parquet_files(source: Path) -> dict[str, list[str]]:
    """Parquet files of each split, by their names or folders; all are 'rows' where none of them names one."""
    if not source.exists():
        raise UserError(f"{source}: no such file")
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    words = [(split_word(str(file.relative_to(source))), escape(str(file))) for file in files]
    splits: dict[str, list[str]] = {}
    for word, file in [pair for pair in words if pair[0]] or words:
        splits.setdefault(word or "rows", []).append(file)
    return splits
