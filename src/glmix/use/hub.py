"""Folders that timm and the Hugging Face hub know: configuration, weights and a model card; and their upload."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from glmix import __version__
from glmix.console import say
from glmix.errors import UserError
from glmix.files import written_whole
from glmix.models import config_of
from glmix.models.description import Description

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
UNSTATED = "not stated by whoever made this folder; ask before you build on it"


def write_hub_folder(
    folder: Path, model: Any, description: Description, tensors: Mapping[str, Tensor], licence: str = "", data: str = ""
) -> None:
    """Write the three files; each is whole or not there, the card last.

    Args:
        folder: to write to; what else lies in it stays.
        model: a classifier, whose weights `tensors` are.
        description: of them.
        licence: of the weights, as the hub spells it, such as 'mit'.
        data: what they were trained on, and its licence, in words.

    Raises:
        UserError: the weights are of a head that these places do not know.
    """
    if description.head:
        raise UserError(
            f"the hub's wrappers know classifiers; this is {description.head['name']}: convert it to a file"
        )
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with written_whole(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(plain, {"format": "pt"}))
    with written_whole(folder / CONFIG, "w", encoding="utf-8") as file:
        json.dump(configuration(model, description, licence), file, indent=2, ensure_ascii=False)
    text, beside = card(description, licence, data), folder / CARD
    if beside.exists() and beside.read_text("utf-8", "replace") != text:  # cards are there to be edited
        beside = folder / f"new-{CARD}"
        say(f"{folder / CARD}: another text, which stays; the new card is {beside}")
    with written_whole(beside, "w", encoding="utf-8") as file:
        file.write(text)


def configuration(model: Any, description: Description, licence: str = "") -> dict[str, Any]:
    """config.json as timm writes it, which transformers reads too: architecture and options, classes, preparation."""
    usual, preparation = config_of(model), description.prepared
    if preparation.resize == "short":
        raise UserError("images of this checkpoint keep their aspect, which timm's configuration cannot say")
    mean, std = preparation.statistics
    pretrained = {
        "tag": "",
        "custom_load": False,
        "input_size": [preparation.channels, *preparation.size],
        "fixed_input_size": False,
        "interpolation": preparation.interpolation,
        "crop_pct": preparation.crop,
        "crop_mode": "squash" if preparation.resize == "squash" else "center",
        "mean": mean,
        "std": std,
        "num_classes": len(description.classes),
        "pool_size": None,
        "first_conv": usual["first_conv"],
        "classifier": usual["classifier"],
    }
    if licence:
        pretrained["license"] = licence
    arguments = dict(description.model_args)
    if preparation.channels != 3:
        arguments["in_chans"] = preparation.channels
    config: dict[str, Any] = {
        "architecture": description.model,
        "num_classes": len(description.classes),
        "num_features": model.num_features,
        "global_pool": "avg",
        "pretrained_cfg": pretrained,
    }
    if arguments:
        config["model_args"] = arguments
    if description.named:
        config["label_names"] = description.classes
        config["label_descriptions"] = dict(zip(description.classes, description.names, strict=True))
    return config


def card(description: Description, licence: str = "", data: str = "") -> str:
    """The model card: what it is, how good and by which command, licences, and how to load it."""
    info, height = description.info, description.prepared.size[0]
    headline = info.get("headline", "top1")
    known = info.get(f"val_{headline}")
    accuracy = (
        f"{known:.2f} % top-1 on the images held out of its training, "
        "by `glmix eval --checkpoint RUN --data DATA` (RUN: the folder or file that these weights come from)"
        if known and headline == "top1"
        else "not measured"
    )
    command = f"\n\n```bash\n{info['command']}\n```" if info.get("command") else ""
    header = ["library_name: timm", "pipeline_tag: image-classification", "tags: [image-classification, timm, glmix]"]
    header += [f"license: {licence}"] if licence else []
    names = ", ".join(description.names[:10]) + (" …" if len(description.names) > 10 else "")
    return "\n".join(
        [
            "---",
            *header,
            "---",
            f"# {description.model}",
            "",
            f"A classifier of {len(description.classes)} classes ({names}) for images of {height} px, written by glmix "
            f"{__version__}. GLNet holds an image as a fine grid and as semantic slots: "
            "[paper](https://arxiv.org/abs/2411.14429).",
            "",
            f"**Accuracy:** {accuracy}. Command of the training:{command or ' not known.'}",
            "",
            "**Licences.** Code: MIT. Weights: " + (licence or UNSTATED) + ". Data: " + (data or UNSTATED) + ".",
            "",
            "**Use**, after `pip install glmix`:",
            "",
            "```python",
            "import glmix, timm  # glmix registers the architecture",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME',
            "",
            "from transformers import pipeline",
            "",
            'pipeline("image-classification", "FOLDER")("photo.jpg")  # or OWNER/NAME',
            "```",
            "",
        ]
    )


def check_hub_folder(folder: Path) -> None:
    """Raise a UserError that names what a folder lacks, if it is none that `write_hub_folder` wrote."""
    missing = [name for name in (CONFIG, WEIGHTS, CARD) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no {', '.join(missing)} in it; write it by `glmix convert --to hub CHECKPOINT {folder}`"
        )


def push_folder(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload the three files; where they are then.

    Raises:
        UserError: no such name, no permission, or no network.
    """
    check_hub_folder(folder)
    from huggingface_hub import HfApi  # which comes with timm
    from huggingface_hub.errors import HFValidationError

    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message=message, allow_patterns=[CONFIG, WEIGHTS, CARD]
        )
    except HFValidationError as error:
        raise UserError(f"{repository}: no name of the hub ({error}); it is OWNER/NAME") from error
    except Exception as error:  # of several HTTP libraries' kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{repository}: {reason}; log in by `hf auth login`, and see that the network is there"
        ) from error
    return str(url)
