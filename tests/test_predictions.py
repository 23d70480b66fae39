"""What the shipped weights see in photos that come with scikit-image, written down: names, numbers, and mirrored photos."""

import json
from pathlib import Path

import pytest
import skimage
from helpers import output
from PIL import Image, ImageOps

PHOTOS = Path(skimage.__file__).parent / "data"
SEEN = {
    "coffee.png": ("cassette player", 0.5136),
    "rocket.jpg": ("church", 0.9480),
    "astronaut.png": ("French horn", 0.5794),
}  # there is no coffee and no rocket among Imagenette's ten classes


@pytest.mark.parametrize("name", SEEN)
def test_photos_are_seen_as_ever(name: str, capsys: pytest.CaptureFixture):
    row = json.loads(output(capsys, "predict", PHOTOS / name, "--top", 1, "--json"))
    label, probability = SEEN[name]
    (found,) = row["predictions"]
    assert (found["name"], found["probability"]) == (label, pytest.approx(probability, abs=0.02))


def test_a_mirrored_photo_is_another(tmp_path: Path, capsys: pytest.CaptureFixture):
    """So that the numbers above would tell a flip."""
    name = next(iter(SEEN))
    with Image.open(PHOTOS / name) as photo:
        ImageOps.mirror(photo).save(tmp_path / "mirrored.png")
    row = json.loads(output(capsys, "predict", tmp_path / "mirrored.png", "--top", 1, "--json"))
    found = row["predictions"][0]
    assert (found["name"], found["probability"]) != (SEEN[name][0], pytest.approx(SEEN[name][1], abs=0.02))
