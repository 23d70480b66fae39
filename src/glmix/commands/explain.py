"""`glmix explain`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from PIL.Image import Image

from glmix.commands.common import load_with_slots, print_skipped, set_slots
from glmix.data.images import BadImage, read_image
from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped
from glmix.errors import UserError
from glmix.files import check_folder, plain_name
from glmix.models import SHIPPED, GLNet
from glmix.models.glnet import Attention, GLMix
from glmix.models.weights import fingerprint
from glmix.slots.figures import (
    idle_at,
    plot_attention,
    plot_depths,
    plot_found,
    plot_paper,
    plot_patches,
    plot_regions,
    plot_slots,
    save_figure,
)
from glmix.slots.folder import LONGEST_NAME, Job, explain_folder
from glmix.slots.look import Look, look
from glmix.slots.report import write_slot_report
from glmix.tasks import task_named
from glmix.training.processes import gathered, join_processes
from glmix.use.predictions import found_in

FIGURES = {  # and the options that each uses
    "slots": ("block", "slots", "normalize"),
    "depths": ("blocks",),
    "regions": ("block", "merge"),
    "attention": ("block", "slot"),
    "patches": ("block",),
    "found": ("block",),  # of a detector or segmenter
}
PAPER = {"paper": ("blocks", "slots")}  # the one figure of the paper's style
PAPER_BLOCKS = (1, 4, 9)  # the second, fifth and tenth
FOLDER = ("block", "slots", "merge", "batch_size")  # the options that --folder uses
FORMATS = ("png", "pdf", "svg")


def explain(
    images: list[str] = [],  # noqa: B006  (the command line needs a default it can print; never changed)
    out: str = "slots",
    checkpoint: str = SHIPPED,
    style: Literal["glmix", "paper"] = "glmix",
    figures: str | None = None,
    format: str | None = None,  # noqa: A002  (the option's name)
    block: int | None = None,
    blocks: list[int] | None = None,
    slots: int | None = None,
    slot: int | None = None,
    merge: float | None = None,
    merge_seeds: str = "",
    image_size: int = 0,
    normalize: bool = False,
    report: bool = False,
    folder: str = "",
    batch_size: int | None = None,
    fast: bool = False,
) -> int:
    """Pictures of the slots: figures as in the paper, a page to play with, or a whole folder.

    Args:
        images: image files, of any size and aspect.
        out: folder for what is written.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        style: glmix, or paper: one figure in the paper's form, of the second, fifth and tenth block where --blocks names
            no others.
        figures: which, of slots, depths, regions, attention, patches and, of a detector or segmenter, found: what it finds
            beside its slots; with commas between, or 'none'; left out, all.
        format: png, pdf or svg; several with commas between; left out, png.
        block: which GLMix block, counted from 0; left out (or -1), the last.
        blocks: those that `depths` shows side by side, as in --blocks 2 5 8; left out, the first, middle and last.
        slots: number of representative slots; left out, 4.
        slot: the one whose attention is drawn; left out (or -1), the first of the representative ones.
        merge: least likeness (0 to 1) at which adjacent slots become one region; left out, 0.4.
        merge_seeds: how many slots the network has for an image: auto, a number or a threshold, as --slots of `glmix eval`; left
            out, all of its grid.
        image_size: shorter side at which the network sees an image; 0 for that of the checkpoint.
        normalize: give every map a scale of its own.
        report: also write report.html, one page with all images that opens from disk.
        folder: instead of images: a folder whose photos all get arrays (.npz) and contact sheets; goes on after a cut.
        batch_size: photos at a time, for --folder; left out, 16.
        fast: fold the network first (glmix.optimize_for_inference): the same maps, sooner.
    """
    if bool(images) == bool(folder):
        raise UserError("name the images, or one --folder of them" + (", not both" if images else ""))
    if style == "paper":
        refuse("--figures", figures is not None, "the paper's style has one figure of its own")
        refuse("--style", bool(folder), "of no use with --folder")
    wanted = ["paper"] if style == "paper" else chosen("--figures", figures or "all", list(FIGURES))
    formats = chosen("--format", format or "png", FORMATS)
    check_folder("--out", out)
    if not (wanted or report or folder):
        raise UserError("nothing to write: choose --figures, or --report")
    given = {"block": block, "blocks": blocks, "slots": slots, "slot": slot, "merge": merge, "format": format,
             "normalize": normalize or None, "batch_size": batch_size}  # fmt: skip
    if folder:
        refuse_unused(given | {"figures": figures, "report": report or None}, FOLDER, "of no use with --folder")
    else:
        refuse("--batch-size", batch_size is not None, "only with --folder")
        used = {option for name in wanted for option in (FIGURES | PAPER)[name]} | ({"format"} if wanted else set())
        refuse_unused(given, used, f"of no use for the figures asked for ({', '.join(wanted) or 'none'})")
    block, slot, slots = filled(block, -1), filled(slot, -1), filled(slots, 4)
    merge, batch_size = filled(merge, 0.4), filled(batch_size, 16)
    if slots < 1:
        raise UserError(f"--slots {slots}: at least one")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least one")
    if not 0 <= merge <= 1:
        raise UserError(f"--merge {merge}: between 0 and 1")
    if slot < -1:
        raise UserError(f"--slot {slot}: a slot's number, or -1 for the first of the representative ones")
    whole, model, described = load_with_slots(checkpoint, image_size, fast)
    task = task_named(described.task or "classify")
    if "found" in wanted and task.draw is None:
        refuse("--figures found", figures not in (None, "all"), f"{checkpoint} is for {task.name}, which draws nothing")
        wanted.remove("found")
    set_slots(model, merge_seeds, "--merge-seeds")
    for number in (block, *(blocks or [])):
        check_block(model, number)
    block %= len(model.slot_mixers())
    counts = [slots_of_an_image(mixer) for mixer in model.slot_mixers().values()]
    fewest = min(counts)
    if given["slots"] and slots > fewest:
        raise UserError(f"--slots {slots}: this network has {fewest} slots, of which so many cannot be representative")
    preparation = described.prepared
    if "attention" in wanted and not isinstance(list(model.slot_mixers().values())[block].slot_attn, Attention):
        refuse("--figures attention", figures not in (None, "all"), "slots of this block do not attend to each other")
        wanted.remove("attention")
    if folder:
        settings = {"model": described.model, "model_args": described.model_args, "weights": fingerprint(model)}
        settings |= {"merge_seeds": merge_seeds} if merge_seeds else {}
        job = Job(model, preparation, block, slots, merge, batch_size, settings)
        return int(write_folder(Path(folder), Path(out), job) > 0)
    count = len(model.slot_mixers())
    usual = [i for i in PAPER_BLOCKS if i < count] if style == "paper" else spread(model)
    depths = list(dict.fromkeys(i % count for i in blocks)) if blocks else usual or spread(model)
    places = Path(out)
    last = counts[block] - 1
    if slot > last:
        raise UserError(f"--slot: no slot {slot}; this block has 0 to {last}")
    places.mkdir(parents=True, exist_ok=True)
    skipped: list[Skipped] = []
    draw: dict[str, Callable[[Look], Figure]] = {
        "slots": lambda seen: plot_slots(seen.shown, seen.maps[block], count=slots, normalize=normalize),
        "depths": lambda seen: plot_depths(seen.shown, [seen.maps[i] for i in depths]),
        "regions": lambda seen: plot_regions(seen.shown, seen.maps[block], merge=merge),
        "attention": lambda seen: plot_attention(seen.shown, seen.maps[block], slot=None if slot < 0 else slot),
        "patches": lambda seen: plot_patches(seen.shown, seen.maps[block]),
        "paper": lambda seen: plot_paper(seen.shown, [seen.maps[i] for i in depths], count=slots),
        "found": lambda seen: plot_found(seen.shown, seen.found or seen.shown, seen.maps[block]),
    }
    find = partial(found_in, task, whole, described) if "found" in wanted else None
    seen = looked_at(model, preparation, images, skipped, find)
    looks = written(seen, places, {k: draw[k] for k in wanted}, formats)
    if report:
        done = write_slot_report(places / "report.html", looks, f"{described.model}, weights of {checkpoint}")
        if done:
            print(places / "report.html")
    else:
        done = [seen.name for seen in looks]
    for one in skipped:
        print(f"skipped {one}")
    if not done:
        raise UserError("none of the images could be read")
    return int(bool(skipped))


def slots_of_an_image(mixer: GLMix) -> int:
    """How many slots an image has in a block; at most, where each image has its own number."""
    if mixer.merging is not None and mixer.merging.budget is not None:
        return mixer.merging.budget
    seeds: Any = mixer.seeds
    return seeds.count()


def filled(given: Any, usual: Any) -> Any:
    """The option's value, or the usual one where it was left out."""
    return usual if given is None else given


def refuse(option: str, given: bool, why: str) -> None:
    """Raise a UserError if an option was given that would change nothing."""
    if given:
        raise UserError(f"{option}: {why}; leave it out")


def refuse_unused(given: dict[str, Any], used: Collection[str], why: str) -> None:
    """`refuse` every option that was given (is not None) and is not among the `used` ones."""
    for name, value in given.items():
        refuse(f"--{name.replace('_', '-')}", value is not None and name not in used, why)


def chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
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
    if not -len(names) <= number < len(names):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise UserError(f"no GLMix block {number}; this model has {listed}")


def spread(model: GLNet) -> list[int]:
    """The first, middle and last of the GLMix blocks."""
    count = len(model.slot_mixers())
    return sorted({0, count // 2, count - 1})


def looked_at(
    model: GLNet,
    preparation: Preparation,
    paths: list[str],
    skipped: list[Skipped],
    find: Callable[[Image], Image] | None = None,
) -> Iterator[Look]:
    """A look at each of the photos, one at a time, with what `find` draws; unreadable ones go to `skipped`."""
    names: set[str] = set()
    for path in paths:
        try:
            if Path(path).is_dir():
                raise BadImage(path, "a folder, not an image (--folder takes one)")
            photo = read_image(path)
        except BadImage as error:
            skipped.append(Skipped(error.name, error.reason))
            continue
        stem = plain_name(Path(path).stem, LONGEST_NAME)
        name, number = stem, 2
        while name in names:  # photos of one name from several folders
            name, number = f"{stem}-{number}", number + 1
        names.add(name)
        seen = look(model, photo, preparation, name)
        seen.found = find(photo) if find else None
        print("{}: {} x {} pixels, seen at {} x {}".format(path, *seen.photo, *seen.seen))
        yield seen


def written(
    looks: Iterator[Look], out: Path, draw: dict[str, Callable[[Look], Figure]], formats: list[str]
) -> Iterator[Look]:
    """The looks, as their figures are written and named."""
    for seen in looks:
        idle = [maps.block for maps in seen.maps if idle_at(maps, 0)]
        if idle:
            print(f"  slots are idle (assignment close to uniform) in {', '.join(idle)}")
        for kind, plot in draw.items():
            try:
                figure = plot(seen)
            except ValueError as error:
                raise UserError(f"{kind}: {error}") from error
            for suffix in formats:
                path = out / f"{seen.name}.{kind}.{suffix}"
                save_figure(figure, path)
                print(f"  {path}")
        yield seen


def write_folder(folder: Path, out: Path, job: Job) -> int:
    """Arrays and contact sheets, with a line per sheet; how many photos could not be read (of other processes' none)."""
    skipped: list[Skipped] = []
    processes = join_processes()
    for sheet, done, count, bad in explain_folder(folder, out, job, processes):
        skipped += bad
        print(f"{done}/{count}  {sheet}", flush=True)
    skipped = [found for part in gathered(skipped) for found in part]
    if not processes.first:
        return 0
    print(f"arrays in {out / 'arrays'}")
    print_skipped(skipped)
    return len(skipped)
