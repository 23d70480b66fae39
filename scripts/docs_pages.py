"""Pages of the site that are made of the repository's own files, so that nothing is written twice (a hook of MkDocs)."""

import ast
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # of the site, and the files that they are
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "weights.md": "src/glmix/shipped/README.md",
    "golden.md": "tests/golden/README.md",
}
FILES = ("LICENSE", "CITATION.cff")  # that pages link to
# of the package; a page of the API each
WINGS = ("data", "models", "export", "training", "tasks", "slots", "use", "studies")
TOP = {  # what `import glmix` gives, and where it is defined
    "create_model": "glmix.models.load.create_model",
    "optimize_for_inference": "glmix.models.fold.optimize_for_inference",
    "slot_maps": "glmix.models.slot_maps.slot_maps",
    "SlotMaps": "glmix.models.slot_maps.SlotMaps",
    "plot_slots": "glmix.slots.figures.plot_slots",
    "representative_slots": "glmix.slots.representatives.representative_slots",
    "UserError": "glmix.errors.UserError",
}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """The pages that docs/ has not."""
    made = {page: (ROOT / file).read_text("utf-8") for page, file in PAGES.items()}
    made |= {"recipes.md": recipes(), "api/index.md": top_level()}
    made |= {f"api/{wing}.md": modules_of(wing) for wing in WINGS}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for file in FILES:
        files.append(File.generated(config, file, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are right in the repository become those that are right in the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(here, f"docs/{here}"))

    def moved(link: re.Match[str]) -> str:
        place = place_in_site(posixpath.normpath(posixpath.join(folder, link[1])))
        return posixpath.relpath(place, posixpath.dirname(here) or ".") if place else link[1]

    return LINK.sub(moved, markdown)


def place_in_site(path: str) -> str:
    """Where a file or folder of the repository is found in the site; '' where it is not."""
    pages = {file: page for page, file in PAGES.items()}
    if path.split("/")[0] == "recipes":
        return "recipes.md"
    return path if path in FILES else pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")


def recipes() -> str:
    """Every recipe: how it is started and what it takes and reaches, as its head says, and its options."""
    parts = [
        "# Recipes",
        "A recipe is a flat file of options: `glmix train --config RECIPE`; options given beside it win. "
        "What is said of each here is the head of its file.",
    ]
    folder = ""
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.parent.name != folder:
            folder = path.parent.name
            parts.append(f"## {folder}")
        commands, about, options = head_of(path)
        listing = "\n".join(f"    {line}" for line in ["```yaml", *options.strip().splitlines(), "```"])
        parts += [
            f"### {path.stem}",
            f"```bash\n{commands}\n```",
            about,
            f'??? note "{path.relative_to(ROOT)}"\n\n{listing}',
        ]
    return "\n\n".join(parts) + "\n"


def head_of(path: Path) -> tuple[str, str, str]:
    """Commands, description and options of a recipe: its first lines of comment, those after the empty one, the rest."""
    lines = path.read_text("utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = "\n".join(line.removeprefix("#").strip() for line in lines[:end])
    commands, _, about = head.partition("\n\n")
    wrapped = [textwrap.wrap(c, 84, break_long_words=False, break_on_hyphens=False) for c in commands.splitlines()]
    commands = "\n".join(" \\\n    ".join(parts) for parts in wrapped)
    return commands, re.sub(r"\bdocs/(\w+)\.md\b", r"[\1](\1.md)", about), "\n".join(lines[end:])


def top_level() -> str:
    """The page of what `import glmix` gives: each name, the first sentence of its docstring, and where the rest is."""
    parts = ["# glmix", "`import glmix` registers the backbones in timm, and gives:", "| name | |\n|---|---|"]
    for name, place in TOP.items():
        module, _, own = place.rpartition(".")
        tree = ast.parse((ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text("utf-8"))
        found = next(node for node in tree.body if getattr(node, "name", "") == own)
        assert isinstance(found, (ast.FunctionDef, ast.ClassDef))
        about = (ast.get_docstring(found) or "").split("\n\n")[0].replace("\n", " ")
        parts[-1] += f"\n| [`glmix.{name}`][{place}] | {about} |"
    parts.append(
        "What lies below it is on a page for each part of the package, in the order of the [layers](../architecture.md)."
    )
    parts.append("::: glmix.errors")
    return "\n\n".join(parts) + "\n"


def modules_of(wing: str) -> str:
    """The page of a part of the package: all its modules."""
    names = sorted(path.stem for path in (ROOT / "src" / "glmix" / wing).glob("*.py"))
    modules = [f"glmix.{wing}" + ("" if name == "__init__" else f".{name}") for name in names]
    return "\n\n".join([f"# glmix.{wing}", *(f"::: {module}" for module in modules)]) + "\n"
