"""What a file of weights says beside its tensors: all that is needed to use them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from glmix.data.prepare import Preparation

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
        preparation: of images; None where the file does not tell.
        info: anything about the training that made them: epoch, accuracy, command, which images were held out.
    """

    task: str = ""
    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    preparation: Preparation | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """As plain data, for a file's header."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def of_header(cls, header: dict[str, Any]) -> "Description":
        """From a file's header, also of files written before there were tasks (they hold classifiers).

        A header of ours without a task is of a classifier; an empty one (a foreign file) tells nothing.
        """
        known = {k: header[k] for k in ("model", "model_args", "classes", "names", "info") if k in header}
        preparation = None
        if header.get("preparation"):
            preparation = Preparation.read(header["preparation"])
        elif header.get("image"):
            preparation = Preparation.of(header["image"])
        return cls(task=header.get("task", "classify" if header else ""), preparation=preparation, **known)
