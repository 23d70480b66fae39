"""Numbers within bounds, as types: options are declared with them, checked by them, and explained by them in `--help`."""

import re
from dataclasses import fields
from typing import Any, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)

__all__ = ["Decay", "NonNegativeFloat", "NonNegativeInt", "Pair", "PositiveFloat", "PositiveInt", "Seed", "Share",
           "ShareAboveZero", "Side", "SideOrZero", "Workers", "check_ranges", "in_words"]  # fmt: skip

Share = ClosedUnitInterval
PositiveFloat = restricted_number_type("FiniteAboveZero", float, [(">", 0), ("<", float("inf"))])
NonNegativeFloat = restricted_number_type("FiniteFromZero", float, [(">=", 0), ("<", float("inf"))])
ShareAboveZero = restricted_number_type("ShareAboveZero", float, [(">", 0), ("<=", 1)])
Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])
Side = restricted_number_type("Side", int, (">=", 32))  # pixels: the network's stride
SideOrZero = restricted_number_type("SideOrZero", int, [("==", 0), (">=", 32)], join="or")
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # what NumPy's generators take
Workers = restricted_number_type("Workers", int, (">=", -1))
Pair = restricted_number_type("Pair", int, (">=", 2))

_COMPARED = {">": "above", ">=": "at least", "<": "below", "<=": "at most", "==": ""}


def in_words(expression: str) -> str:
    """A restriction as jsonargparse writes it, 'v>=0 and v<=1', for people: 'between 0 and 1'."""
    between = re.fullmatch(r"v>=(\S+) and v<=(\S+)", expression)
    if between:
        return f"between {between[1]} and {between[2]}"
    words = re.sub(r"v(>=|<=|==|>|<)(\S+)", lambda m: f"{_COMPARED[m[1]]} {m[2]}".strip(), expression)
    return words.replace("  ", " ")


def check_ranges(options: Any) -> None:
    """Hold the fields of a dataclass to their types' bounds, however it was made, and leave plain numbers in them.

    Raises:
        ValueError: names the field, its bounds and what it was given.
    """
    hints = get_type_hints(type(options))
    for field in fields(options):
        kind, value = hints[field.name], getattr(options, field.name)
        expression = getattr(kind, "_expression", None)
        if expression is None:
            continue
        try:
            setattr(options, field.name, kind._type(kind(value)))
        except ValueError as error:
            raise ValueError(f"{field.name} must be {in_words(expression)}, not {value}") from error
