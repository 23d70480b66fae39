"""Images with a mask of their objects: a folder in PASCAL VOC's layout, or generated scenes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glmix.data.images import BadImage, read_image
from glmix.data.scenes import SceneSet, scene_split
from glmix.errors import UserError

VOID = 255  # in a mask: neither object nor background


class MaskedImages(Protocol):
    """Images by index, with masks of their objects."""

    def __len__(self) -> int: ...

    def read_with_mask(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """The RGB image at `index`, and its mask (H, W): 0 background, 1 and on its objects, `VOID`."""
        ...


class MaskedScenes(SceneSet):
    """Generated scenes with their instance masks."""

    def read_with_mask(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        scene = self.scene(index)
        return Image.fromarray(scene.image), scene.instances


@dataclass(frozen=True)
class VOCMasks:
    """The images of one split of a folder in PASCAL VOC's layout, with their SegmentationObject masks.

    Attributes:
        root: the folder with JPEGImages/ and SegmentationObject/.
        files: names of the images, without suffix.
    """

    root: Path
    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def read_with_mask(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """The RGB image at `index`, and its mask (H, W): 0 background, 1 and on its objects, `VOID`.

        Raises:
            BadImage: either cannot be read, or they differ in size.
        """
        name = self.files[index]
        image = read_image(self.root / "JPEGImages" / f"{name}.jpg")
        path = self.root / "SegmentationObject" / f"{name}.png"
        try:
            with Image.open(path) as file:
                mask = np.array(file)
        except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
            raise BadImage(f"{path}: {str(error).splitlines()[0][:100]}") from error
        if mask.shape != (image.height, image.width):
            raise BadImage(f"{path}: the mask's size is not the image's")
        return image, mask


def open_masks(source: str, split: str = "val") -> MaskedImages:
    """The images of `source` and their masks: 'scenes', or a folder in VOC's layout (or one that holds such a folder).

    Raises:
        UserError: neither.
    """
    if source == "scenes":
        usual = scene_split(split)
        return MaskedScenes(len(usual), usual.seed, usual.size)
    root = Path(source)
    inside = [root, *sorted(root.glob("*")), *sorted(root.glob("VOCdevkit/*"))] if root.is_dir() else []
    found = next((p for p in inside if (p / "SegmentationObject").is_dir() and (p / "JPEGImages").is_dir()), None)
    if found is None:
        raise UserError(
            f"{source}: no folder in PASCAL VOC's layout (JPEGImages/, SegmentationObject/, ImageSets/Segmentation/{split}.txt)"
            + ("; unpack the tar first" if root.is_file() else "; or use --data scenes")
        )
    listed = found / "ImageSets" / "Segmentation" / f"{split}.txt"
    if listed.is_file():
        names = listed.read_text().split()
    else:
        names = sorted(p.stem for p in (found / "SegmentationObject").glob("*.png"))
    if not names:
        raise UserError(f"{listed if listed.is_file() else found / 'SegmentationObject'}: no images named there")
    return VOCMasks(found, names)
