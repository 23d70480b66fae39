"""The README says what is so."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from glmix.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_table_of_models_is_true(capsys: pytest.CaptureFixture):
    main(["models", "--json"])
    counted = json.loads(capsys.readouterr().out)
    rows = re.findall(r"^\| `(glnet_\w+)` \| ([\d.]+) \|[^|]*\| ([\d.]+) \|[^|]*\| (\d+) \| ?([\d.]*)", README, re.M)
    assert {row[0] for row in rows} == set(counted)
    for name, parameters, gmacs, side, top1 in rows:
        assert float(parameters) == round(counted[name]["params_m"], 1), name
        assert float(gmacs) == round(counted[name]["gmacs"], 2), name
        assert int(side) == counted[name]["input"]
        assert (float(top1) if top1 else None) == (counted[name]["published"] or {}).get("top1")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands_exist(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for line in re.findall(r"^(?:srun )?glmix .*$", text, re.M):
        command, *options = shlex.split(line.split("#")[0].removeprefix("srun ").removeprefix("glmix "))
        assert command in COMMANDS, line
        for config in [b for a, b in pairwise(options) if a == "--config"]:
            assert (ROOT / config).exists(), config


def test_nothing_names_a_machine_or_a_registry():
    forbidden = re.compile(r"/work/|/root/|/tmp/|pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian")
    for folder in ("src", "recipes", "docs", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml", ".html", ".ipynb"):
                assert not forbidden.search(path.read_text()), path
