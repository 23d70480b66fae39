"""`glmix explain`: its figures, a whole folder, the notebook's promise of arrays, and every mistake as one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_commands import mistake, output

import glmix
from glmix.data.prepare import Preparation
from glmix.data.scenes import make_scene, write_scenes
from glmix.models import SHIPPED, load
from glmix.models.description import Description
from glmix.models.weights import write_checkpoint
from glmix.slots import figures
from glmix.slots import folder as slot_folder
from glmix.slots.look import IDLE, Look, look, seen_size, shown_photo

KINDS = ["slots", "depths", "regions", "attention", "patches"]


@pytest.fixture(scope="module")
def seen() -> Look:
    model, described = load(SHIPPED)
    pixels = np.concatenate([make_scene(3, i, 120).image for i in range(2)], 1)
    return look(model, Image.fromarray(pixels), described.preparation, "pair")


@pytest.fixture(scope="module")
def idle() -> Look:
    """A network whose assignments are all but uniform, as the published ones start."""
    torch.manual_seed(0)
    model, described = glmix.create_model("glnet_pico", slot_scale=0.01).eval(), load(SHIPPED)[1]
    return look(model, Image.fromarray(make_scene(3, 0).image), described.preparation, "idle")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """A wide, a tall, a tiny and a grey image."""
    paths = [tmp_path / name for name in ("wide.png", "tall.png", "tiny.png", "grey.png")]
    scene = Image.fromarray(make_scene(4, 1, 128).image)
    for path, image in zip(
        paths, [scene.resize((400, 90)), scene.resize((60, 333)), scene.resize((9, 7)), scene.convert("L")]
    ):
        image.save(path)
    return paths


def test_every_figure_in_every_format(pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    text = output(capsys, "explain", *pictures[:2], "--out", out, "--format", "png,pdf,svg", "--blocks", 0, 4, -1)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{name}.{kind}.{suffix}" for name in ("wide", "tall") for kind in KINDS for suffix in ("png", "pdf", "svg")
    )
    assert "wide.png: 400 x 90 pixels, seen at 640 x 144" in text
    for kind in KINDS:
        with Image.open(out / f"wide.{kind}.png") as picture:
            picture.load()
            assert min(picture.size) > 200
        assert (out / f"tall.{kind}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (out / f"tall.{kind}.svg").read_text()


def test_any_size(pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output(capsys, "explain", *pictures[2:], "--out", tmp_path / "o", "--figures", "slots,regions", "--image-size", 64)
    assert len(list((tmp_path / "o").iterdir())) == 4


def test_without_a_checkpoint_the_weights_that_ship(
    pictures: list[Path], capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(pictures[0].parent)
    text = output(capsys, "explain", "grey.png", "--figures", "none", "--report")
    assert "slots/report.html" in text and "idle" not in text


def test_seen_size_is_bounded() -> None:
    assert seen_size((768, 512), 160) == (240, 160)
    assert seen_size((1000, 1000), 224) == (224, 224)
    assert seen_size((40_000, 2000), 160) == (640, 32)
    assert seen_size((1, 5000), 64) == (32, 256)
    for size in ((10, 10), (5000, 100), (3000, 2000)):
        assert max(shown_photo(Image.new("RGB", size)).size) in range(384, 1025)


def test_huge_photo_is_seen_small_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (20_000, 12_000), (90, 120, 30)).save(tmp_path / "poster.jpg")
    text = output(capsys, "explain", tmp_path / "poster.jpg", "--out", tmp_path / "o", "--figures", "regions")
    assert "poster.jpg: 20000 x 12000 pixels, seen at 267 x 160" in text


def titles(figure: Figure) -> str:
    found = [figure.get_suptitle(), *(a.get_title() for a in figure.axes)]
    return "\n".join(found)


def plots(seen: Look) -> dict[str, Figure]:
    return {
        "slots": figures.plot_slots(seen.shown, seen.maps[-1]),
        "depths": figures.plot_depths(seen.shown, seen.maps[::4]),
        "regions": figures.plot_regions(seen.shown, seen.maps[-1]),
        "attention": figures.plot_attention(seen.shown, seen.maps[-1]),
        "patches": figures.plot_patches(seen.shown, seen.maps[-1]),
    }


def test_figures_tell_the_entropy_and_where_slots_are_idle(seen: Look, idle: Look) -> None:
    entropy = float(seen.maps[-1].entropy()[0])
    assert entropy < IDLE <= float(idle.maps[-1].entropy()[0])
    for kind, figure in plots(seen).items():
        assert f"assignment entropy {entropy:.2f}" in titles(figure), kind
        assert "idle" not in titles(figure), kind
    for kind, figure in plots(idle).items():
        assert "idle: the assignment is close to uniform" in titles(figure), kind
    photo = np.asarray(idle.shown)
    view = figures.seen_through_slot(photo, idle.maps[-1].assignment[0], 3, idle=True)
    assert np.abs(view - figures.seen_through(photo, np.zeros(photo.shape[:2], np.float32)).astype(int)).max() <= 5


def test_maps_share_one_scale_unless_asked(seen: Look) -> None:
    weights = seen.maps[-1].assignment[0].numpy()
    figure = figures.plot_slots(seen.shown, seen.maps[-1], count=3)
    grid = figure.axes[-1].images[0]
    assert grid.get_clim() == (0, pytest.approx(weights.max()))
    drawn = grid.get_array()
    h, w = weights.shape[1] + 2, weights.shape[2] + 2
    for slot in (0, 10, 48):
        top, left = slot // 7 * h + 1, slot % 7 * w + 1
        np.testing.assert_allclose(drawn[top : top + h - 2, left : left + w - 2], weights[slot], rtol=1e-6)
    normalized = figures.plot_slots(seen.shown, seen.maps[-1], normalize=True).axes[-1].images[0].get_array()
    assert float(np.nanmax(normalized[1 : h - 1, 1 : w - 1])) == pytest.approx(1)


def test_representatives_have_the_colours_of_their_frames(seen: Look) -> None:
    figure = figures.plot_slots(seen.shown, seen.maps[-1], count=4)
    *views, grid = figure.axes[1:]
    chosen = glmix.representative_slots(seen.maps[-1].assignment[0], 4)
    assert [v.get_title() for v in views] == [f"slot {slot}" for slot in chosen]
    for view, frame, slot in zip(views, grid.patches, chosen, strict=True):
        np.testing.assert_allclose(frame.get_edgecolor(), view.title.get_color())
        h, w = (n + 2 for n in seen.maps[-1].logits.shape[2:])
        assert frame.get_xy() == (slot % 7 * w - 0.5, slot // 7 * h - 0.5)


def test_attention_is_of_the_slot_that_is_asked_for(seen: Look) -> None:
    maps = seen.maps[-1]
    looks = maps.attention[0, :, 11]
    text = titles(figures.plot_attention(seen.shown, maps, slot=11))
    assert "attention of slot 11" in text
    assert f"mean of all heads: most at slot {int(looks.mean(0).argmax())} " in text
    for head in range(len(looks)):
        assert f"head {head}: most at slot {int(looks[head].argmax())} " in text
    with pytest.raises(ValueError, match="no slot 49; this block has 0 to 48"):
        figures.plot_attention(seen.shown, maps, slot=49)
    with pytest.raises(ValueError, match="attention=True"):
        figures.plot_attention(seen.shown, glmix.SlotMaps(maps.block, 16, maps.logits, maps.slot_grid))


def test_figures_in_python_can_be_restyled(seen: Look) -> None:
    figure = glmix.plot_slots(seen.shown, seen.maps[0], count=2)
    figure.suptitle("mine")
    figure.axes[0].set_title("my photo")
    assert titles(figure).startswith("mine\nmy photo")


def test_unreadable_files_are_skipped_and_named(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    text = output(capsys, "explain", pictures[2], tmp_path / "text.jpg", tmp_path / "none.jpg", "--out", tmp_path / "o",
                  "--figures", "slots", status=1)  # fmt: skip
    assert (
        f"skipped {tmp_path / 'text.jpg'}: not an image" in text
        and f"skipped {tmp_path / 'none.jpg'}: No such file" in text
    )


def test_photos_of_one_name_do_not_overwrite_each_other(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "tiny.png"
    twin.write_bytes(pictures[2].read_bytes())
    output(capsys, "explain", pictures[2], twin, "--out", tmp_path / "o", "--figures", "slots")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["tiny-2.slots.png", "tiny.slots.png"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--block", "9"], "no GLMix block 9; this model has 0 (stages.0.blocks.0), 1 (stages.1.blocks.0)"),
    (["--blocks", "2", "-10"], "no GLMix block -10"),
    (["--figures", "slot"], "--figures slot: there are slots, depths"),
    (["--format", "gif"], "--format gif: there are png, pdf, svg"),
    (["--figures", "none"], "nothing to write"),
    (["--slots", "0"], "at least one"),
    (["--slots", "50"], "this network has 49 slots"),
    (["--slot", "49"], "no slot 49; this block has 0 to 48"),
    (["--image-size", "16"], "below 32"),
    (["--folder", "somewhere"], "not both"),
    (["--merge", "5"], "between 0 and 1"),
    (["--slot", "-5"], "--slot -5"),
    (["--blocks", "0,99"], "no GLMix block 99"),
])  # fmt: skip
def test_mistakes(
    arguments: list[str], words: str, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert words in mistake(capsys, "explain", pictures[2], "--out", tmp_path / "o", *arguments)


@pytest.mark.parametrize(("arguments", "option"), [
    (["--batch-size", 4], "--batch-size"),
    (["--figures", "slots,patches", "--merge", 0.4], "--merge"),
    (["--figures", "regions", "--slots", 4], "--slots"),
    (["--figures", "slots", "--slot", -1], "--slot"),
    (["--figures", "attention,slots", "--blocks", 0, 4], "--blocks"),
    (["--figures", "depths", "--block", 3], "--block"),
    (["--figures", "attention", "--normalize"], "--normalize"),
    (["--figures", "none", "--report", "--format", "png"], "--format"),
    (["--figures", "none", "--report", "--block", -1], "--block"),
])  # fmt: skip
def test_options_that_change_nothing_are_refused(
    arguments: list, option: str, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = mistake(capsys, "explain", pictures[2], "--out", tmp_path / "o", *arguments)
    assert said.startswith(f"glmix: {option}: ") and "leave it out" in said and not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [
    ["--figures", "slots"], ["--figures", "all"], ["--format", "png"], ["--blocks", 0, 4], ["--slot", 2], ["--normalize"], ["--report"],
])  # fmt: skip
def test_a_folder_has_no_use_for_what_single_photos_take(
    arguments: list, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = mistake(capsys, "explain", "--folder", album, "--out", tmp_path / "o", *arguments)
    assert said.startswith(f"glmix: {arguments[0]}: ") and "--folder" in said and not (tmp_path / "o").exists()


def test_more_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    assert "name the images" in mistake(capsys, "explain", "--out", tmp_path / "o")
    assert (
        main_error(capsys, "explain", tmp_path / "text.jpg", "--out", tmp_path / "o")
        == "none of the images could be read"
    )
    assert "no such folder" in mistake(capsys, "explain", "--folder", tmp_path / "none", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "no images" in mistake(capsys, "explain", "--folder", tmp_path / "empty", "--out", tmp_path / "o")
    assert "--report" in mistake(capsys, "explain", "--folder", tmp_path, "--report", "--out", tmp_path / "o")
    assert "a file; --out is a folder" in mistake(
        capsys, "explain", tmp_path / "text.jpg", "--out", tmp_path / "text.jpg"
    )
    with pytest.raises(ValueError, match="at least 1"):
        glmix.representative_slots(torch.rand(3, 2, 2), 0)


def main_error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    return mistake(capsys, *arguments).removeprefix("glmix: ")


def test_a_model_without_glmix_blocks(pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = {"mixers": ["attention"] * 4}
    model = glmix.create_model("glnet_pico", num_classes=2, **arguments)
    path = tmp_path / "plain.safetensors"
    write_checkpoint(path, Description("classify", "glnet_pico", arguments, ["a", "b"], ["a", "b"]), model.state_dict())
    for words in (["explain", pictures[2], "--out", tmp_path / "o"], ["slots", "--data", "scenes"]):
        assert "no GLMix blocks" in mistake(capsys, *words, "--checkpoint", path)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Eleven photos of three shapes in nested folders, and one that is none."""
    folder = tmp_path / "album"
    for number, path in enumerate(write_scenes(folder, 11, seed=9, size=64)):
        if number % 3:
            Image.open(path).resize((64 + 32 * (number % 3), 64)).save(path)
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    return folder


def test_folder(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(slot_folder, "PAGE", 4)
    out = tmp_path / "out"
    options = ["explain", "--folder", album, "--out", out, "--image-size", 64, "--batch-size", 2]
    text = output(capsys, *options, status=1)
    photos = sorted(str(p.relative_to(album)) for p in album.rglob("scene-*.png"))
    arrays = sorted(str(p.relative_to(out / "arrays")) for p in (out / "arrays").rglob("*.npz"))
    assert arrays == [f"{name}.npz" for name in photos]
    assert "12/12" in text and "skipped 1 unusable images" in text and "broken.png" in text
    sheets = sorted(out.glob("contact-sheet-*.png"))
    assert len(sheets) == 3
    for sheet in sheets:
        with Image.open(sheet) as picture:
            picture.load()

    model, described = load(SHIPPED)
    preparation = described.preparation.at(64)
    for name in photos[::4]:
        with np.load(out / "arrays" / f"{name}.npz") as found, Image.open(album / name) as photo:
            maps = look(model, photo.convert("RGB"), preparation).maps[-1]
            np.testing.assert_allclose(found["assignment"], maps.assignment[0].numpy(), atol=2e-3)
            assert found["entropy"] == pytest.approx(float(maps.entropy()[0]), abs=1e-4)
            assert found["block"] == maps.block and found["stride"] == 16 and tuple(found["photo"]) == photo.size
            assert tuple(found["slot_grid"]) == (7, 7) and len(found["representatives"]) == 4

    def again() -> set[str]:
        """The arrays and sheets that the same command writes anew; it names the unreadable file each time."""
        before = {p: p.stat().st_mtime_ns for p in made()}
        assert "broken.png" in output(capsys, *options, status=1)
        return {str(p.relative_to(out)) for p in made() if p.stat().st_mtime_ns != before.get(p)}

    def made() -> list[Path]:
        return [p for p in out.rglob("*") if p.suffix in (".npz", ".png")]

    first = f"arrays/{arrays[0]}"
    assert again() == set()
    (out / first).unlink()
    assert again() == {first, "contact-sheet-001.png"}
    (out / first).write_bytes((out / first).read_bytes()[:100])  # damaged
    assert again() == {first, "contact-sheet-001.png"}
    sheets[1].unlink()
    assert again() == {"contact-sheet-002.png"}
    Image.new("RGB", (50, 40), "red").save(album / photos[0])  # another photo under the same name
    assert again() == {first, "contact-sheet-001.png"}
    with np.load(out / first) as found:
        assert tuple(found["photo"]) == (50, 40)
    for name in photos[-5:]:
        (album / name).unlink()
    again()
    assert sorted(out.glob("contact-sheet-*.png")) == sheets[:2]
    for other in (["--block", 0], ["--checkpoint", weights(tmp_path / "other.safetensors")]):
        assert "holds what other settings made" in mistake(capsys, *options, *other)
    assert "holds what other settings made" in mistake(capsys, *options[:1], "--folder", tmp_path, *options[3:])
    (out / "settings.json").write_text("{")
    assert "holds what other settings made" in mistake(capsys, *options)


def test_a_folder_is_gone_on_with_only_by_the_same_preparation(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Checkpoints of the same tensors that prepare images in other ways; and what earlier versions recorded."""
    model, described = load(SHIPPED)
    files = {}
    ways = {"asis": {}, "bilinear": {"interpolation": "bilinear"}, "darker": {"mean": (0.1, 0.1, 0.1)}}
    for name, change in ways.items():
        files[name] = tmp_path / f"{name}.safetensors"
        told = replace(described, preparation=replace(described.preparation, **change))
        write_checkpoint(files[name], told, model.state_dict())
    options = ["explain", "--folder", album, "--out", tmp_path / "out", "--image-size", 64, "--checkpoint"]
    output(capsys, *options, files["asis"], status=1)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert Preparation.read(settings["preparation"]) == described.preparation.at(64)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    output(capsys, *options, files["asis"], status=1)
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    for other in ("bilinear", "darker"):
        assert "holds what other settings made" in mistake(capsys, *options, files[other])
    earlier = {k: settings[k] for k in ("folder", "model", "weights", "block", "slots", "merge")}
    (tmp_path / "out" / "settings.json").write_text(json.dumps(earlier | {"input_size": [3, 64, 64]}))
    assert "holds what other settings made" in mistake(capsys, *options, files["asis"])


def test_arrays_are_of_the_checkpoints_interpolation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two checkpoints of the same tensors, one of which enlarges by the nearest pixel: other arrays, from the command."""
    model, described = load(SHIPPED)
    (tmp_path / "photos").mkdir()
    Image.fromarray(make_scene(4, 1, 30).image).save(tmp_path / "photos" / "small.png")
    found = {}
    for kind in ("nearest", "bicubic"):
        path = tmp_path / f"{kind}.safetensors"
        preparation = replace(described.preparation, interpolation=kind)
        write_checkpoint(path, replace(described, preparation=preparation), model.state_dict())
        output(capsys, "explain", "--folder", tmp_path / "photos", "--out", tmp_path / kind, "--checkpoint", path)
        with (
            np.load(tmp_path / kind / "arrays" / "small.png.npz") as arrays,
            Image.open(tmp_path / "photos" / "small.png") as photo,
        ):
            found[kind] = arrays["assignment"].astype(float)
            expected = photo.convert("RGB").resize((160, 160), Image.Resampling[kind.upper()])
        maps = glmix.slot_maps(model, described.preparation.tensor(expected)[None])[-1]
        np.testing.assert_allclose(found[kind], maps.assignment[0].numpy(), atol=2e-3)
    assert np.abs(found["nearest"] - found["bicubic"]).max() > 0.02


def weights(path: Path) -> Path:
    """The shipped network, untrained."""
    model, described = load(SHIPPED)
    fresh = glmix.create_model(described.model, num_classes=model.num_classes, **described.model_args)
    write_checkpoint(path, described, fresh.state_dict())
    return path


def test_folder_with_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Long names, links, characters of every kind, and results inside the folder itself."""
    folder = tmp_path / "photos"
    folder.mkdir()
    scene = Image.fromarray(make_scene(4, 2, 48).image)
    names = [f"{'l' * 245}.png", "a b'c\"#%&<é😀>.png", "thin.png"]
    for name in names:
        (scene.resize((1, 60)) if name == "thin.png" else scene).save(folder / name)
    (tmp_path / "elsewhere").mkdir()
    scene.save(tmp_path / "elsewhere" / "linked.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    options = ["explain", "--folder", folder, "--out", folder / "slots", "--image-size", 32]
    assert "4/4" in output(capsys, *options)
    assert "4/4" in output(capsys, *options)
    assert len(list((folder / "slots" / "arrays").rglob("*.npz"))) == 4
    output(capsys, "explain", *(folder / n for n in names), "--out", tmp_path / "o", "--figures", "regions", "--report")
    assert len(list((tmp_path / "o").iterdir())) == 4


def test_folder_goes_on_after_a_cut(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(slot_folder, "PAGE", 4)
    options = ["explain", "--folder", album, "--image-size", 64, "--out"]
    output(capsys, *options, tmp_path / "whole", status=1)
    calls: list[int] = []
    original = slot_folder.write_arrays

    def cut(batch, out, job):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(batch, out, job)

    with monkeypatch.context() as patch:
        patch.setattr(slot_folder, "write_arrays", cut)
        assert glmix_main(*options, tmp_path / "cut") == 130  # as the shell has it
    assert capsys.readouterr().err == "glmix: interrupted\n"
    output(capsys, *options, tmp_path / "cut", status=1)
    names = [
        sorted(str(p.relative_to(tmp_path / k)) for p in (tmp_path / k).rglob("*") if p.is_file())
        for k in ("whole", "cut")
    ]
    assert names[0] == names[1]
    for name in (n for n in names[0] if n.endswith(".npz")):
        with np.load(tmp_path / "whole" / name) as one, np.load(tmp_path / "cut" / name) as other:
            np.testing.assert_allclose(one["assignment"], other["assignment"], atol=1e-3)
    assert json.loads((tmp_path / "cut" / "settings.json").read_text())["block"] == 8


def glmix_main(*arguments: object) -> int:
    from glmix.cli import main

    return main([str(a) for a in arguments])


def test_the_papers_style(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One figure, of the second and fifth block where there are no ten; others on demand; nothing else is taken."""
    photo, out = tmp_path / "a.png", tmp_path / "slots"
    Image.new("RGB", (60, 40), "orange").save(photo)
    output(capsys, "explain", photo, "--style", "paper", "--image-size", 64, "--out", out)
    assert [path.name for path in out.iterdir()] == [f"{photo.stem}.paper.png"]
    output(capsys, "explain", photo, "--style", "paper", "--blocks", 0, "--image-size", 64, "--out", out)
    for more in (["--figures", "slots"], ["--normalize"], ["--block", 1]):
        mistake(capsys, "explain", photo, "--style", "paper", "--out", out, *more)
