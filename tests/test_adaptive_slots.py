"""Slots that adapt: merging alike seeds changes nothing where they are equal, and what it leaves is each image's own."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import mistake, output
from PIL import Image
from torch import Tensor

from glmix import optimize_for_inference, slot_maps
from glmix.data.loading import Batch
from glmix.data.prepare import Preparation
from glmix.data.samples import Source
from glmix.export.files import open_exported
from glmix.models import GLNet, load
from glmix.models.description import Description
from glmix.models.merging import SeedMerging, counted_slots, kept, merge_alike, merge_to
from glmix.models.slots import FAR
from glmix.models.weights import write_checkpoint
from glmix.slots.adaptive import fullness, plot_trade_off, rank_correlation, trade_off


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**options) -> GLNet:
    torch.manual_seed(0)
    usual = {"dims": (32, 32, 32, 32), "depths": (1, 1, 2, 1), "slot_grid": (4, 4), "num_classes": 5}
    net = timm.create_model("glnet_pico", **usual | options).eval()
    for mixer in net.slot_mixers().values():
        mixer.similarity.scale.data.fill_(8.0)  # so that slots differ
    return net


def pictures(count: int = 3, side: int = 64) -> Tensor:
    """Noise, some of it smooth: images that need different numbers of slots."""
    coarse = torch.nn.functional.interpolate(drawn(count, 3, 4, 4), (side, side), mode="bilinear")
    return coarse * 2 + torch.linspace(0, 1.5, count)[:, None, None, None] * drawn(count, 3, side, side, seed=1)


REPEATED = torch.tensor([0, 1, 2, 0, 3, 3, 1, 4, 0, 5, 2, 0])  # 12 seeds, 6 directions


@pytest.mark.parametrize("how", [{"threshold": 1.0}, {"budget": 6}], ids=str)
def test_equal_seeds_become_one_of_their_size(how: dict):
    distinct = drawn(2, 6, 32)
    lengths = drawn(2, 12, 1, seed=2).abs() + 0.1
    merged, log_size = SeedMerging(**how)(distinct[:, REPEATED] * lengths)
    assert merged.shape == (2, 6, 32) and log_size.shape == (2, 6)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(merged, dim=2), unit(distinct, dim=2), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_size.exp(), torch.bincount(REPEATED).float().expand(2, -1))


@pytest.mark.parametrize("options", [{}, {"slot_residual": False}, {"slot_attention": False}, {"integration": "global"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", [{"threshold": 1.0}, {"budget": 64}], ids=str)
@torch.no_grad()
def test_merging_equal_seeds_changes_nothing(options: dict, how: dict):
    """The last map of images of 64 px has 4 x 4 places with slots, so a grid of 8 x 8 repeats each seed four times."""
    net = small(slot_grid=(8, 8), **options)
    images = pictures()
    wanted = net(images)
    net.set_slot_merging(**how)
    with counted_slots(net) as counts:
        torch.testing.assert_close(net(images), wanted, rtol=0, atol=1e-5)
    found = {name.removesuffix(".mixer.merging"): count[0].tolist() for name, count in counts.items()}
    last = 16 if "threshold" in how else 64
    assert found["stages.2.blocks.0"] == found["stages.2.blocks.1"] == [last] * 3
    assert found["stages.0.blocks.0"] == [64] * 3
    if "threshold" in how:
        net.set_slot_merging(budget=16)
        mixer = net.slot_mixers()["stages.2.blocks.1"]
        x, entering = drawn(2, 4, 4, 32, seed=3), drawn(2, 4, 4, 32, seed=4)
        merged = mixer(x, entering)
        mixer.merging = None
        torch.testing.assert_close(merged, mixer(x, entering), rtol=0, atol=1e-5)
    net.set_slot_merging()
    assert torch.equal(net(images), wanted)


@pytest.mark.parametrize("options", [{}, {"slot_residual": False}, {"slot_attention": False}], ids=str)
@pytest.mark.parametrize("how", [{"threshold": 1.0}, {"budget": 6}], ids=str)
@torch.no_grad()
def test_equal_seeds_of_different_numbers_change_nothing(options: dict, how: dict):
    """12 learned seeds of 6 directions, one of which stands alone and others two or three times."""
    net = small(seeds="learned", slot_grid=(3, 4), **options)
    for number, mixer in enumerate(net.slot_mixers().values()):
        mixer.seeds.values[0] = drawn(6, 32, seed=number)[REPEATED]
        for layer in mixer.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(8)  # so that attention among slots is far from uniform
    images = pictures()
    wanted = net(images)
    net.set_slot_merging(**how)
    with counted_slots(net) as counts:
        torch.testing.assert_close(net(images), wanted, rtol=1e-4, atol=1e-5)
    assert {count[0].tolist()[0] for count in counts.values()} == {6}


@torch.no_grad()
def test_no_two_kept_seeds_are_alike_and_sizes_add_up():
    seeds = drawn(4, 1, 16) * torch.tensor([0.0, 1.0, 2.0, 4.0])[:, None, None] + drawn(4, 30, 16, seed=1)
    counts = []
    for threshold in (0.95, 0.7, 0.4):
        merged, log_size = merge_alike(seeds, threshold)
        own = kept(log_size)
        assert torch.equal(torch.where(own, log_size.exp(), 0).sum(1).round(), torch.full((4,), 30.0))
        assert (log_size[~own] == FAR).all() and own.all(0).sum() == own.sum(1).min(), "kept ones first"
        assert merged.shape[1] == own.sum(1).max()
        unit = torch.nn.functional.normalize(merged, dim=2)
        for b in range(4):
            alike = (unit[b] @ unit[b].T)[own[b]][:, own[b]].fill_diagonal_(-1)
            assert alike.max() < threshold
        counts.append(own.sum(1).tolist())
    assert counts[1] == sorted(counts[1], reverse=True) and counts[1][0] > counts[1][-1], "the more alike, the fewer"
    assert counts[0][-1] >= counts[1][-1] >= counts[2][-1]


@torch.no_grad()
def test_merging_does_not_hang_on_the_order_of_seeds():
    seeds, order = drawn(1, 1, 16) + drawn(2, 20, 16, seed=1), torch.randperm(20)
    plain, shuffled = merge_alike(seeds, 0.6), merge_alike(seeds[:, order], 0.6)
    assert plain[0].shape == shuffled[0].shape and plain[0].shape[1] < 20
    assert torch.allclose(plain[0].sum((1,)), shuffled[0].sum((1,)), atol=1e-4)
    assert torch.allclose(plain[0].norm(dim=2).sort(1).values, shuffled[0].norm(dim=2).sort(1).values, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 2, 7, 13, 20])
def test_a_budget_is_kept(budget: int):
    merged, log_size = merge_to(drawn(3, 20, 16), budget)
    assert merged.shape == (3, budget, 16) and log_size.shape == (3, budget)
    torch.testing.assert_close(log_size.exp().sum(1), torch.full((3,), 20.0))


@pytest.mark.parametrize("how", [{"threshold": 0.8}, {"budget": 5}], ids=str)
@torch.no_grad()
def test_a_batch_is_its_images(how: dict):
    net = small()
    net.set_slot_merging(**how)
    images = pictures()
    with counted_slots(net) as together:
        batched = net(images)
    with counted_slots(net) as alone:
        single = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-5)
    for name, (count,) in together.items():
        assert count.tolist() == torch.cat(alone[name]).tolist()
    if "threshold" in how:
        assert len({n for (count,) in together.values() for n in count.tolist()}) > 2, "images of different counts"


@pytest.mark.parametrize("how", [{"threshold": 0.8}, {"budget": 5}], ids=str)
@torch.no_grad()
def test_the_folded_network_merges_too(how: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("glmix.models.fold.ROWS_BYTES", 4096)  # a few rows at a time
    net, images = small(), pictures()
    net.set_slot_merging(**how)
    wanted = net(images)
    for sdpa in (False, True):
        torch.testing.assert_close(optimize_for_inference(net, sdpa)(images), wanted, rtol=1e-4, atol=1e-4)
    folded = optimize_for_inference(small())
    folded.set_slot_merging(**how)
    torch.testing.assert_close(folded(images), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_maps_are_of_each_images_own_slots():
    net, images = small(), pictures()
    net.set_slot_merging(threshold=0.8)
    both = slot_maps(net, images, attention=True)
    for index, image in enumerate(images):
        for maps, alone in zip(both, slot_maps(net, image[None], attention=True), strict=True):
            own = maps.of_image(index)
            assert own.slots == alone.slots == int((maps.sizes[index] > 0).sum()) and own.slot_grid is None
            for part in ("logits", "attention", "sizes", "assignment", "clustering"):
                torch.testing.assert_close(getattr(own, part), getattr(alone, part), rtol=0, atol=2e-5)
            torch.testing.assert_close(maps.entropy()[index], own.entropy()[0])
            assert own.sizes.sum() == 16
    mixer = net.slot_mixers()[both[0].block]
    seen: list[Tensor] = []
    handle = mixer.register_forward_hook(lambda m, a, _o: seen.append(m.globally(m.norm(a[0]), a[1])))
    slots: list[Tensor] = []
    attend = mixer.slot_proj.register_forward_hook(lambda _m, _a, out: slots.append(out))
    net(images)
    handle.remove(), attend.remove()
    weights = both[0].assignment.flatten(2).transpose(1, 2)
    torch.testing.assert_close(weights @ slots[-1], seen[0].flatten(1, 2), rtol=0, atol=1e-5)


def test_gradients_reach_what_comes_before_the_seeds():
    net = small()
    net.set_slot_merging(threshold=0.7)
    net(pictures()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.stem.parameters())


def test_half_formats():
    merged, _ = merge_alike(drawn(1, 6, 32)[:, REPEATED].bfloat16(), 1.0)
    assert merged.shape[1] == 6
    with torch.autocast("cpu", torch.bfloat16):
        assert merge_alike(drawn(1, 6, 32)[:, REPEATED], 1.0)[0].shape[1] == 6
        net = small()
        net.set_slot_merging(threshold=0.8)
        assert net(pictures()).isfinite().all()


def test_what_cannot_be():
    net = small()
    for how, words in (
        ({"threshold": 0.5, "budget": 3}, "one of both"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"budget": 0}, "at least 1"),
        ({"budget": 17}, "at most 16"),
    ):
        with pytest.raises(ValueError, match=words):
            net.set_slot_merging(**how)
        assert all(mixer.merging is None for mixer in net.slot_mixers().values())
    with pytest.raises(ValueError, match="'hard'"):
        small(assignment="hard").set_slot_merging(threshold=0.5)
    learned = small(seeds="learned")
    learned.set_slot_merging(budget=3)
    assert learned(pictures()).shape == (3, 5)


def test_a_scripted_copy_refuses_and_does_not_forget():
    net = small()
    scripted = torch.jit.script(copy.deepcopy(net))
    assert torch.allclose(scripted(pictures()), net(pictures()), atol=1e-5)
    net.set_slot_merging(threshold=0.8)
    with pytest.raises(torch.jit.Error, match="gather_merged|ignore"):
        torch.jit.script(net)(pictures())


@torch.no_grad()
def test_the_table_is_of_the_same_images_and_leaves_the_network_alone():
    net, images = small(), pictures(6)
    wanted = net(images)
    batches = [Batch(images[:4], wanted[:4].argmax(1), []), Batch(images[4:], wanted[4:].argmax(1), [])]
    rows, used, skipped = trade_off(net, net, batches, [1.0, 0.7])
    assert used == 6 and not skipped and torch.equal(net(images), wanted)
    assert [row.kind for row in rows] == ["all slots", *["threshold", "budget", "grid"] * 2]
    assert (rows[0].top1, rows[0].slots, rows[1].top1, rows[1].difference) == (100, 16, 100, 0)
    net.set_slot_merging(threshold=0.7)
    with counted_slots(net) as counts:
        right = (net(images).argmax(1) == wanted.argmax(1)).float().mean()
    assert rows[4].top1 == pytest.approx(100 * float(right))
    own = torch.stack([count[0].float() for count in counts.values()]).mean(0)
    assert rows[4].slots == pytest.approx(float(own.mean())) and rows[4].spread == pytest.approx(
        float(own.std(correction=0))
    )
    assert rows[5].setting == f"budget {round(rows[4].slots)}" and rows[5].slots == round(rows[4].slots)
    assert abs(rows[6].slots - rows[4].slots) <= 2 and rows[6].spread == 0
    assert rows[5].ahead == pytest.approx(rows[4].top1 - rows[5].top1)
    assert all(row.ms > 0 for row in rows) and plot_trade_off(rows, "").axes


def test_rank_correlations():
    pytest.importorskip("scipy")
    from scipy.stats import spearmanr

    one, other = np.array([3, 1, 4, 1, 5, 9, 2, 6]), np.array([2.5, 2.5, 2.5, 0, 7, 8, 1, 3])
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert np.isnan(rank_correlation(one, np.ones(8)))


def test_fuller_images_keep_more(tmp_path: Path):
    """Images of ever more squares in colours of their own, on white."""
    squares = [np.random.default_rng(0).permutation(16)[:count] for count in (0, 1, 2, 4, 7, 11)]
    photos, masks = [], []
    for places in squares:
        photo, mask = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.uint8)
        for number, place in enumerate(places):
            at = np.s_[place // 4 * 16 : place // 4 * 16 + 12, place % 4 * 16 : place % 4 * 16 + 12]
            photo[at], mask[at] = np.random.default_rng(place).integers(0, 256, 3), number + 1
        photos.append(Image.fromarray(photo)), masks.append(mask)
    masks[0][:3] = 255
    source = Source([str(i) for i in range(6)], photos, masks, [])
    rows, objects, skipped = fullness(small(), source, Preparation(size=(64, 64)), [0.9])
    assert objects.tolist() == [0, 1, 2, 4, 7, 11] and not skipped
    assert rows[0].correlation > 0.8 and set(rows[0].blocks) == set(small().slot_mixers())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network of one block with 4 x 4 slots, for images of 64 px."""
    options = {
        "dims": (32, 64),
        "depths": (2, 1),
        "mixers": ("glmix", "attention"),
        "slot_grid": (4, 4),
        "slot_scale": 8.0,
    }
    torch.manual_seed(0)
    net = timm.create_model("glnet_pico", num_classes=2, **options)
    names = ["blue_thing", "red_thing"]
    described = Description("classify", "glnet_pico", options, names, names, preparation=Preparation(size=(64, 64)))
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", described, net.state_dict())


def test_eval_explain_and_slots_take_it(photos: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shared = ["--data", photos, "--checkpoint", tiny, "--workers", 0]
    plain = json.loads(output(capsys, "eval", *shared, "--json"))
    equal = json.loads(output(capsys, "eval", *shared, "--json", "--slots", "1.0"))
    assert equal["top1"] == plain["top1"] and 0 < equal["slots"] <= 16 and "slots" not in plain
    assert ", 5.0 slots an image" in output(capsys, "eval", *shared, "--slots", 5, "--fast")
    assert "slots an image" in output(capsys, "eval", *shared, "--slots", "auto")

    found = json.loads(output(capsys, "slots", "--adaptive", *shared, "--thresholds", "[0.9]", "--json", "--figure", tmp_path / "a.png"))  # fmt: skip
    assert found["rows"][0]["top1"] == plain["top1"] and len(found["rows"]) == 4 and (tmp_path / "a.png").exists()
    said = output(capsys, "slots", "--adaptive", "--data", "scenes", "--limit", 3, "--thresholds", "[0.9]", "--checkpoint", tiny)  # fmt: skip
    assert "rank correlation" in said and "threshold 0.9" in said and "top-1" not in said
    said = output(capsys, "slots", "--adaptive", "--data", "scenes", "--limit", 1, "--thresholds", "[0.9]", "--checkpoint", tiny)  # fmt: skip
    assert "too few images" in said and "nan" not in said
    quality = json.loads(
        output(capsys, "slots", "--data", "scenes", "--limit", 2, "--slots", 4, "--json", "--checkpoint", tiny)
    )
    assert quality["images"] == 2 and "stages.0.blocks.1" in quality["measures"]

    photo = photos / "val" / "red_thing" / "0.png"
    out = tmp_path / "out"
    told = ["explain", "--checkpoint", tiny, "--out", out, "--merge-seeds", "6"]
    output(capsys, *told, "--report", photo)
    assert len(list(out.glob("*.png"))) == 5 and "report" in str(list(out.glob("*.html")))
    output(capsys, "explain", "--checkpoint", tiny, "--out", tmp_path / "many", "--merge-seeds", "auto", "--folder", photos / "val")  # fmt: skip
    arrays = [np.load(path) for path in (tmp_path / "many" / "arrays").rglob("*.npz")]
    assert len(arrays) == 8
    for array in arrays:
        assert array["slot_grid"].size == 0 and array["assignment"].sum(0) == pytest.approx(1, abs=2e-2)
        assert array["assignment"].max((1, 2)).min() > 1e-4, "no slot that the image does not have"
    assert "settings" in mistake(capsys, "explain", "--checkpoint", tiny, "--out", tmp_path / "many", "--folder", photos / "val")  # fmt: skip


@pytest.mark.parametrize("form", ["onnx", "xml", "pt2"])
def test_a_file_of_a_fixed_number(form: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / f"model.{form}"
    said = output(capsys, "export", path, "--checkpoint", tiny, "--slots", 9)
    assert "9 slots an image" in said and "logits differ by at most" in said
    assert open_exported(path).terms.description.info["slots_of_an_image"] == 9
    net = load(tiny)[0]
    images = pictures(2)
    with torch.no_grad():
        whole = net(images)
        net.set_slot_merging(budget=9)
        wanted = net(images)
        assert float((wanted - whole).abs().max()) > 1e-4
        torch.testing.assert_close(open_exported(path)(images), wanted, rtol=1e-3, atol=1e-4)


def test_mistakes(photos: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shared = ["--data", photos, "--checkpoint", tiny, "--workers", 0]
    for given, words in (
        ("1.5", "between 0 and 1"),
        ("17", "at most 16"),
        ("0", "at least 1"),
        ("many", "auto, a number of slots such as 16, or a threshold"),
    ):
        assert words in mistake(capsys, "eval", *shared, "--slots", given)
        assert words in mistake(capsys, "slots", "--data", "scenes", "--checkpoint", tiny, "--slots", given)
    assert "--merge-seeds 1.5" in mistake(capsys, "explain", "x.png", "--checkpoint", tiny, "--merge-seeds", "1.5")
    assert "--shuffle-slots" in mistake(capsys, "eval", *shared, "--slots", "auto", "--shuffle-slots")
    assert "--slots" in mistake(capsys, "eval", *shared, "--slots", "auto", "--knn")
    assert "1 to 16" in mistake(capsys, "eval", *shared, "--slot-grid", 17, 3)
    assert "1 to 16" in mistake(capsys, "slots", "--data", "scenes", "--checkpoint", tiny, "--slot-grid", "[3,17]")
    assert "same number" in mistake(capsys, "export", tmp_path / "m.onnx", "--checkpoint", tiny, "--slots", "auto")
    assert "at most 16" in mistake(capsys, "export", tmp_path / "m.onnx", "--checkpoint", tiny, "--slots", 17)
    base = ["slots", *shared]
    assert "one of both" in mistake(capsys, *base, "--ablate", "--adaptive")
    assert "--slots" in mistake(capsys, *base, "--adaptive", "--slots", "auto")
    assert "--slots" in mistake(capsys, *base, "--ablate", "--slots", "auto")
    assert "--adaptive alone" in mistake(capsys, *base, "--thresholds", "[0.9]")
    assert "between 0 and 1" in mistake(capsys, *base, "--adaptive", "--thresholds", "[0.9,2]")
    assert "--thresholds []: an empty list" in mistake(capsys, *base, "--adaptive", "--thresholds", "[]")
    scenes = ["slots", "--data", "scenes", "--checkpoint", tiny, "--limit", 4]
    assert "--workers" in mistake(capsys, *scenes, "--workers", 0)
    assert "no labels" in mistake(capsys, *scenes, "--adaptive", "--figure", tmp_path / "trade.png")
    photo = next((photos / "val").rglob("*.png"))
    more = ["--checkpoint", tiny, "--merge-seeds", "3", "--out", tmp_path / "o"]
    assert "this block has 0 to 2" in mistake(capsys, "explain", photo, *more, "--slot", 5, "--figures", "attention")
    assert "this network has 3 slots" in mistake(capsys, "explain", photo, *more, "--slots", 4, "--figures", "slots")


def of_two(folder: Path, **options) -> Path:
    """A checkpoint of a small network for the photos of the tests."""
    options = {"dims": (32, 32), "depths": (1, 1), "mixers": ("glmix", "attention"), "slot_grid": (2, 2)} | options
    names = ["blue_thing", "red_thing"]
    described = Description("classify", "glnet_pico", options, names, names, preparation=Preparation(size=(64, 64)))
    return write_checkpoint(
        folder / "two.safetensors", described, timm.create_model("glnet_pico", num_classes=2, **options).state_dict()
    )


def test_networks_without_slots(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Nothing that asks for slots is passed over in silence."""
    path = of_two(tmp_path, mixers=("local", "attention"))
    shared = ["eval", "--data", photos, "--checkpoint", path, "--workers", 0]
    for asked in (["--slots", "auto"], ["--slots", 2], ["--slot-grid", 2, 2], ["--shuffle-slots"]):
        assert f"{asked[0]}" in (said := mistake(capsys, *shared, *asked)) and "built without slots" in said
    export = ["export", tmp_path / "m.onnx", "--checkpoint", path, "--slots", 3]
    assert "built without slots" in mistake(capsys, *export) and not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("assignment", ["hard", "static"])
def test_slots_that_do_not_merge(assignment: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = of_two(tmp_path, assignment=assignment)
    said = mistake(capsys, "slots", "--adaptive", "--data", photos, "--checkpoint", path, "--workers", 0)
    assert f"--adaptive: the slots of stages.0.blocks.0 have the assignment '{assignment}'" in said


def test_figures_of_slots_that_do_not_attend(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    photo = next((photos / "val").rglob("*.png"))
    words = ["explain", photo, "--checkpoint", of_two(tmp_path, slot_attention=False), "--out", tmp_path / "o"]
    assert "do not attend" in mistake(capsys, *words, "--figures", "attention")
    said = output(capsys, *words)
    assert ".slots.png" in said and ".attention." not in said
