"""The one kind of error that a person can mend: commands print it as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong, with which file, and what to do; one line."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports that come with an optional part of the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("glmix"):
            raise
        raise UserError(f"{error.name} is not installed; pip install 'glmix[{extra}]'") from error
