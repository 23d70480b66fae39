"""What parts of a network are worth: each disturbance is what its name says, goes when it is over, and is counted right."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import mistake, output
from torch import Tensor

from glmix.models import GLNet
from glmix.models.glnet import GLMix
from glmix.slots.ablation import rows_of, tents, worth
from glmix.training.evaluate import shuffled_slots

X = torch.randn(2, 8, 9, 32, generator=torch.Generator().manual_seed(1))
ENTERING = torch.randn(2, 8, 9, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def net() -> GLNet:
    torch.manual_seed(0)
    options = {"dims": (32, 32, 32, 32), "depths": (1, 1, 2, 1), "slot_grid": (2, 3), "num_classes": 5}
    return timm.create_model("glnet_pico", **options).eval()


@torch.no_grad()
def disturbed(name: str, mixer: GLMix, net: GLNet) -> Tensor:
    row = next(row for row in rows_of(net) if row.name == name)
    with row.applied():
        return mixer(X, ENTERING)


def test_the_rows(net: GLNet):
    names = [row.name for row in rows_of(net)]
    blocks = [f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))]
    assert names == [
        *(f"global off: {block}" for block in blocks),
        *(f"global off: stage {n}" for n in (1, 2, 3)),
        "global off: stages 1, 2",
        "global off: all",
        "local off: all",
        *(f"contents: {kind}" for kind in ("permuted", "the image's mean", "rolled")),
        *(f"assignment: {kind}" for kind in ("hard", "squares, hard", "squares, soft")),
    ]
    by_name = {row.name: row.mixers for row in rows_of(net)}
    mixers = net.slot_mixers()
    assert by_name["global off: stage 3"] == [mixers[block] for block in blocks[2:]]
    assert by_name["global off: stages 1, 2"] == [mixers[block] for block in blocks[:2]]
    mixed = timm.create_model(
        "glnet_pico", dims=(32,) * 4, depths=(1, 1, 2, 1), mixers=("glmix", "glmix", "local", "attention")
    )
    (local,) = (row for row in rows_of(mixed) if row.name == "local off: all")
    assert len(local.mixers) == 4, "convolutions of a stage without slots too"
    learned = timm.create_model("glnet_pico", dims=(32,) * 4, depths=(1,) * 4, seeds="learned", slot_grid=(2, 2))
    assert not [row.name for row in rows_of(learned) if "squares" in row.name]


@torch.no_grad()
def test_what_each_row_computes(net: GLNet):
    mixer = next(iter(net.slot_mixers().values()))
    whole = mixer(X, ENTERING)
    normed = mixer.norm(X)
    locally = mixer.local(normed)
    flat = normed.flatten(1, 2)
    logits, slots = mixer.gather(normed, ENTERING)
    weights = logits.softmax(1).transpose(1, 2)

    def alike(name: str, globally: Tensor) -> bool:
        return torch.allclose(disturbed(name, mixer, net), globally.reshape(X.shape) + locally, atol=1e-5)

    assert alike("global off: stages.0.blocks.0", torch.zeros_like(X))
    assert alike("global off: all", torch.zeros_like(X))
    assert torch.allclose(disturbed("local off: all", mixer, net), (weights @ slots).reshape(X.shape), atol=1e-5)
    assert alike("contents: the image's mean", slots.mean(1, keepdim=True).expand_as(flat))
    assert alike("contents: rolled", weights @ slots.roll(3, 1))
    with shuffled_slots(net):
        shuffled = mixer(X, ENTERING)
    assert torch.equal(shuffled, disturbed("contents: rolled", mixer, net)), "as `glmix eval --shuffle-slots` has it"
    once, twice = (disturbed("contents: permuted", mixer, net) for _ in range(2))
    assert torch.equal(once, twice) and not torch.allclose(once, whole, atol=1e-3)

    nearest = F.one_hot(logits.argmax(1), 6).float()  # (B, N, M)
    means = nearest.transpose(1, 2) @ flat / nearest.sum(1)[..., None]
    means = torch.where(nearest.sum(1)[..., None] > 0, means, flat.mean(1, keepdim=True))
    assert alike("assignment: hard", nearest @ mixer.attend(means))

    squares = F.adaptive_avg_pool2d(normed.permute(0, 3, 1, 2), (2, 3)).flatten(2).transpose(1, 2)
    spread = mixer.attend(squares).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    assert alike("assignment: squares, hard", F.interpolate(spread, (8, 9), mode="nearest").permute(0, 2, 3, 1))

    tent = torch.einsum("ih,jw->ijhw", tents(8, 2, X.device), tents(9, 3, X.device)).reshape(6, 72)
    soft = mixer.attend((tent / tent.sum(1, keepdim=True)) @ flat).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    grown = F.interpolate(soft, (8, 9), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert alike("assignment: squares, soft", grown)
    assert torch.equal(mixer(X, ENTERING), whole), "all of it is gone afterwards"


def test_counts_of_pairs():
    whole = np.array([True] * 6 + [False] * 4)
    less = np.array([True] * 3 + [False] * 3 + [True] + [False] * 3)
    found = worth("row", whole, less)
    assert (found.top1, found.difference, found.lost, found.gained) == (40, pytest.approx(-20), 3, 1)
    assert found.error == pytest.approx(100 * ((4 / 10 - 0.04) / 10) ** 0.5), "of b + c = 4 pairs that differ"


def test_the_command(photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its rows are those of `glmix eval` on the same images."""
    plain = ["slots", "--ablate", "--data", photos, "--checkpoint", run, "--workers", 0]
    found = json.loads(output(capsys, *plain, "--json", "--figure", tmp_path / "worth.png"))
    assert found["images"] == 8 and (tmp_path / "worth.png").stat().st_size > 5000
    shared = ["eval", "--data", photos, "--checkpoint", run, "--workers", 0, "--json"]
    assert found["top1"] == json.loads(output(capsys, *shared))["top1"]
    rows = {row["row"]: row for row in found["rows"]}
    assert rows["contents: rolled"]["top1"] == json.loads(output(capsys, *shared, "--shuffle-slots"))["top1"]
    assert len(rows) == 9 + 3 + 2 + 1 + 3 + 3
    said = output(capsys, *plain, "--limit", 3)
    assert "on 3 images" in said and "global off: stages.2.blocks.5" in said


def test_mistakes(photos: Path, run: Path, capsys: pytest.CaptureFixture):
    assert "--batch-size -1" in mistake(
        capsys, "slots", "--ablate", "--data", photos, "--checkpoint", run, "--batch-size", -1
    )
