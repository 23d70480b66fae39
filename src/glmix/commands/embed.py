"""`glmix embed`."""

from pathlib import Path
from typing import Any

from glmix.commands.common import check_apart, load_for_images, load_for_slots, pick_device, pictures_for
from glmix.errors import UserError
from glmix.models import SHIPPED, network_of
from glmix.models.weights import fingerprint
from glmix.ranges import NonNegativeInt, Workers
from glmix.training.processes import join_processes
from glmix.use.features import ENDINGS, as_text, embedding, embedding_slots, write_features
from glmix.use.tables import check_ending


def embed(
    sources: list[str],
    out: str,
    checkpoint: str = SHIPPED,
    layer: str = "head",
    slots: bool = False,
    block: int = -1,
    image_size: int = 0,
    batch_size: NonNegativeInt = 0,
    workers: Workers = -1,
) -> int:
    """Features of images, for search and classifiers of your own; the same command goes on where it was cut.

    Exits with 1 where some images could not be read; these are named, and are not in the file.

    Args:
        sources: images, folders, patterns, tars, tables of paths, parquet, hf:OWNER/NAME, scenes; - for names on
            standard input.
        out: file of the features, .parquet (a row an image, or a slot) or .npz.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        layer: head, what the classifier sees; or stage0 to stage3, the mean of a stage's grid.
        slots: instead, what each slot gathered: vectors of an image's parts, with their boxes and areas.
        block: of --slots: which GLMix block, counted from 0; -1 for the last.
        image_size: side of the images; 0 for that of the checkpoint.
        batch_size: images at a time; 0 chooses.
        workers: processes that load images; -1 chooses.
    """
    place = Path(out)
    check_ending(place, ENDINGS)
    if slots and layer != "head":
        raise UserError("--layer: of no use with --slots, which are those of a --block; leave it out")
    if block != -1 and not slots:
        raise UserError(f"--block {block}: of --slots; without them there is --layer")
    processes = join_processes()
    check_apart(out, sources)
    source = pictures_for(sources, processes)
    if slots:
        net, described = load_for_slots(checkpoint, image_size)
        count = len(net.slot_mixers())
        if not -count <= block < count:
            raise UserError(f"--block {block}: this model has {count} GLMix blocks, counted from 0")
        stream = embedding_slots(net, described.prepared, block, source, pick_device(), batch_size, workers)
    else:
        model, described = load_for_images(checkpoint, image_size)
        net = network_of(model)
        stream = embedding(net, described.prepared, layer, source, pick_device(), batch_size, workers)
    settings: dict[str, Any] = {
        "command": "embed",
        "weights": fingerprint(net),
        "preparation": described.prepared.asdict(),
    }
    settings |= {"layer": layer, "slots": slots, "block": block}
    journal = as_text(stream).kept(place, settings, processes)
    if not processes.first:
        return 0
    failed = write_features(journal, source, place)
    journal.remove()
    print(f"{out}: {len(source) - len(failed)} images")
    for one in failed:
        print(f"skipped {one}")
    return int(bool(failed))
