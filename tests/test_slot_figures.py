"""Figures, page, sheets and measures of slots whose answer is known: what is shown is what is in the picture, there."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_slots import PREPARATION, TRUTH, cells, drawn, known_model
from matplotlib.figure import Figure
from PIL import Image

import glmix
from glmix.data.images import BadImage
from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped, Source, spread
from glmix.models.slot_maps import SlotMaps
from glmix.slots import figures
from glmix.slots.folder import Job, explain_folder
from glmix.slots.look import Look, is_idle, look, prepare_whole
from glmix.slots.quality import slot_quality
from glmix.slots.regions import layout, patch_grid
from glmix.slots.report import image_data

CYCLE = [2, 3, 1, 0]  # in head 0: slot 0 looks at 2, 1 at 3, 2 at 1, 3 at 0
OTHER = [1, 2, 3, 0]  # in head 1


@pytest.fixture(scope="module")
def seen() -> Look:
    """The known picture, and attention that is another from each slot, and another way round."""
    found = look(known_model(), drawn(), PREPARATION, "plan")
    for maps in found.maps:
        heads = [0.8 * torch.eye(4)[CYCLE] + 0.05, 0.8 * torch.eye(4)[OTHER] + 0.05]
        maps.attention = torch.stack(heads)[None]
    return found


def titled(figure: Figure, pattern: str) -> list[tuple[re.Match, Any]]:
    """The panels whose title matches, with what was found."""
    return [(m, axis) for axis in figure.axes if (m := re.search(pattern, axis.get_title()))]


def same_parts(picture: Any, truth: np.ndarray = TRUTH) -> bool:
    """Whether cells have one colour exactly where they are of one slot."""
    colour = cells(picture, len(truth)).reshape(truth.size, -1).astype(int)
    alike = np.abs(colour[:, None] - colour[None]).max(2) <= 20
    return bool((alike == (truth.reshape(-1, 1) == truth.reshape(1, -1))).all())


def is_view_of(picture: Any, slot: int, photo: Any) -> bool:
    """Whether the photo is in its colours where the slot has its places, and pale everywhere else."""
    view, whole = cells(picture).astype(int), cells(photo).astype(int)
    own = slot == TRUTH
    return bool((np.abs(view - whole)[own] <= 25).all() and (view[~own] >= 170).all())


def test_the_picture_and_the_network_are_as_they_should(seen: Look) -> None:
    """What the tests below rest on: the four colours, and each slot on its own."""
    assert same_parts(seen.shown) and seen.seen == (128, 64)
    for maps in seen.maps:
        assert (cells(maps.assignment[0].argmax(0).numpy()) == TRUTH).all()
        assert (cells(maps.assignment[0].amax(0).numpy()) > 0.99).all()


def test_views_through_slots_lie_where_the_photo_has_them(seen: Look) -> None:
    for maps in seen.maps:
        views = titled(figures.plot_slots(seen.shown, maps, count=4), r"^slot (\d)$")
        assert [m[1] for m, _ in views] == ["3", "1", "0", "2"]  # by area: dark, green, and two alike
        for match, axis in views:
            assert is_view_of(axis.images[0].get_array(), int(match[1]), seen.shown), maps.block
    depths = titled(figures.plot_depths(seen.shown, seen.maps[::4], count=3), r"^slot (\d)$")
    assert len(depths) == 9 and {m[1] for m, _ in depths} > {"1", "3"}
    for match, axis in depths:
        assert is_view_of(axis.images[0].get_array(), int(match[1]), seen.shown)


def test_all_maps_are_each_at_its_number(seen: Look) -> None:
    maps = seen.maps[0]
    drawn_maps = figures.plot_slots(seen.shown, maps).axes[-1].images[0].get_array()
    h, w = maps.logits.shape[2:]
    for slot in range(4):
        top, left = slot // 2 * (h + 2) + 1, slot % 2 * (w + 2) + 1
        tile = cells(drawn_maps[top : top + h, left : left + w])
        assert ((tile > 0.99) == (slot == TRUTH)).all()


def test_regions_are_of_the_strongest_slot(seen: Look) -> None:
    for maps in seen.maps:
        figure = figures.plot_regions(seen.shown, maps, merge=0.5)
        painted, merged, contours = (axis.images[0].get_array() for axis in figure.axes)
        assert same_parts(painted) and same_parts(merged), maps.block
        assert "4 regions" in figure.axes[0].get_title() and "4 regions" in figure.axes[1].get_title()
        colours = np.unique(cells(painted).reshape(-1, 3), axis=0)
        assert len(colours) == 4  # not those of the photo's grey alone: its three colours are equally light
        yellow = (np.asarray(contours) == (255, 230, 0)).all(2)
        assert not cells(yellow).any()
        side = yellow.shape[0] / 4
        row = yellow[round(side / 2)]
        edges = np.flatnonzero(row) / side  # in cells: red ends at 2, blue begins at 6
        assert {round(edge) for edge in edges} == {2, 6} and np.abs(edges - edges.round()).max() < 0.2
        below = yellow[round(1.8 * side) : round(2.2 * side)].any(0)[(np.arange(8) * side + side / 2).astype(int)]
        assert below.tolist() == [True, True, False, False, True, True, True, True]
    depths = figures.plot_depths(seen.shown, seen.maps[:1])
    assert same_parts(depths.axes[0].images[0].get_array())


def test_regions_that_the_network_hardly_separates_are_merged() -> None:
    """Two slots share what is red, each a little stronger in one half of it."""
    model = known_model()
    maps = look(model, drawn(), PREPARATION).maps[0]
    maps.logits[:, 1] = maps.logits[:, 0]
    maps.logits[:, 1, :, : maps.logits.shape[3] // 8] += 0.2
    figure = figures.plot_regions(drawn(), maps, merge=0.5)
    before, after = (re.search(r"(\d) regions", figure.axes[i].get_title())[1] for i in (0, 1))
    assert int(before) == int(after) + 1


def test_attention_is_from_the_slot_to_those_it_looks_at(seen: Look) -> None:
    for slot in range(4):
        figure = figures.plot_attention(seen.shown, seen.maps[0], slot=slot)
        ((_, view),) = titled(figure, "which looks")
        assert is_view_of(view.images[0].get_array(), slot, seen.shown)
        for head, targets in enumerate((CYCLE, OTHER)):
            ((match, axis),) = titled(figure, rf"head {head}: most at slot (\d) \((\d+)%\)")
            assert match[1] == str(targets[slot]) and match[2] == "85"
            overlay = cells(axis.images[1].get_array())
            assert (overlay[targets[slot] == TRUTH] > 0.8).all() and (overlay[targets[slot] != TRUTH] < 0.1).all()
        ((_, mean),) = titled(figure, "mean of all heads")
        overlay = cells(mean.images[1].get_array())
        expected = np.bincount([CYCLE[slot], OTHER[slot]], minlength=4) * 0.4 + 0.05
        np.testing.assert_allclose(overlay, expected[TRUTH], atol=0.02)


def test_what_is_gathered_and_given_back_has_the_photos_colours(seen: Look) -> None:
    figure = figures.plot_patches(seen.shown, seen.maps[0])
    through_slots, through_squares = (axis.images[0].get_array() for axis in figure.axes[2:])
    assert np.abs(cells(through_slots).astype(int) - cells(seen.shown).astype(int)).max() <= 25
    squares = cells(through_squares)  # 2 x 2 patches: a quarter red, half blue or all green, each with its mean
    assert (
        np.ptp(squares[:2, :4], axis=(0, 1)).max() == 0 and np.abs(squares[3, 7].astype(int) - [0, 255, 0]).max() < 25
    )
    assert abs(int(squares[0, 0, 0]) - 127) <= 20 and abs(int(squares[0, 7, 2]) - 127) <= 20


def half_idle() -> SlotMaps:
    """Two of four slots share every place alike: half of the largest entropy."""
    logits = torch.zeros(1, 4, 4, 8)
    logits[:, 2:] = -1e4
    attention = torch.full((1, 2, 4, 4), 0.25)
    return SlotMaps("stages.0.blocks.0", 4, logits, (2, 2), attention)


def test_every_figure_tells_the_entropy() -> None:
    maps, photo = half_idle(), drawn()
    plots = [
        figures.plot_slots(photo, maps),
        figures.plot_depths(photo, [maps]),
        figures.plot_regions(photo, maps),
        figures.plot_attention(photo, maps),
        figures.plot_patches(photo, maps),
    ]
    for figure in plots:
        said = "\n".join([figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)])
        assert "assignment entropy 0.50" in said and "idle" not in said
    page = image_data(Look("flat", (128, 64), (128, 64), photo, [maps]), 4096)["blocks"][0]
    assert page["entropy"] == 0.5 and page["idle"] is False
    assert is_idle(0.97) and is_idle(1.0) and not is_idle(0.9699)


def unpacked(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("slots", [4, 37])
def test_the_page_holds_photo_maps_and_attention_as_they_are(slots: int) -> None:
    arguments = {} if slots == 4 else {"slot_grid": (1, slots), "seeds": "learned"}
    found = look(known_model(slots, **arguments), drawn(), PREPARATION, "plan")
    for maps in found.maps:
        maps.attention = torch.zeros(1, 2, slots, slots)
        for slot, (one, other) in enumerate(zip(CYCLE, OTHER, strict=True)):
            maps.attention[0, 0, slot, one] = maps.attention[0, 1, slot, other] = 1
    data = image_data(found, 4096)
    assert np.abs(cells(unpacked(data["photo"])).astype(int) - cells(drawn()).astype(int)).max() <= 25
    for block in data["blocks"]:
        count, h, w = block["shape"]
        assert count == slots and block["columns"] == (2 if slots == 4 else 7)
        tiles, strongest = unpacked(block["maps"]), unpacked(block["strongest"])
        for slot in range(4):
            top, left = slot // block["columns"] * h, slot % block["columns"] * w
            assert ((cells(tiles[top : top + h, left : left + w]) > 250) == (slot == TRUTH)).all()
        assert (cells(strongest[..., 0]) == TRUTH).all() and not strongest[..., 1].any()
        attention = unpacked(block["attention"]).reshape(2, slots, slots)
        assert attention[0, :4].argmax(1).tolist() == CYCLE and attention[1, :4].argmax(1).tolist() == OTHER
        x, y = np.array(block["centres"])[:4].T  # red is above on the left, green below on the right
        assert x[0] < 0.3 < 0.7 < min(x[1], x[2]) and max(y[0], y[2]) < 0.3 < 0.7 < y[1]
        assert block["representatives"][:4] == [3, 1, 0, 2]
        assert [block["stands_behind"][slot] for slot in range(4)] == [0, 1, 2, 3]


def place_of(page: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Where (y, x) a part of a page lies, which is there exactly once."""
    height, width = part.shape[:2]
    start = (page[: -height + 1, : -width + 1] == part[0, 0]).all(2)
    found = [(y, x) for y, x in np.argwhere(start) if (page[y : y + height, x : x + width] == part).all()]
    assert len(found) == 1
    return found[0]


def test_sheets_show_each_photos_regions_under_it(tmp_path: Path) -> None:
    plans = {"b": TRUTH, "a": TRUTH[:, ::-1], "c": TRUTH[::-1], "d": TRUTH.T}
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name, plan in plans.items():
        drawn(plan).save(folder / f"{name}.png")
    (folder / "none.png").write_bytes(b"no image")
    job = Job(known_model(), PREPARATION, 0, 4, 0.5, 2, {})
    ((sheet, done, count, skipped),) = explain_folder(folder, out, job)
    assert (done, count) == (5, 5)
    assert [one.name for one in skipped] == [str(folder / "none.png")] and "not an image" in skipped[0].reason
    page = np.asarray(Image.open(sheet)).astype(int)
    for name, plan in plans.items():
        with np.load(out / "arrays" / f"{name}.png.npz") as arrays:
            assert (cells(arrays["assignment"].argmax(0), len(plan)) == plan).all()
            assert arrays["representatives"].tolist() == [3, 1, 0, 2] and tuple(arrays["slot_grid"]) == (2, 2)
        photo = np.asarray(drawn(plan)).astype(int)
        (height, width), (y, x) = photo.shape[:2], place_of(page, photo)
        below = page[y + height :, x : x + width]
        start = int(np.flatnonzero((below != 255).any(2).mean(1) > 0.95)[0])  # below the line of text
        assert same_parts(below[start : start + height], plan), name


@pytest.mark.parametrize("kind", ["nearest", "bicubic"])
def test_a_checkpoints_interpolation_counts(kind: str, tmp_path: Path) -> None:
    """Enlarged by the nearest pixel a picture keeps its two values; the measures, a folder and a look all see it so."""
    preparation = Preparation(size=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=kind)
    board = Image.fromarray((np.indices((20, 30)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    model = known_model()
    two = kind == "nearest"

    def values() -> int:
        return len(model.seen["image"].unique())

    assert (len(prepare_whole(board, preparation).unique()) == 2) == two
    look(model, board, preparation)
    assert (values() == 2) == two
    slot_quality(model, Source(["board"], [board], [np.ones((20, 30), np.uint8)], []), preparation)
    assert (values() == 2) == two
    (tmp_path / "photos").mkdir()
    board.save(tmp_path / "photos" / "board.png")
    list(explain_folder(tmp_path / "photos", tmp_path / "out", Job(model, preparation, 0, 4, 0.4, 1, {})))
    assert (values() == 2) == two
    recorded = json.loads((tmp_path / "out" / "settings.json").read_text())["preparation"]
    assert Preparation.read(recorded) == preparation


def masked(bad: tuple[int, ...] = ()) -> Source:
    """The known picture three times, with a mask of its three colours; `bad` ones cannot be read."""

    class Pictures(list):
        def __getitem__(self, index: Any) -> Any:
            if index in bad:
                raise BadImage(f"{index}: odd.png", "empty file")
            return super().__getitem__(index)

    mask = np.array([1, 2, 3, 0], np.uint8)[TRUTH].repeat(16, 0).repeat(16, 1)
    return Source(["a", "b", "c"], Pictures([drawn()] * 3), [mask] * 3, [])


def test_slot_quality_is_of_the_strongest_slot_at_each_place() -> None:
    """Slots that have just the objects are perfect; where one outweighs all, its region is the whole picture."""
    calls: list[tuple[int, int]] = []
    scores, used, skipped = slot_quality(known_model(), masked(bad=(2,)), PREPARATION, lambda *n: calls.append(n))
    assert used == 2 and skipped == [Skipped("2: odd.png", "empty file")] and calls == [(1, 3), (2, 3), (3, 3)]
    blocks = [name for name in scores if name not in ("squares", "slic")]
    assert len(blocks) == 9
    for name in blocks:
        row = scores[name]
        assert row["best_iou"] > 0.95 and row["purity"] > 0.98 and row["boundary_recall"] > 0.85, name
        assert row["regions"] == 4 and row["entropy"] < 0.05
    # 2 x 2 squares: red and blue fill half of theirs, green all of its own
    assert scores["squares"]["best_iou"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert scores["squares"]["purity"] == pytest.approx(0.75) and scores["squares"]["regions"] == 4

    covered, _, _ = slot_quality(known_model(bias=(0.0, 0.0, 0.0, 60.0)), masked(), PREPARATION)
    for name in blocks:
        assert covered[name]["regions"] == 1 and covered[name]["boundary_recall"] == 0
        assert covered[name]["purity"] == 0.5 and covered[name]["best_iou"] == pytest.approx((4 + 8 + 4) / 32 / 3)


def test_a_limit_is_spread_over_the_data() -> None:
    assert spread(5, 0) == spread(5, 5) == spread(5, 99) == [0, 1, 2, 3, 4]
    assert spread(800, 4) == [100, 300, 500, 700] and spread(7, 1) == [3] and spread(0, 3) == []
    for count, limit in ((10, 3), (7, 5), (100, 99)):
        chosen = spread(count, limit)
        gaps = np.diff(chosen)
        assert len(set(chosen)) == limit and gaps.max() - gaps.min() <= 1 and chosen[0] >= 0 and chosen[-1] < count


def test_any_number_of_slots_is_laid_out_nearly_square() -> None:
    assert layout(49) == (7, 7) and layout(64) == (8, 8) and layout(37) == (6, 7) and layout(2) == (1, 2)
    for count in range(1, 200):
        rows, columns = layout(count)
        assert (rows - 1) * columns < count <= rows * columns and abs(rows - columns) <= 1
        maps = SlotMaps("b", 4, torch.zeros(1, count, 2, 2), None)
        squares = patch_grid(maps)
        assert abs(squares[0] * squares[1] - count) <= count**0.5 and abs(squares[0] - squares[1]) <= 1
    assert patch_grid(SlotMaps("b", 4, torch.zeros(1, 37, 2, 2), None)) == (6, 6)
    assert patch_grid(SlotMaps("b", 4, torch.zeros(1, 10, 2, 2), (2, 5))) == (2, 5)


@pytest.mark.parametrize(
    ("slots", "shape", "squares"), [(64, (8, 8), 64), (37, (6, 7), 36), (2, (1, 2), 2), (1, (1, 1), 1)]
)
def test_slots_without_a_grid(slots: int, shape: tuple[int, int], squares: int, tmp_path: Path) -> None:
    """Learned slots, of whatever number, in every figure, on the page, in a folder and in the measures."""
    torch.manual_seed(0)
    model = glmix.create_model("glnet_pico", slot_grid=(1, slots), seeds="learned", slot_scale=20.0).eval()
    found = look(model, drawn(), PREPARATION)
    maps = found.maps[-1]
    assert maps.slot_grid is None and maps.slots == slots
    figure = figures.plot_slots(found.shown, maps, count=3)
    tiles = figure.axes[-1].images[0].get_array()
    h, w = (n + 2 for n in maps.logits.shape[2:])
    assert tiles.shape == (shape[0] * h, shape[1] * w)
    for slot in range(slots):
        row, column = slot // shape[1] * h, slot % shape[1] * w
        tile = tiles[row + 1 : row + h - 1, column + 1 : column + w - 1]
        np.testing.assert_allclose(tile, maps.assignment[0, slot].numpy(), rtol=1e-5)
    assert np.ma.getmaskarray(np.ma.masked_invalid(tiles)).reshape(shape[0], h, shape[1], w).all((1, 3)).sum() == (
        shape[0] * shape[1] - slots
    )
    for frame, slot in zip(figure.axes[-1].patches, glmix.representative_slots(maps.assignment[0], 3), strict=True):
        assert frame.get_xy() == (slot % shape[1] * w - 0.5, slot // shape[1] * h - 0.5)
    patches = figures.plot_patches(found.shown, maps)
    assert f"{slots} soft slots" in patches.axes[0].get_title()
    assert f"{squares} square patches" in patches.axes[1].get_title()
    figures.plot_depths(found.shown, found.maps[::4])
    figures.plot_attention(found.shown, maps)
    assert image_data(found, 4096)["blocks"][0]["shape"][0] == slots
    (tmp_path / "photos").mkdir()
    drawn().save(tmp_path / "photos" / "plan.png")
    list(explain_folder(tmp_path / "photos", tmp_path / "out", Job(model, PREPARATION, 0, 4, 0.4, 1, {})))
    with np.load(tmp_path / "out" / "arrays" / "plan.png.npz") as arrays:
        assert arrays["assignment"].shape[0] == slots and arrays["slot_grid"].size == 0
    scores, _, _ = slot_quality(model, masked(bad=(1, 2)), PREPARATION)
    assert scores["squares"]["regions"] == squares


def test_figures_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"before")

    class Cut(Figure):
        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        figures.save_figure(Cut(), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    figures.save_figure(Figure(figsize=(1, 1)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_papers_figure(seen: Look):
    """The photo, all maps of each block on a scale of its own, and the framed ones large in the same colours."""
    figure = figures.plot_paper(drawn(), seen.maps[:2])
    assert same_parts(figure.axes[0].images[0].get_array())
    for maps in seen.maps[:2]:
        all_maps = [axis for axis in figure.axes if maps.block in axis.get_title()]
        assert len(all_maps) == 1
        shown = all_maps[0].images[0]
        assert shown.get_clim() == (0, 1) and shown.get_cmap().name == "viridis"
        assert np.nanmax(shown.get_array()) == 1 and np.nanmin(shown.get_array()) == 0
    views = titled(figure, r"slot (\d)$")
    assert sorted(int(match[1]) for match, _ in views) == [0, 0, 1, 1, 2, 2, 3, 3]
    for match, axis in views:
        own = cells(axis.images[0].get_array()) > 0.5
        assert (own == (int(match[1]) == TRUTH)).all()
    frames = [[patch.get_edgecolor() for patch in axis.patches] for axis in figure.axes]
    small, large = [f for f in frames if len(f) == 4], [f[0] for f in frames if len(f) == 1]
    assert len(small) == 2 and [*small[0], *small[1]] == large
