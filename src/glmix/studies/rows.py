"""The rows of each study: options of the network, and nothing else, in which a row differs from the others.

Source: the paper's ablation of the mixing block, and its road from Swin-T's layout to `glnet_4g`.
"""

from dataclasses import dataclass, field
from typing import Any

from glmix.errors import UserError

Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        about: in a few words.
        rows: options of each row's network, by the row's name.
        model: the network that the rows are of, where it must be a certain one.
    """

    about: str
    rows: dict[str, Options] = field(default_factory=dict)
    model: str = ""


def _road() -> dict[str, Options]:
    """Each row has the options of the one before it, and one more."""
    steps: dict[str, Options] = {
        "stl": {},
        "overlapping-stem": {"overlap_stem": True},
        "overlapping-transitions": {"overlap_transitions": True},
        "position-convolution": {"pos_conv": True},
        "mlp-convolution": {"mlp_conv": True},
        "hybrid-third-stage": {"mixers": ["glmix", "glmix", "alternate", "attention"]},
        "deeper-narrower": {"dims": [64, 128, 256, 512], "depths": [4, 4, 18, 4], "mlp_ratio": 3.0},
    }
    rows: dict[str, Options] = {}
    options: Options = {}
    for name, step in steps.items():
        options = options | step
        rows[name] = options
    return rows


STUDIES: dict[str, Study] = {
    "integration": Study(
        "how the two branches go together",
        {
            name: {"integration": name}
            for name in ("parallel", "local", "global", "local-global", "global-local", "pixels")
        },
    ),
    "clustering": Study(
        "how pixels find their slots",
        {
            "soft": {"assignment": "soft"},
            "hard-1": {"assignment": "hard", "rounds": 1},
            "hard-2": {"assignment": "hard", "rounds": 2},
            "hard-3": {"assignment": "hard", "rounds": 3},
            "learned": {"seeds": "learned"},
            "static": {"assignment": "static"},
        },
    ),
    "kernel": Study(
        "the local convolution",
        {"none": {"kernel_size": 0}} | {str(size): {"kernel_size": size} for size in (3, 5, 7, 9)},
    ),
    "slots": Study(
        "the number of slots",
        {str(side * side): {"slot_grid": [side, side]} for side in (2, 4, 6, 7, 8, 10, 12)},
    ),
    "attention": Study(
        "what slots tell each other",
        {
            f"attention-{'on' if attention else 'off'}-residual-{'on' if residual else 'off'}": {
                "slot_attention": attention,
                "slot_residual": residual,
            }
            for attention in (True, False)
            for residual in (True, False)
        },
    ),
    "road": Study("from the layout of Swin-T to glnet_4g", _road(), "glnet_stl"),
}


def study_named(name: str) -> Study:
    """A study by its name.

    Raises:
        UserError: there is none; names those there are.
    """
    if name not in STUDIES:
        raise UserError(f"no study {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def chosen_rows(name: str, wanted: list[str]) -> dict[str, Options]:
    """The rows of a study, or those of them that are `wanted`.

    Raises:
        UserError: it has no such row; names those it has.
    """
    rows = study_named(name).rows
    unknown = [row for row in wanted if row not in rows]
    if unknown:
        raise UserError(f"study {name} has no row {unknown[0]!r}; there are {', '.join(rows)}")
    return {row: options for row, options in rows.items() if row in wanted or not wanted}
