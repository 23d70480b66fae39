"""The site builds, stands alone, and its pages say what is so."""

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pages import PAGES, ROOT, arguments, blocks, commands

import glmix
from glmix import tasks
from glmix.cli import COMMANDS, main, parse
from glmix.commands.study import StudyOptions

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
PLACEHOLDERS = ("COMMAND", "TASK", "count")  # the last is run below
# none imports what comes after it
LAYERS = ("", "data", "models", "export", "training", "tasks", "slots", "use", "studies", "commands")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: every page is in the navigation, and every link and anchor leads somewhere."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_module_is_in_the_api(site: Path):
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for wing in LAYERS[1:-1]:
        for module in (ROOT / "src" / "glmix" / wing).glob("*.py"):
            if module.stem != "__init__":
                assert f'id="glmix.{wing}.{module.stem}"' in pages, module
    for name in glmix.__all__:
        assert f">glmix.{name}<" in (site / "api" / "index.html").read_text(), name
    options = (site / "api" / "tasks.html").read_text()
    assert "alpha of cutmix; 0 for none" in options


def test_every_recipe_is_shown_with_its_command_and_options(site: Path):
    page = re.sub(r"<[^>]+>", "", (site / "recipes.html").read_text())
    words = " ".join(page.replace("\\\n", " ").split())
    for recipe in RECIPES:
        head, _, about = recipe.read_text().partition("\n#\n")
        assert head.splitlines()[0].removeprefix("# ") in words, recipe
        assert about.splitlines()[0].removeprefix("# ").split(" docs/")[0][:60] in words, recipe
        assert recipe.read_text().splitlines()[-1] in page, recipe


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]+', text), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="(?:https?:)?//', text), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_the_start_is_the_readme(site: Path):
    page = (site / "index.html").read_text()
    assert "Look into the slots" in page
    for target in ("data.html", "train.html", "clusters.html", "recipes.html", "weights.html", "LICENSE"):
        assert target == "LICENSE" or f'href="{target}"' in page, target


def shown() -> list[tuple[str, list[str]]]:
    """Every command of a page or a recipe's head, with where it stands."""
    found = [(page.name, command) for page in PAGES for command in commands(page.read_text())]
    for recipe in RECIPES:
        lines = [line.removeprefix("# ") for line in recipe.read_text().splitlines() if line.startswith("# ")]
        found += [(recipe.stem, arguments(line)) for line in lines if re.match(r"glmix |torchrun ", line)]
    return found


@pytest.mark.parametrize(
    ("page", "command"), shown(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_commands_are_understood(page: str, command: list[str], monkeypatch: pytest.MonkeyPatch):
    """Parsed against the real options; names of files need not exist, but for recipes."""
    monkeypatch.chdir(ROOT)
    name, *options = command
    if set(PLACEHOLDERS) & set(command):
        return
    assert name in COMMANDS
    for config in [after for before, after in pairwise(options) if before == "--config" and after != "RECIPE"]:
        assert Path(config).is_file()
    if "--help" in options:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    elif options and "RECIPE" not in options:
        parse(name, options)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_in_sentences_exist(page: Path):
    """Whatever a page calls `--something` is an option of some command."""
    known = {"version", "help", "config"}
    for name in COMMANDS:
        module = ast.parse((ROOT / "src" / "glmix" / "commands" / f"{name.replace('-', '_')}.py").read_text())
        functions = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == name.replace("-", "_")]
        known |= {argument.arg for function in functions for argument in function.args.args}
    for task in tasks.TASKS.values():
        known |= set(task.options.__dataclass_fields__)
    known |= set(StudyOptions.__dataclass_fields__)
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    asked = {
        name.replace("-", "_")
        for code in re.findall(r"`([^`]+)`", text)
        for name in re.findall(r"--([a-z][\w-]*)", code)
    }
    assert asked <= known, asked - known


def test_the_table_of_performance_is_the_readmes():
    rows = {
        tuple(re.findall(r"`?[\w.]+`?", row))
        for row in (ROOT / "docs/performance.md").read_text().splitlines()
        if row.startswith("| `glnet")
    }
    theirs = set()
    for row in (ROOT / "README.md").read_text().splitlines():
        if row.startswith("| `glnet"):
            cells = [cell.strip() for cell in row.split("|")]
            theirs.add((cells[1], cells[2], cells[4], cells[6]))
    assert rows == theirs


def test_layers():
    """Nothing imports what stands above it, and models know of data no more than how pictures are prepared."""
    package = ROOT / "src" / "glmix"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts in {("cli",), ("__init__",)}:
            continue
        wing = parts[0] if len(parts) > 1 else ""
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [name for name in names if name.startswith("glmix.")]:
                below = name.split(".")[1]
                layer = below if below in LAYERS else ""
                assert LAYERS.index(layer) <= LAYERS.index(wing), f"{path}: {name}"
                if wing == "models" and layer == "data":
                    assert name == "glmix.data.prepare", f"{path}: {name}"


def test_a_task_of_ones_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The task that the page on the architecture works out: trained, gone on with, evaluated and asked."""
    numbers = tmp_path / "numbers"
    for split in ("train", "val"):
        for name, number in (("red_thing", "1"), ("blue_thing", "3.5")):
            (numbers / split).mkdir(parents=True, exist_ok=True)
            os.symlink(photos / split / name, numbers / split / number)
    module, line = blocks((ROOT / "docs" / "architecture.md").read_text(), "python")[:2]
    (tmp_path / "count_task.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    from count_task import COUNT  # type: ignore[import-not-found]

    assert "COUNT" in line
    monkeypatch.setitem(tasks.TASKS, "count", COUNT)
    small = "--batch-size 8 --image-size 32 --workers 0 --precision fp32 --delta 0.5".split()
    run = str(tmp_path / "run")
    command = ["train", "--task", "count", "--data", str(numbers), "--out", run, "--epochs", "1", *small]
    assert main(command) == 0, capsys.readouterr().err
    assert main(["train", "--resume", "--out", run, "--epochs", "2"]) == 0, capsys.readouterr().err
    assert "off by" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", run, "--data", str(numbers)]) == 0
    assert "nearness" in capsys.readouterr().out
    photo = str(next((numbers / "val" / "1").iterdir()))
    assert main(["predict", "--checkpoint", run, photo]) == 0
    assert re.search(r": -?\d+\.\d$", capsys.readouterr().out.strip())
