"""What names mean: words for splits, labels of any type as class indices, columns of tables, and names for people."""

import math
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from timm.data import ImageNetInfo

from glmix.errors import UserError

# Words for each split; where several mean validation, the first is taken.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"),
}
SPLIT_WORDS = {word for words in SPLITS.values() for word in words}
SYNONYMS = {word: split for split, words in SPLITS.items() for word in words if word.startswith(split)}
FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "photos"}  # beside a split's word
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "class", "finelabel", "cls", "classname", "labelname", "category", "target")


def one_form(text: str) -> str:
    """The one Unicode form in which names are compared: systems write letters with accents in two."""
    return unicodedata.normalize("NFC", text)


def label_of(value: Any) -> int | str | None:
    """A label as a whole number, whatever its type (2.0, "2", True), or as a name; None for none, also below 0.

    A text with leading zeros is a name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        text = one_form(value.strip())
        if not re.fullmatch(r"-?(0|[1-9]\d*)(\.0+)?", text):
            return text or None
        value = int(text.partition(".")[0])
    elif isinstance(value, Real) and not isinstance(value, Integral) and math.isnan(value):
        return None
    if value is None:
        return None
    number = float(value) if isinstance(value, Real) else 0.5
    if not number.is_integer():
        raise ValueError(f"{value!r} is neither a whole number nor a name")
    return int(value) if number >= 0 else None


def number_labels(labels: Sequence[Any], classes: list[str] | None, source: str) -> tuple[list[int], list[str]]:
    """Class index of each label, -1 where there is none, and the classes' names.

    Args:
        labels: names, or numbers of any type, by the rule of `label_of`.
        classes: the known names, which numbers count from 0; without them each different label is a class, numbers in
            their order before texts in theirs.
        source: what to name in errors.

    Raises:
        UserError: a label that is none of `classes`, or no label at all.
    """
    try:
        ours = [label_of(label) for label in labels]
    except (ValueError, OverflowError) as error:
        raise UserError(f"{source}: a label that is none ({error}); correct it, or give another column") from error
    found = {label for label in ours if label is not None}
    if found and all(isinstance(label, str) and label.lower() in ("false", "true") for label in found):
        ours = [None if label is None else int(str(label).lower() == "true") for label in ours]
        found = {label for label in ours if label is not None}
    if classes is None:
        ordered = sorted(found, key=lambda label: (isinstance(label, str), label))
        index = {label: i for i, label in enumerate(ordered)}
        classes = [str(label) for label in ordered]
    else:
        classes = [one_form(name) for name in classes]
        index = {i: i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
        index |= {text: int(text) for text in found - set(index) if str(text).isdecimal() and int(text) in index}
    unknown = next((label for label in found if label not in index), None)
    if unknown is not None:
        raise UserError(f"{source}: label {unknown!r} is none of the {len(classes)} classes listed; correct the list")
    return [-1 if label is None else index[label] for label in ours], classes


def readable_names(classes: list[str]) -> list[str]:
    """Class labels for people: ImageNet's synset ids become their first lemma, underscores become spaces."""
    if any(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        info = ImageNetInfo("imagenet-22k")
        known = set(info.label_names())
        return [info.label_name_to_description(c).split(",")[0] if c in known else c for c in classes]
    return [c.replace("_", " ") for c in classes]


def words_of(text: str) -> list[str]:
    """The words of a path or name, in small letters: "ImageNet_trainSet2" has image, net, train and set."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)]
    return [next((w.removesuffix(end) for end in FILLERS if w.removesuffix(end) in SPLIT_WORDS), w) for w in words]


def split_word(text: str) -> str:
    """The last word in a path or name that means a split, as "val" in "shards/in1k-val-003.tar"; "" if none does."""
    return next((word for word in reversed(words_of(text)) if word in SPLIT_WORDS), "")


def split_of(path: str) -> str:
    """As `split_word`, by one word for those that mean the same: "train" of "training/a.jpg"."""
    word = split_word(path)
    return SYNONYMS.get(word, word)


def of_other_splits(path: str, other: str) -> bool:
    """Whether two paths tell of a split each, and not of the same."""
    first, second = split_of(path), split_of(other)
    return bool(first and second and first != second)


def plain_stem(path: str) -> str:
    """The name of a picture or XML file, with or without folders and ending, made comparable."""
    name = path.replace("\\", "/").rpartition("/")[2]
    return one_form(re.sub(r"\.(jpe?g|png|bmp|tiff?|webp|xml)$", "", name, flags=re.IGNORECASE)).lower()


def named_in_list(line: str, stems: Container[str]) -> str:
    """Which of `stems`, as `plain_stem` has them, a line of a list names: by all of it, or by its first word; "" if none."""
    return next((stem for text in (line.strip(), line.split()[0]) if (stem := plain_stem(text)) in stems), "")


def plain_split(text: str) -> str:
    """The word of a name that says nothing else than a split, as "train" in "Train_Set"; "" of any other name."""
    words = [word for word in words_of(text) if word not in FILLERS]
    return words[0] if len(words) == 1 and words[0] in SPLIT_WORDS else ""


def find_splits(words: Sequence[str]) -> dict[str, list[int]]:
    """Indices of 'train' and 'val', or of the one of them that is there, or of neither, by `split_word` of each image.

    Where several words mean validation, the first in `SPLITS` is taken: a test set beside a validation set is left out.
    """
    there = set(words)
    chosen = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
    return {split: [i for i, w in enumerate(words) if w == word] for split, word in chosen.items() if word}


def pick_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column called by the first of `names` that any is called by; capitals, spaces and dashes do not count."""
    plain = {re.sub(r"[\W_]+", "", column.lower()): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)
