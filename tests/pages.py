"""The commands that pages show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTED = re.compile(r"^(?:srun |torchrun .*?-m glmix\.cli )?(?:glmix )?")


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """Arguments of every `glmix …` in a page, without "glmix", in their order: lines of blocks, and code in sentences."""
    found = re.findall(r"^```\w*\n(.*?)^```|(?<!`)`(glmix [^`]+)`(?!`)", text, re.S | re.M)
    lines = [line for block, inline in found for line in (block or inline).replace("\\\n", " ").splitlines()]
    return [arguments(line) for line in lines if is_command(line)]


def is_command(line: str) -> bool:
    return bool(re.match(r"(srun )?glmix |torchrun .*-m glmix\.cli ", line))


def arguments(line: str) -> list[str]:
    """Those of a command line, whatever starts it, without what follows it as a remark."""
    return shlex.split(STARTED.sub("", line), comments=True)
