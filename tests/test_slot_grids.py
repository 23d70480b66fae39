"""One model for any number of slots: grids drawn per step, and learned from the largest."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import mistake

from glmix.cli import main
from glmix.data.loading import Batch
from glmix.models import create_model, load
from glmix.models.description import Description
from glmix.tasks.classify import ClassifyLoss, ClassifyOptions
from glmix.training.grids import drawn_grid, own_grid
from glmix.training.module import Trained

SHORT = "--epochs 1 --batch-size 4 --image-size 32 --workers 0 --precision fp32 --warmup-epochs 0".split()


def test_grids_hang_on_seed_epoch_and_batch_alone() -> None:
    drawn = [drawn_grid((2, 12), 7, epoch, batch) for epoch in range(10) for batch in range(30)]
    assert drawn == [drawn_grid((2, 12), 7, epoch, batch) for epoch in range(10) for batch in range(30)]
    assert {rows for rows, _ in drawn} == set(range(2, 13)) and all(rows == columns for rows, columns in drawn)
    assert drawn[:30] != drawn[30:60] and drawn != [drawn_grid((2, 12), 8, e, b) for e in range(10) for b in range(30)]


def test_steps_have_drawn_grids_and_validation_the_models_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, validated = [], []
    loss, validation = ClassifyLoss.__call__, Trained.validation_step

    def noted_loss(self, model, batch, epoch):
        learned.append(own_grid(model))
        return loss(self, model, batch, epoch)

    def noted_validation(self, *args):
        validated.extend(own_grid(model) for model in self.kinds.values())
        return validation(self, *args)

    monkeypatch.setattr(ClassifyLoss, "__call__", noted_loss)
    monkeypatch.setattr(Trained, "validation_step", noted_validation)
    out = str(tmp_path / "run")
    assert main(["train", "--data", str(photos), "--out", out, *SHORT, "--slot-grids", "1", "4", "--seed", "3"]) == 0
    assert learned == [drawn_grid((1, 4), 3, 0, batch) for batch in range(6)] and len(set(learned)) > 1
    assert set(validated) == {(7, 7)}
    assert own_grid(load(out)[0]) == (7, 7)


def test_the_drawn_grid_learns_what_the_largest_answers() -> None:
    net = create_model("glnet_pico", num_classes=3, dims=(32, 32, 64, 64), depths=(1, 1, 1, 1)).eval()
    options = ClassifyOptions(slot_grids=(1, 5), slot_distill=True, image_size=32, mixup=0, cutmix=0, label_smoothing=0)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    answers = {}
    for side in (2, 5):
        net.set_slot_grid((side, side))
        answers[side] = net(images)
    assert not torch.allclose(answers[2], answers[5])
    wanted = (F.cross_entropy(answers[5], labels) + F.cross_entropy(answers[2], answers[5].softmax(1))) / 2
    net.set_slot_grid((2, 2))
    batch = Batch(images, labels, [])
    found = ClassifyLoss(options, net, Description(classes=["a", "b", "c"]))(net, batch, 0)
    torch.testing.assert_close(found, wanted)
    assert own_grid(net) == (2, 2)
    found.backward()  # the largest grid is taught by the labels alone
    slope = net.head.fc.bias.grad
    from_labels = (answers[5].softmax(1) - F.one_hot(labels, 3)).mean(0)
    from_answers = (answers[2].softmax(1) - answers[5].softmax(1)).mean(0)
    torch.testing.assert_close(slope, (from_labels + from_answers) / 2)


def test_mistakes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = ["train", "--data", photos, "--out", tmp_path / "run", *SHORT]
    assert "such as 2 12" in mistake(capsys, *base, "--slot-grids", 5, 2)
    assert "8 at most" in mistake(capsys, *base, "--slot-grids", 2, 12)
    assert "slot_grids" in mistake(capsys, *base, "--slot-distill")
    assert "compile" in mistake(capsys, *base, "--slot-grids", 2, 4, "--compile")
    learned = ["--slot-grids", 2, 4, "--model-args", "{seeds: learned}"]
    assert "pooled from a grid" in mistake(capsys, *base, *learned)
