"""What several test modules use."""

import pytest

from glmix.cli import main


def output(capsys: pytest.CaptureFixture, *arguments: object, status: int = 0) -> str:
    assert main([str(a) for a in arguments]) == status, capsys.readouterr().err
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line that a mistake gets."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("glmix: "), lines
    return lines[0]
