"""`glmix push`."""

from pathlib import Path

from glmix.use.hub import push_folder


def push(source: str, repository: str, private: bool = False, message: str = "Weights and card") -> None:
    """Upload a folder that `glmix convert --to hub` wrote to the Hugging Face hub, as whoever is logged in there.

    Args:
        source: the folder; its config.json, model.safetensors and README.md are sent, nothing else.
        repository: OWNER/NAME; made if it is not there.
        private: make it one that others cannot see.
        message: of the commit.
    """
    print(push_folder(Path(source), repository, private, message))
