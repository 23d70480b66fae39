"""`glmix explain`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from glmix.commands.common import load_for_images
from glmix.data.images import BadImage, read_image
from glmix.errors import UserError
from glmix.models import SHIPPED, GLNet
from glmix.models.weights import fingerprint
from glmix.tasks.explain import Look, look
from glmix.tasks.figures import is_idle, plot_attention, plot_depths, plot_patches, plot_regions, plot_slots
from glmix.tasks.slot_folder import LONGEST_NAME, Job, explain_folder
from glmix.tasks.slot_report import write_slot_report

FIGURES = ("slots", "depths", "regions", "attention", "patches")
FORMATS = ("png", "pdf", "svg")


def explain(
    images: list[str] = [],  # noqa: B006  (the command line needs a default it can print; never changed)
    out: str = "slots",
    checkpoint: str = SHIPPED,
    figures: str = ",".join(FIGURES),
    format: str = "png",  # noqa: A002  (the option's name)
    block: int = -1,
    blocks: list[int] | None = None,
    slots: int = 4,
    slot: int = -1,
    merge: float = 0.4,
    image_size: int = 0,
    normalize: bool = False,
    report: bool = False,
    folder: str = "",
    batch_size: int = 16,
) -> None:
    """Pictures of the slots: figures as in the paper, a page to play with, or a whole folder.

    Args:
        images: image files, of any size and aspect.
        out: folder for what is written.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        figures: which, of slots, depths, regions, attention, patches; with commas between, or 'none'.
        format: png, pdf or svg; several with commas between.
        block: which GLMix block, counted from 0; -1 for the last.
        blocks: those that `depths` shows side by side, as in --blocks 2 5 8; left out, the first, middle and last.
        slots: number of representative slots.
        slot: the one whose attention is drawn; -1 for the first of the representative ones.
        merge: least likeness (0 to 1) at which adjacent slots become one region.
        image_size: shorter side at which the network sees an image; 0 for that of the checkpoint.
        normalize: give every map a scale of its own.
        report: also write report.html, one page with all images that opens from disk.
        folder: instead of images: a folder whose photos all get arrays (.npz) and contact sheets; goes on after a cut.
        batch_size: photos at a time, for --folder.
    """
    if bool(images) == bool(folder):
        raise UserError("name the images, or one --folder of them" + (", not both" if images else ""))
    if slots < 1:
        raise UserError(f"--slots {slots}: at least one")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least one")
    if not 0 <= merge <= 1:
        raise UserError(f"--merge {merge}: between 0 and 1")
    if slot < -1:
        raise UserError(f"--slot {slot}: a slot's number, or -1 for the first of the representative ones")
    wanted = chosen("--figures", figures, FIGURES)
    formats = chosen("--format", format, FORMATS)
    model, described, _ = load_for_images(checkpoint, image_size)
    for number in (block, *(blocks or [])):
        check_block(model, number)
    block %= len(model.slot_mixers())
    if folder:
        if report:
            raise UserError("--report is for single images; leave out --folder, or --report")
        settings: dict[str, Any] = {
            "folder": str(Path(folder).resolve()),
            "model": described.model,
            "weights": fingerprint(model),
        }
        settings |= {"input_size": list(described.image["input_size"]), "block": block, "slots": slots, "merge": merge}
        write_folder(Path(folder), Path(out), Job(model, described.image, block, slots, merge, batch_size, settings))
        return
    if not (wanted or report):
        raise UserError("nothing to write: choose --figures, or --report")
    depths = list(dict.fromkeys(i % len(model.slot_mixers()) for i in blocks)) if blocks else spread(model)
    places = Path(out)
    places.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    draw = {
        "slots": lambda seen: plot_slots(seen.shown, seen.maps[block], count=slots, normalize=normalize),
        "depths": lambda seen: plot_depths(seen.shown, [seen.maps[i] for i in depths]),
        "regions": lambda seen: plot_regions(seen.shown, seen.maps[block], merge=merge),
        "attention": lambda seen: plot_attention(seen.shown, seen.maps[block], slot=None if slot < 0 else slot),
        "patches": lambda seen: plot_patches(seen.shown, seen.maps[block]),
    }
    looks = written(looked_at(model, described.image, images, skipped), places, {k: draw[k] for k in wanted}, formats)
    if report:
        done = write_slot_report(places / "report.html", looks, f"{described.model}, weights of {checkpoint}")
        if done:
            print(places / "report.html")
    else:
        done = [seen.name for seen in looks]
    for reason in skipped:
        print(f"skipped {reason}")
    if not done:
        raise UserError("none of the images could be read")


def chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names in `text`, in the order of `known`; 'all' and 'none' are understood."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    asked = {"all": list(known), "none": []}.get(asked[0], asked) if len(asked) == 1 else asked
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"{option} {unknown[0]}: there are {', '.join(known)}")
    return [name for name in known if name in asked]


def check_block(model: GLNet, number: int) -> None:
    """Raise a UserError with the list of those that exist, if `number` is no GLMix block."""
    names = list(model.slot_mixers())
    if not names:
        raise UserError("this model has no GLMix blocks, so no slots to look at")
    if not -len(names) <= number < len(names):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise UserError(f"no GLMix block {number}; this model has {listed}")


def spread(model: GLNet) -> list[int]:
    """The first, middle and last of the GLMix blocks."""
    count = len(model.slot_mixers())
    return sorted({0, count // 2, count - 1})


def looked_at(model: GLNet, image: dict[str, Any], paths: list[str], skipped: list[str]) -> Iterator[Look]:
    """A look at each of the photos, one at a time; unreadable ones go to `skipped`, with reasons."""
    names: set[str] = set()
    for path in paths:
        try:
            if Path(path).is_dir():
                raise BadImage(f"{path}: a folder, not an image (--folder takes one)")
            photo = read_image(path)
        except BadImage as error:
            skipped.append(str(error))
            continue
        stem = Path(path).stem.encode()[:LONGEST_NAME].decode(errors="ignore")
        name, number = stem, 2
        while name in names:  # photos of one name from several folders
            name, number = f"{stem}-{number}", number + 1
        names.add(name)
        seen = look(model, photo, image, name)
        print("{}: {} x {} pixels, seen at {} x {}".format(path, *seen.photo, *seen.seen))
        yield seen


def written(
    looks: Iterator[Look], out: Path, draw: dict[str, Callable[[Look], Figure]], formats: list[str]
) -> Iterator[Look]:
    """The looks, as their figures are written and named."""
    for seen in looks:
        idle = [maps.block for maps in seen.maps if is_idle(maps)]
        if idle:
            print(f"  slots are idle (assignment close to uniform) in {', '.join(idle)}")
        for kind, plot in draw.items():
            try:
                figure = plot(seen)
            except ValueError as error:
                raise UserError(f"{kind}: {error}") from error
            for suffix in formats:
                path = out / f"{seen.name}.{kind}.{suffix}"
                figure.savefig(path)
                print(f"  {path}")
        yield seen


def write_folder(folder: Path, out: Path, job: Job) -> None:
    """Arrays and contact sheets, with a line per sheet."""
    skipped: list[str] = []
    for sheet, done, count, bad in explain_folder(folder, out, job):
        skipped += bad
        print(f"{done}/{count}  {sheet}", flush=True)
    print(f"arrays in {out / 'arrays'}")
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")
