"""The `glmix` command as it starts: what it can answer by itself it says before PyTorch and timm are loaded."""

import os
import sys

COMMANDS = {
    "train": "train a model on your images",
    "study": "train variants side by side, and compare them",
    "eval": "accuracy of a model on labelled images",
    "predict": "what a model sees in images",
    "embed": "features of images, for search and classifiers of your own",
    "segment": "masks from a classifier that learned from image labels alone",
    "explain": "pictures of the slots",
    "slots": "how well slots match the masks of objects, and what they are worth to a classifier",
    "label-tokens": "dense labels of training images, by a teacher",
    "check-data": "what of a data set cannot be used, and why",
    "export": "a model as a file for onnxruntime, OpenVINO or PyTorch",
    "bench": "speed and memory of models, engines and precisions, side by side",
    "models": "the variants, their size and published accuracy",
    "convert": "a checkpoint as a safetensors file, or as a folder for timm and the Hugging Face hub",
    "push": "upload such a folder to the hub",
    "scenes": "write generated scenes with labels, boxes and masks",
    "doctor": "versions, devices, and what is missing: paste it into an issue",
}


def usage() -> str:
    """The table of commands."""
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: glmix COMMAND [options]", "", *lines, "", "glmix COMMAND --help shows the options of a command."]
    )


def main() -> int:
    """As `glmix.cli.main`."""
    if sys.argv[1:2] in ([], ["-h"], ["--help"], ["help"]) and sys.stdout is not None:
        try:
            print(usage(), flush=True)
        except BrokenPipeError:  # `glmix | head -3`; what Python flushes at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return 0
    from glmix.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
