"""`safemax app` in a real browser, with a server and trainings in processes of their own.

With SAFEMAX_SCREENSHOTS=FOLDER, the pictures of the documents are written into that folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from safemax_sd.app.queue import Queue
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.training.output import LOG, read_log
from tests.processes import until

pytestmark = pytest.mark.xdist_group("browser")  # one server for all of these tests, which build on one another
ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 300
STEPS, EVERY = 60, 10
CHEAP = "--forget_trajectories 8 --retain_trajectories 32"
WIDE, NARROW = 1400, 400
HEAVIEST = 3_000_000
"""Bytes that the page may load, compressed as they come."""
UNLABELLED = """() => [...document.querySelectorAll("input, textarea, select, button, [role=tab]")].filter(
    element => element.offsetParent && !element.innerText.trim() && !element.ariaLabel && !element.title
        && ![...(element.labels || [])].some(label => label.innerText.trim())
        && !element.getAttribute("aria-labelledby")
).map(element => element.outerHTML.slice(0, 200))"""
expect.set_options(timeout=SECONDS * 1000)


class Server:
    """A server of `safemax app` on a folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["app", "--runs_dir", "runs", "--port", str(self.port)]
        environment = {**os.environ, "WNSEARCHDIR": str(ROOT / "tests" / "wordnet"), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "safemax_sd.cli", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.url in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("app"))
    yield found
    found.kill()
    queue = Queue(found.runs)
    for entry in queue.entries():
        queue.stop(entry.number)
    ends = time.monotonic() + SECONDS
    while any(entry.active for entry in queue.entries()) and time.monotonic() < ends:
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.exists() else None)
        if path is None:
            pytest.skip(f"no browser: neither {', '.join(BROWSERS)} nor Playwright's own (playwright install chromium)")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """Open the page, from which nothing outside this machine may be asked for."""
    context = browser.new_context(viewport={"width": WIDE, "height": 900})
    context.set_default_timeout(SECONDS * 1000)
    opened, asked = context.new_page(), []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(server.url)
    if any(entry.kind == "erase" for entry in Queue(server.runs).entries()):
        # What is typed into a part that has just unfolded is lost when the queue appears, a second after the page.
        expect(opened.get_by_role("radio").first).to_be_visible()
    yield opened
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    context.close()


def picture(page: Page, name: str) -> None:
    """Write a picture for the documents if they are asked for."""
    folder = os.environ.get("SAFEMAX_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def entry(page: Page, name: str, state: str) -> None:
    """Wait until the queue shows an entry in a state."""
    expect(page.get_by_label(f"{name} ({state})")).to_be_visible(timeout=SECONDS * 1000)


def field(page: Page, label: str) -> Locator:
    return page.get_by_label(label).filter(visible=True).first


def start(page: Page) -> None:
    page.get_by_role("button", name="Start").filter(visible=True).click()


def fails(page: Page, text: str) -> None:
    """Wait for an error in one line, and close it."""
    shown = page.get_by_test_id("toast-text").filter(has_text=text)
    expect(shown).to_be_visible()
    page.get_by_test_id("toast-close").click()
    expect(shown).to_be_hidden()


def test_what_cannot_be_used_is_said_in_one_line(page: Page, server: Server) -> None:
    start(page)
    fails(page, "Words (not given): are required")
    field(page, "Words to forget").fill("bomb")
    field(page, "Model").fill("/nowhere/model")
    start(page)
    fails(page, "--pretrained_model_name_or_path /nowhere/model: must be a diffusers model folder")
    field(page, "Model").fill("emoji")
    field(page, "Steps").fill("many")
    start(page)
    fails(page, "invalid int value: 'many'")
    tab(page, "Compare")
    page.get_by_role("button", name="Draw").click()
    fails(page, "Adapters (not given): are required")
    assert Queue(server.runs).entries() == []
    assert [path.name for path in server.runs.iterdir()] == [".queue"]


def test_a_training_is_reloaded_stopped_resumed_and_outlives_its_server(page: Page, server: Server) -> None:
    field(page, "Words to forget").fill("bomb")
    field(page, "Steps").fill(str(STEPS))
    page.get_by_label("Measure afterwards").uncheck()
    page.get_by_role("button", name="More settings").filter(visible=True).click()
    field(page, "Steps between pictures").fill(str(EVERY))
    field(page, "More flags").fill(CHEAP)
    start(page)
    progress = page.get_by_text(re.compile(rf"step \d+ of {STEPS}, .* left"))
    expect(progress).to_be_visible(timeout=SECONDS * 1000)
    page.reload()
    expect(progress).to_be_visible()
    other = page.context.new_page()
    other.goto(server.url)
    entry(other, "bomb", "running")
    expect(page.get_by_alt_text(f"step {EVERY}", exact=True)).to_be_visible(timeout=SECONDS * 1000)
    other.get_by_role("button", name="Stop").filter(visible=True).click()
    for shown in (page, other):
        entry(shown, "bomb", "stopped")
    folder = server.runs / "bomb"
    assert not (folder / "erasure.json").exists() and list(folder.glob("checkpoint-*"))
    stopped = read_log(folder / LOG)[-1]["step"]
    page.get_by_role("button", name="Resume").filter(visible=True).click()
    entry(page, "bomb", "running")
    until(lambda: read_log(folder / LOG)[-1]["step"] > stopped or (folder / "erasure.json").exists())
    server.kill()
    server.start()
    page.goto(server.url)
    entry(page, "bomb", "done")
    expect(page.get_by_text("cost: ")).to_be_visible()
    assert [row["step"] for row in read_log(folder / LOG)] == list(range(1, STEPS + 1))
    expect(page.get_by_alt_text(re.compile("^step"))).to_have_count(STEPS // EVERY)
    picture(page, "app_erase")


def answer(page: Page, prompt: str, column: str) -> str:
    """Return what the judge says below a picture."""
    shown = page.locator("figure").filter(has=page.get_by_alt_text(f"{prompt}, {column}", exact=True))
    expect(shown).to_be_visible()
    return shown.inner_text()


def drawn(page: Page, prompt: str, column: str) -> str:
    """Return the content of a picture."""
    return str(page.get_by_alt_text(f"{prompt}, {column}", exact=True).get_attribute("src"))


def test_an_anchor_erases_and_brings_back_by_tick_boxes(page: Page, server: Server) -> None:
    page.get_by_role("button", name="Prompt files").click()
    for part in ("forget", "retain"):
        field(page, f"Prompts to {part}").fill(str(ROOT / "prompts" / "emoji" / "bomb" / f"{part}.csv"))
    field(page, "Pictures to measure").fill("4")
    page.get_by_role("button", name="More settings").filter(visible=True).click()
    field(page, "Halting anchor").fill("emoji")
    start(page)
    entry(page, "bomb_2", "done")
    tab(page, "Results")
    expect(page.locator("table.runs tbody tr")).to_have_count(2)
    expect(page.frame_locator("iframe").get_by_role("heading", name="Headline")).to_be_visible()
    expect(page.get_by_role("link", name="pytorch_lora_weights.safetensors")).to_be_visible()
    folder = server.runs / "bomb_2"
    assert ErasureRecord.read(folder).forget.concepts == ("bomb",)
    for concepts in (("bomb", "dog"), ("bomb",)):
        page.get_by_label("dog", exact=True).set_checked("dog" in concepts)
        page.get_by_role("button", name="Erase the ticked").click()
        expect(page.get_by_text(re.compile(rf"erased {len(concepts)} concept"))).to_be_visible()
        assert ErasureRecord.read(folder).forget.concepts == concepts
    with page.expect_download() as download:
        page.get_by_role("link", name="erasure.json").click()
    assert json.loads(Path(download.value.path()).read_text()) == json.loads((folder / "erasure.json").read_text())


def test_the_base_model_and_the_erased_ones_stand_side_by_side(page: Page) -> None:
    tab(page, "Compare")
    expect(page.locator(".token").filter(has_text="bomb_2")).to_be_visible()  # the latest run is chosen
    field(page, "Adapters").click()
    page.get_by_role("option", name="bomb", exact=True).click()
    page.keyboard.press("Escape")
    started = time.monotonic()
    page.get_by_role("button", name="Draw").click()
    assert answer(page, "a dog", "base")
    print(f"first pictures {time.monotonic() - started:.1f} s after the first click, with loading")
    assert answer(page, "a dog", "all together")
    for column in ("base", "bomb", "bomb_2"):
        assert answer(page, "a dog", column).startswith("dog")
    assert answer(page, "a bomb", "base").startswith("bomb")
    assert answer(page, "a bomb", "bomb_2").startswith("noise")
    assert not answer(page, "a bomb", "bomb").startswith("bomb")
    picture(page, "app_compare")
    erased = drawn(page, "a bomb", "bomb")
    page.get_by_label("number input for Strength").fill("0")
    started = time.monotonic()
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_alt_text("a bomb, bomb", exact=True)).not_to_have_attribute("src", erased)
    print(f"third pictures {time.monotonic() - started:.1f} s after the next click")
    for prompt in ("a bomb", "a dog"):
        assert drawn(page, prompt, "bomb") == drawn(page, prompt, "base")


def test_pictures_of_an_attack_come_into_the_page(page: Page, server: Server) -> None:
    tab(page, "Attack")
    page.locator(".remove-all").filter(visible=True).click()
    start(page)
    fails(page, "Attacks (not given): are required")
    attacks = field(page, "Attacks")
    attacks.fill("plain")
    attacks.press("Enter")
    field(page, "Pictures of each try").fill("2")
    start(page)
    fails(page, "--suite (not given): is required")  # an anchor's record names no prompt file
    field(page, "Prompt suite").fill("emoji/bomb")
    start(page)
    expect(page.get_by_alt_text(re.compile("erased: "))).to_be_visible(timeout=SECONDS * 1000)
    entry(page, "bomb_2: plain", "done")
    assert (server.runs / "bomb_2" / "attacks" / "attacks.json").is_file()


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_tab_fits_and_every_control_has_a_name(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("Erase", "Compare", "Results", "Attack"):
        tab(page, name)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(UNLABELLED) == [], name


def test_the_keyboard_alone_starts_a_run(page: Page) -> None:
    field(page, "Words to forget").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Start":
            break
    page.keyboard.press("Enter")
    fails(page, "Words (not given): are required")


def test_the_page_is_light(browser: Browser, server: Server) -> None:
    context = browser.new_context()
    opened = context.new_page()
    network, sizes = context.new_cdp_session(opened), []
    network.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    network.send("Network.enable")
    started = time.monotonic()
    opened.goto(server.url)
    expect(field(opened, "Words to forget")).to_be_visible()
    seconds = time.monotonic() - started
    opened.wait_for_timeout(1000)
    print(f"page: {sum(sizes) / 1000:.0f} KB in {len(sizes)} files, shown after {seconds:.1f} s")
    assert sum(sizes) < HEAVIEST
    context.close()
