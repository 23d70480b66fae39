"""Data sets of Hugging Face: by name from the hub, local parquet files, or what `save_to_disk` wrote."""

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from PIL import Image

from glmix.data.folders import Tree
from glmix.data.images import decode, read_image
from glmix.data.naming import IMAGE_COLUMNS, LABEL_COLUMNS, number_labels, pick_column, split_word
from glmix.data.samples import DataSet, LeftOut, Several, Source, by_words
from glmix.errors import UserError, needs

HUB = "hf:"


@dataclass(frozen=True)
class TablePictures:
    """Images in a column of a `datasets.Dataset`, left encoded there: our decoding knows every mode, and names bad ones."""

    name: str
    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        value = self.rows[index][self.column]
        content = value if isinstance(value, dict) else {"bytes": value}
        if content["bytes"] is None and content.get("path"):
            return read_image(content["path"])
        return decode(content["bytes"] or b"", f"{self.name}/{index}")

    def size(self, index: int) -> int:
        return 0


def scan_hub(source: str, tree: Tree | None = None) -> DataSet:
    """The labelled images of `hf:OWNER/NAME[:CONFIG]`, a .parquet file, or a folder of them or of `save_to_disk`.

    Files are named SPLIT/ROW. Rows without a label are passed over, as many a test set has none. `tree` is what lies in
    a folder.

    Raises:
        UserError: it cannot be loaded, or has no column of images or of labels.
    """
    left_out = tree.left_out if tree else LeftOut()
    splits = _load(source, tree)
    features = next(iter(splits.values())).features
    image, label = image_column(features, source, left_out), label_column(features)
    if label is None:
        kinds = "numbers or texts named label or labels or class or fine_label or cls"
        raise UserError(f"{source}: no column of {kinds}; found {', '.join(features)}; rename or add it")
    places, files, values, words = [], [], [], []
    for split, rows in splits.items():
        table = encoded_images(f"{source}/{split}", rows, image)
        places += [(table, row) for row in range(len(rows))]
        files += [f"{split}/{row}" for row in range(len(rows))]
        values += rows[label][:]
        words += [split_word(split)] * len(rows)
    targets, classes = number_labels(values, getattr(features[label], "names", None), source)
    return by_words(source, Source(files, Several(places), targets, classes), words, left_out)


def hub_pictures(source: str, tree: Tree | None = None) -> list[tuple[list[str], TablePictures]]:
    """The images of the same sources, labelled or not: names SOURCE/SPLIT/ROW and pictures of each split.

    Raises:
        UserError: it cannot be loaded, or has no column of images.
    """
    splits = _load(source, tree)
    image = image_column(next(iter(splits.values())).features, source, LeftOut())
    tables = {split: encoded_images(f"{source}/{split}", rows, image) for split, rows in splits.items()}
    return [([f"{table.name}/{row}" for row in range(len(table))], table) for table in tables.values()]


def image_column(features: Any, source: str, left_out: LeftOut) -> str:
    """The column of images, the likeliest of several.

    Raises:
        UserError: there is none.
    """
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [name for name, kind in _types(features).items() if kind == "binary" or "bytes" in kind]
    if not images:
        raise UserError(f"{source}: no column of images; found {', '.join(features)}; rename or add it")
    chosen = pick_column(images, IMAGE_COLUMNS) or images[0]
    for name in dict.fromkeys(images):
        if name != chosen:
            left_out.add(f"column of images beside {chosen}", name)
    return chosen


def label_column(features: Any) -> str | None:
    """The column of labels: numbers or texts by a known name, else the one that is declared to be that."""
    import datasets

    kinds = r"u?int\d+|float\d*|double|bool|(large_)?string"
    plain = [name for name, kind in _types(features).items() if re.fullmatch(kinds, kind)]
    declared = (name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel))
    return pick_column(plain, LABEL_COLUMNS) or next(declared, None)


def _types(features: Any) -> dict[str, str]:
    return {name: str(getattr(feature, "dtype", feature)) for name, feature in features.items()}


def encoded_images(name: str, rows: Any, column: str) -> TablePictures:
    """A column of images, as they are encoded in it."""
    import datasets

    encoded = rows.select_columns(column)
    if isinstance(rows.features[column], datasets.Image):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    return TablePictures(name, encoded, column)


def is_saved(tree: Tree) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` writes."""
    return "dataset_dict.json" in tree.files or {"dataset_info.json", "state.json"} <= set(tree.files)


def _load(source: str, tree: Tree | None) -> dict[str, Any]:
    """The tables of each split."""
    with needs("train"):
        import datasets  # takes a second, and most runs have no use for it

    path = Path(source)
    remedy = "fetch or write it again"
    try:
        if tree and is_saved(tree):
            found = datasets.load_from_disk(source)
            return {"rows": found} if isinstance(found, datasets.Dataset) else dict(found)
        if source.startswith(HUB):
            name, _, config = source.removeprefix(HUB).partition(":")
            remedy = (
                f"give {HUB}OWNER/NAME[:CONFIG] where there is a network, or a folder of the data set's parquet files"
            )
            return datasets.load_dataset(path=name, name=config or None)
        if not path.exists():
            raise UserError(f"{source}: no such file")
        remedy = "fetch the parquet files again"
        files = [path] if tree is None else [path / name for name in tree.ending_in(".parquet")]
        return datasets.load_dataset(path="parquet", data_files=_by_split(path, files))
    except UserError:
        raise
    except Exception as error:  # of the hub's, of arrow's and of several HTTP libraries' kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(f"{source}: {reason}; {remedy}") from error


def _by_split(source: Path, files: list[Path]) -> dict[str, list[str]]:
    """Parquet files of each split, by their names or folders; all are 'rows' where none of them names one."""
    words = [(split_word(file.relative_to(source).as_posix()), escape(str(file))) for file in files]
    splits: dict[str, list[str]] = {}
    for word, file in [pair for pair in words if pair[0]] or words:
        splits.setdefault(word or "rows", []).append(file)
    return splits
