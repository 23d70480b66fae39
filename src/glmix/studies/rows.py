"""The rows of each study: in what its networks differ, and nothing else.

Source: the paper's ablation of the mixing block, and its road from Swin-T's layout to `glnet_4g`. Ours are `stages`,
which asks where slots are worth having, and `cost`, which asks what other networks of that size reach.
"""

from dataclasses import dataclass
from typing import Any

from glmix.errors import UserError

Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A network of a study.

    Attributes:
        options: of its architecture, which win over those of the whole study.
        model: its name in timm, where it is none of ours; the study's own options are then not for it.
    """

    options: Options
    model: str = ""


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        about: in a few words.
        rows: by name.
        base: the row that the others are compared with.
        model: the network that the rows are of, where it must be a certain one.
    """

    about: str
    rows: dict[str, Row]
    base: str
    model: str = ""


def _rows(options: dict[str, Options]) -> dict[str, Row]:
    return {name: Row(own) for name, own in options.items()}


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


def _without(*stages: int) -> Options:
    """Slots in the first three stages but for these, which keep their convolutions."""
    return {"mixers": ["local" if stage in stages else "glmix" for stage in (1, 2, 3)] + ["attention"]}


STUDIES: dict[str, Study] = {
    "integration": Study(
        "how the two branches go together",
        _rows(
            {
                name: {"integration": name}
                for name in ("parallel", "local", "global", "local-global", "global-local", "pixels")
            }
            | {"gated": {"integration": "parallel", "slot_gate": 0.0}}
        ),
        "parallel",
    ),
    "clustering": Study(
        "how pixels find their slots",
        _rows(
            {
                "soft": {"assignment": "soft", "seeds": "pooled"},
                "hard-1": {"assignment": "hard", "seeds": "pooled", "rounds": 1},
                "hard-2": {"assignment": "hard", "seeds": "pooled", "rounds": 2},
                "hard-3": {"assignment": "hard", "seeds": "pooled", "rounds": 3},
                "learned": {"assignment": "soft", "seeds": "learned"},
                "static": {"assignment": "static", "seeds": "pooled"},
            }
        ),
        "soft",
    ),
    "kernel": Study(
        "the local convolution",
        _rows({"none": {"kernel_size": 0}} | {str(size): {"kernel_size": size} for size in (3, 5, 7, 9)}),
        "5",
    ),
    "slots": Study(
        "the number of slots",
        _rows({str(side * side): {"slot_grid": [side, side]} for side in (2, 4, 6, 7, 8, 10, 12)}),
        "49",
    ),
    "attention": Study(
        "what slots tell each other",
        _rows(
            {
                f"attention-{'on' if attention else 'off'}-residual-{'on' if residual else 'off'}": {
                    "slot_attention": attention,
                    "slot_residual": residual,
                }
                for attention in (True, False)
                for residual in (True, False)
            }
        ),
        "attention-on-residual-on",
    ),
    "stages": Study(
        "which stages have slots",
        _rows(
            {
                "all": _without(),
                "without-third": _without(3),
                "without-first-two": _without(1, 2),
                "none": _without(1, 2, 3),
            }
        ),
        "all",
    ),
    "road": Study("from the layout of Swin-T to glnet_4g", _rows(_road()), "stl", "glnet_stl"),
    "cost": Study(
        "other networks at the cost of glnet_pico, in multiply-adds at 96 px and, but for EfficientViM, in parameters",
        {
            "glnet": Row({}),
            "convnext": Row({"depths": [2, 2, 10, 1], "dims": [36, 72, 144, 288]}, "convnext_atto"),
            "swin": Row(
                {"embed_dim": 32, "depths": [1, 2, 6, 1], "num_heads": [1, 2, 4, 8], "strict_img_size": False},
                "swin_tiny_patch4_window7_224",
            ),
            "efficientvim": Row({}, "efficientvim_m1"),
        },
        "glnet",
        "glnet_pico",
    ),
}


def study_named(name: str) -> Study:
    """A study by its name.

    Raises:
        UserError: there is none; names those there are.
    """
    if name not in STUDIES:
        raise UserError(f"no study {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def chosen_rows(name: str, wanted: list[str]) -> dict[str, Row]:
    """The rows of a study, or those of them that are `wanted`.

    Raises:
        UserError: it has no such row; names those it has.
    """
    rows = study_named(name).rows
    unknown = [row for row in wanted if row not in rows]
    if unknown:
        raise UserError(f"study {name} has no row {unknown[0]!r}; there are {', '.join(rows)}")
    return {row: own for row, own in rows.items() if row in wanted or not wanted}
