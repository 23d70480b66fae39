"""The page of slots in a real browser: what lights up is what the arrays say."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import glmix
from glmix.data.prepare import Preparation
from glmix.data.scenes import make_scene
from glmix.models import SHIPPED, load
from glmix.slots.look import Look, look
from glmix.slots.report import MOST_BYTES, encoded, shown_assignment, write_slot_report

# a long scene, so that rows and columns cannot be mixed up, and a smaller one
PHOTOS = {
    "long <b>&amp;": np.concatenate([make_scene(1, i, 160).image for i in range(2)], 1),
    "small": make_scene(2, 0, 96).image,
}


@pytest.fixture(scope="module")
def looks() -> list[Look]:
    model, described = load(SHIPPED)
    seen = [look(model, Image.fromarray(pixels), described.preparation, name) for name, pixels in PHOTOS.items()]
    torch.manual_seed(0)
    idle = glmix.create_model("glnet_pico", slot_scale=0.01).eval()
    return [*seen, look(idle, Image.fromarray(PHOTOS["small"]), described.preparation, "untrained")]


@pytest.fixture(scope="module")
def page(looks: list[Look], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert write_slot_report(path, iter(looks), "glnet_pico <shipped>") == [seen.name for seen in looks]
    return path


def test_one_file_that_asks_for_nothing(page: Path, looks: list[Look]) -> None:
    text = page.read_text()
    assert list(page.parent.iterdir()) == [page]
    assert not re.search(
        r"""https?://(?!www\.w3\.org/2000/svg)|href=|src="http|fetch\(|XMLHttpRequest|import\(""", text
    )
    assert all(len(encoded(seen)) < MOST_BYTES for seen in looks)


def test_large_maps_stay_below_the_limit() -> None:
    """A published network with a large image: finer maps than a page can hold."""
    torch.manual_seed(0)
    model = glmix.create_model("glnet_4g", slot_scale=20.0).eval()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (448, 784, 3), dtype=np.uint8))
    seen = look(model, photo, Preparation().at(448))
    assert seen.maps[0].logits.shape[2:] == (112, 196)
    assert len(encoded(seen)) < MOST_BYTES


def browser_paths() -> tuple[str, str] | None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    paths = browser_paths()
    if paths is None:
        pytest.skip("no chromium and chromedriver; `make test` as root installs Debian's")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1200,1000", "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ["SE_OFFLINE"] = "true"
    chrome = Chrome(options, ChromeService(paths[1]))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, chrome: Any, path: Path) -> None:
        self.chrome = chrome
        chrome.get(path.as_uri())
        self.ready(0)

    def ready(self, image: int, block: int | None = None) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        def there(chrome: Any) -> bool:
            state = chrome.execute_script("return document.body.dataset.ready || ''")
            return state.startswith(f"{image}/") and (block is None or state == f"{image}/{block}")

        WebDriverWait(self.chrome, 20).until(there)

    def find(self, selector: str) -> Any:
        return self.chrome.find_element("css selector", selector)

    def choose(self, name: str, index: int) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(f"#{name}")).select_by_index(index)

    def options(self, name: str) -> list[str]:
        return [option.text for option in self.chrome.find_elements("css selector", f"#{name} option")]

    def point(self, row: int, column: int, shape: tuple[int, int], kind: str = "mouse", press: bool = False) -> None:
        """Move to the middle of a place of the grid, and press there."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        picture = self.find("#picture")
        box = picture.rect
        x = ((column + 0.5) / shape[1] - 0.5) * box["width"]
        y = ((row + 0.5) / shape[0] - 0.5) * box["height"]
        if kind == "touch":
            finger = ActionBuilder(self.chrome, mouse=PointerInput("touch", "finger"))
            finger.pointer_action.move_to(picture, round(x), round(y)).pointer_down().pointer_up()
            finger.perform()
            return
        actions = ActionChains(self.chrome, 0).move_to_element_with_offset(picture, round(x), round(y))
        (actions.click() if press else actions).perform()

    def lit(self) -> set[int]:
        return {int(t.get_attribute("data-slot")) for t in self.chrome.find_elements("css selector", "#slots .lit")}

    def pressed(self) -> list[int]:
        tiles = self.chrome.find_elements("css selector", '#slots [aria-pressed="true"]')
        return [int(t.get_attribute("data-slot")) for t in tiles]

    def clear(self, shape: tuple[int, int]) -> np.ndarray:
        """How much of the photo shows (0 to 1) at the middle of every place, from the overlay's pixels."""
        script = """
          const c = document.getElementById("overlay"), [h, w] = arguments, d = c.getContext("2d");
          return Array.from({length: h * w}, (_, i) =>
            d.getImageData((i % w + .5) / w * c.width, (Math.floor(i / w) + .5) / h * c.height, 1, 1).data[3]);"""
        return 1 - np.reshape(self.chrome.execute_script(script, *shape), shape) / 225

    def slide(self, value: int) -> None:
        script = (
            "const s = document.getElementById('hardness'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
        )
        self.chrome.execute_script(script, value)

    def keys(self, selector: str, *keys: str) -> None:
        self.find(selector).send_keys(*keys)

    def text(self, selector: str) -> str:
        return self.find(selector).text


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Page]:
    yield Page(browser, page)
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems


def test_pointing_lights_up_the_slots_of_a_place(opened: Page, looks: list[Look]) -> None:
    for block in (0, len(looks[0].maps) - 1):
        opened.choose("block", block)
        opened.ready(0, block)
        arrays = shown_assignment(looks[0].maps[block]).numpy()
        shape = arrays.shape[1:]
        for row, column in ((1, 2), (shape[0] - 2, shape[1] // 3), (shape[0] // 2, shape[1] - 1)):
            opened.point(row, column, shape)
            weights = arrays[:, row, column]
            surely = set(np.flatnonzero(weights > 0.11 * weights.max()))
            perhaps = set(np.flatnonzero(weights > 0.09 * weights.max()))
            lit = opened.lit()
            assert surely <= lit <= perhaps
            shown = np.clip(arrays[sorted(lit)].sum(0) / weights[sorted(lit)].sum(), 0, 1)
            assert np.abs(opened.clear(shape) - shown).mean() < 0.03
            assert f"slot {weights.argmax()} " in opened.text("#details")


def test_a_chosen_slot_shows_region_rank_and_attention(opened: Page, looks: list[Look]) -> None:
    block = len(looks[0].maps) - 1
    maps = looks[0].maps[block]
    arrays = shown_assignment(maps).numpy()
    shape = arrays.shape[1:]
    row, column = 4, 3
    opened.point(row, column, shape, press=True)
    slot = int(arrays[:, row, column].argmax())
    assert opened.pressed() == [slot]
    assert np.abs(opened.clear(shape) - arrays[slot] / arrays.max()).mean() < 0.02
    ranks = glmix.representative_slots(maps.assignment[0], 8)
    details = opened.text("#details")
    assert f"Representative {ranks.index(slot) + 1} of 8" in details if slot in ranks else "Most like" in details
    attention = maps.attention[0, :, slot].numpy()
    assert f"Attends to slot {attention.mean(0).argmax()}, " in details.replace("\n", " ")
    opened.choose("head", 2)  # the mean, head 0, head 1
    assert f"Attends to slot {attention[1].argmax()}, " in opened.text("#details").replace("\n", " ")
    assert opened.chrome.find_elements("css selector", "#lines line")

    opened.slide(100)
    hard = arrays.argmax(0) == slot
    assert np.abs(opened.clear(shape) - hard).mean() < 0.01
    opened.slide(50)
    sharper = arrays[slot] ** 2 / (arrays**2).sum(0)
    assert np.abs(opened.clear(shape) - sharper / (arrays**2 / (arrays**2).sum(0)).max()).mean() < 0.02
    opened.slide(0)
    opened.find("#own").click()
    assert np.abs(opened.clear(shape) - arrays[slot] / arrays[slot].max()).mean() < 0.03
    opened.keys("body", "\ue00c")  # Escape
    assert opened.pressed() == []


def test_tiles_choose_slots_too(opened: Page, looks: list[Look]) -> None:
    opened.find('#slots [data-slot="8"]').click()
    assert opened.pressed() == [8]
    opened.keys('#slots [data-slot="8"]', "\ue014")  # right
    assert opened.chrome.switch_to.active_element.get_attribute("data-slot") == "9"
    opened.chrome.switch_to.active_element.send_keys("\ue015")  # down, a row of 7
    opened.chrome.switch_to.active_element.send_keys(" ")
    assert opened.pressed() == [16]


def test_light_follows_the_pointer_and_rests_on_what_is_chosen(opened: Page, looks: list[Look]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    shape = tuple(looks[0].maps[-1].logits.shape[2:])
    pointer = ActionChains(opened.chrome, 0)
    pointer.move_to_element(opened.find('#slots [data-slot="10"]')).perform()
    assert opened.lit() == {10}
    pointer.move_to_element(opened.find("h1")).perform()
    assert opened.lit() == set() and opened.clear(shape).min() == 1
    opened.point(2, 2, shape, press=True)
    chosen = opened.pressed()
    opened.point(5, 9, shape)
    assert opened.lit() != set(chosen)
    pointer.move_to_element(opened.find("h1")).perform()
    assert opened.lit() == set(chosen) and opened.pressed() == chosen
    opened.keys("body", "\ue00c")
    pointer.move_to_element(opened.find("#picture")).context_click().perform()
    assert opened.pressed() == []
    opened.keys("body", "\ue00c")
    opened.find('#slots [data-slot="24"]').click()
    opened.find("#details button").click()
    focused = opened.chrome.switch_to.active_element.get_attribute("data-slot")
    assert [int(focused)] == opened.pressed()


def test_a_finger_that_moves_lights_up_and_chooses_nothing(opened: Page, looks: list[Look]) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    finger = ActionBuilder(opened.chrome, mouse=PointerInput("touch", "finger"))
    picture = opened.find("#picture")
    finger.pointer_action.move_to(picture, -100, -50).pointer_down().move_to(picture, 60, 40)
    finger.perform()
    assert opened.lit() and opened.pressed() == []
    finger.clear_actions()


@pytest.mark.parametrize("arguments", [
    {"slot_grid": (1, 1)}, {"slot_grid": (12, 12)}, {"slot_grid": (2, 5)}, {"seeds": "learned"},
    {"seeds": "learned", "slot_grid": (1, 37)},
], ids=["one", "many", "oblong", "learned", "prime"])  # fmt: skip
def test_other_slots(arguments: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = glmix.create_model("glnet_pico", **arguments).eval()
    preparation = Preparation().at(64)
    seen = look(model, Image.fromarray(PHOTOS["small"]), preparation, "photo", attention="seeds" not in arguments)
    write_slot_report(tmp_path / "report.html", [seen], "untrained")
    opened = Page(browser, tmp_path / "report.html")
    arrays = shown_assignment(seen.maps[-1]).numpy()
    opened.point(1, 2, arrays.shape[1:], press=True)
    # of equal weights, as untrained learned slots have them, any may be the strongest
    assert arrays[opened.pressed()[0], 1, 2] == pytest.approx(arrays[:, 1, 2].max(), rel=1e-3)
    assert len(opened.chrome.find_elements("css selector", "#slots button")) == len(arrays)
    assert ("Attends to" in opened.text("#details")) == ("seeds" not in arguments)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_keys_and_touch(opened: Page, looks: list[Look]) -> None:
    arrays = shown_assignment(looks[0].maps[-1]).numpy()
    _, h, w = arrays.shape
    opened.keys("#picture", "\ue014", "\ue015")  # right and down, from the middle
    row, column = h // 2 + 1, w // 2 + 1
    strongest = int(arrays[:, row, column].argmax())
    assert opened.text("#spoken").startswith(f"Row {row + 1}, column {column + 1}: slot {strongest} ")
    opened.keys("#picture", "\ue007")
    assert opened.pressed() == [strongest]
    assert f"Slot {strongest}: strongest at" in opened.text("#spoken")
    opened.keys("#picture", "\ue00c")
    opened.chrome.refresh()
    opened.ready(0)
    opened.keys("#picture", "\ue007")  # without arrows: the middle
    assert opened.pressed() == [int(arrays[:, h // 2, w // 2].argmax())]
    opened.keys("#picture", "\ue00c")
    opened.point(2, 5, (h, w), kind="touch")
    assert opened.pressed() == [int(arrays[:, 2, 5].argmax())]


def test_images_blocks_and_idle_slots(opened: Page, looks: list[Look]) -> None:
    assert opened.options("image") == [seen.name for seen in looks]
    assert [text.split(",")[0] for text in opened.options("block")] == [maps.block for maps in looks[0].maps]
    entropy = float(looks[0].maps[-1].entropy()[0])
    assert f"entropy {entropy:.2f}" in opened.text("#facts")
    assert not opened.find("#idle").is_displayed()
    opened.choose("image", 1)
    opened.ready(1)
    assert opened.text("#facts").startswith("small, 96 x 96 pixels, seen by the network at 160 x 160.")
    opened.choose("image", 2)
    opened.ready(2)
    assert "idle" in opened.text("#idle") and "noise" in opened.text("#idle")
    assert all("(idle)" in text for text in opened.options("block"))


def test_light_dark_narrow_and_described(opened: Page) -> None:
    def brightness(scheme: str) -> float:
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        colors = opened.chrome.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        back, text = (np.mean([float(v) for v in c.split("(")[1].rstrip(")").split(",")[:3]]) for c in colors)
        assert abs(back - text) > 150
        return float(back)

    assert brightness("light") > 200 > 60 > brightness("dark")
    assert opened.find("html").get_attribute("lang") == "en"
    assert opened.find("#photo").get_attribute("alt") == "long <b>&amp;"
    assert "Arrow keys" in opened.find("#picture").get_attribute("aria-label")
    assert opened.find("#spoken").get_attribute("aria-live") == "polite"
    labels = [t.get_attribute("aria-label") for t in opened.chrome.find_elements("css selector", "#slots button")]
    assert len(labels) == 49 and all(label.startswith("slot ") and "strongest at" in label for label in labels)
    for control in ("image", "block", "head", "hardness", "own"):
        assert opened.find(f"#{control}").find_element("xpath", "ancestor::label").text
    opened.chrome.set_window_size(420, 900)  # a telephone
    assert opened.chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    opened.chrome.set_window_size(1200, 1000)
