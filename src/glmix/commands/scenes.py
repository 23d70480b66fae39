"""`glmix scenes`."""

from pathlib import Path

from glmix.data.scenes import write_scenes
from glmix.errors import UserError


def scenes(out: str, count: int = 16, seed: int = 0, size: int = 96) -> None:
    """Write generated scenes: class folders of images, and annotations.json with boxes and masks (COCO format).

    Args:
        out: folder to write.
        count: number of scenes.
        seed: other seeds give other scenes.
        size: side in pixels.
    """
    if count < 1 or size < 32:
        raise UserError(f"--count {count} --size {size}: at least 1 scene of at least 32 px")
    print(f"{len(write_scenes(Path(out), count, seed, size))} scenes in {out}")
