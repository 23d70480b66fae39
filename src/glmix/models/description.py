"""What a file of weights says beside its tensors: all that is needed to use them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glmix.data.prepare import Preparation
from glmix.errors import UserError

FORMAT = "glmix 1"


@dataclass
class Description:
    """What weights are of, and how to use them.

    Attributes:
        task: what they were trained for, a name of `glmix.tasks.TASKS`; '' where the file does not tell.
        model: architecture name; '' where the file does not tell (released files).
        model_args: options of the architecture that differ from the variant's.
        classes: class labels, in the order of the logits (folder names, for instance).
        names: the same for people to read.
        named: whether the classes are those the file names; where it names none, `load` fills in what is usual:
            ImageNet's for a thousand, else numbers.
        preparation: of images; None where the file does not tell.
        info: anything about the training that made them: epoch, accuracy, command, which images were held out.
        head: of a dense task: its `name` in `glmix.models.heads.HEADS` and its options; empty for the network's own.
    """

    task: str = ""
    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    named: bool = True
    preparation: Preparation | None = None
    info: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)

    @property
    def prepared(self) -> Preparation:
        """`preparation`, which `load` always fills in."""
        assert self.preparation is not None
        return self.preparation

    def class_index(self, names: Sequence[str], data: str, used: Collection[int] | None = None) -> dict[str, int]:
        """The place of each of the model's classes.

        Args:
            names: the classes of `data`, which must be among the model's.
            data: for the message.
            used: which of these are there at all; None for all.

        Raises:
            UserError: a class is none of the model's.
        """
        index = {name: i for i, name in enumerate(self.classes)}
        unknown = [name for i, name in enumerate(names) if name not in index and (used is None or i in used)]
        if unknown:
            raise UserError(
                f"{data}: {len(unknown)} of {len(names)} classes are not among the model's {len(index)} classes "
                f"(first: {unknown[0]}; the model's first: {self.classes[0]}); use a model trained on these classes"
            )
        return index

    def header(self) -> dict[str, Any]:
        """As plain data, for a file's header."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> "Description":
        """From a file's header, also of files written before there were tasks (they hold classifiers).

        A header of ours without a task is of a classifier; an empty one (a foreign file) tells nothing.
        """
        known = {k: header[k] for k in ("classes", "names", "info", "head") if k in header}
        preparation = None
        if header.get("preparation"):
            preparation = Preparation.read(header["preparation"])
        elif header.get("image"):
            preparation = Preparation.of(header["image"])
        return cls(
            task=header.get("task", "classify" if header else ""),
            model=header.get("model", "").split(".")[0],  # some older runs wrote the tag of weights with it
            model_args=renamed_options(header.get("model_args", {})),
            named=header.get("named", bool(header.get("classes"))),
            preparation=preparation,
            **known,
        )

    @classmethod
    def of_timm(cls, config: Mapping[str, Any]) -> "Description":
        """From the config.json of a folder by timm's `save_for_hf` or `push_to_hf_hub`."""
        pretrained = config.get("pretrained_cfg", config)
        classes = list(config.get("label_names") or pretrained.get("label_names") or [])
        described = config.get("label_descriptions") or pretrained.get("label_descriptions") or {}
        arguments = renamed_options(config.get("model_args") or {})
        return cls(
            task="classify",
            model=config.get("architecture", "").split(".")[0],
            model_args={k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")},
            classes=classes,
            names=[described.get(label, label) for label in classes],
            named=bool(classes),
            preparation=Preparation.of(pretrained),
        )


def renamed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the architecture by today's names: older files and recipes say `learned_slots: true`."""
    options = dict(options)
    if "learned_slots" in options:
        options["seeds"] = "learned" if options.pop("learned_slots") else "pooled"
    return options
