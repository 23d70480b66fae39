"""The one kind of error that a person can mend: commands print it as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong, with which file, and what to do; one line."""

    status = 2  # of the command that it ends


class Stopped(UserError):  # noqa: N818  (no error of the program)
    """A run that a signal stopped, with all it needs to go on; its exit status is the shell's for that signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports that come with an optional part of the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("glmix"):
            raise
        package = str(error.name).split(".")[0]
        raise UserError(f"{package} is not installed; pip install 'glmix[{extra}]'") from error
