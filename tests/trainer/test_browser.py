"""TensorBoard in a real browser: headless Chromium opens a run's curves and pictures, driven over WebDriver.

Needs Debian's packages chromium and chromium-driver, or their like. `SCREENSHOTS=folder` keeps what the browser saw.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.launch_ranks import free_port
from tests.trainer.tiny import sam_arguments
from trainer import train

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]


class Browser:
    """The few commands of the W3C WebDriver protocol that are needed."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1100"]
        chrome = {"binary": BROWSER, "args": [*arguments, "--disable-dev-shm-usage"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome}}}
        self.session = self.base + "/session/" + ask(self.base + "/session", wanted)["sessionId"]

    def open(self, url: str) -> None:
        ask(self.session + "/url", {"url": url})

    def run(self, script: str):
        return ask(self.session + "/execute/sync", {"script": script, "args": []})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(ask(self.session + "/screenshot")))

    def close(self) -> None:
        ask(self.session, method="DELETE")


def ask(url: str, body: dict | None = None, method: str | None = None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=240) as answer:
        return json.loads(answer.read())["value"]


def wait_for(condition, seconds: float = 240.0):
    """What `condition` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass  # not listening yet
        time.sleep(0.5)
    raise AssertionError(f"{condition} did not come true in {seconds:.0f} s")


def listens(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    if "RUN" in os.environ:  # to take the documentation's screenshots of a run that has learned something
        return Path(os.environ["RUN"])
    path = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, path, "evaluate.every_steps=3")) == 0
    return path


@pytest.fixture(scope="module")
def page(run_dir, tmp_path_factory):
    """(browser, address of TensorBoard)."""
    board_port, driver_port = free_port(), free_port()
    board_command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir), "--load_fast=false"]
    board_command += ["--host", "127.0.0.1", "--port", str(board_port)]
    log = tmp_path_factory.mktemp("logs") / "log"
    processes, browser = [], None
    try:
        with log.open("wb") as out:
            processes.append(subprocess.Popen(board_command, stdout=out, stderr=out))
            processes.append(subprocess.Popen([DRIVER, f"--port={driver_port}"], stdout=out, stderr=out))
        address = f"http://127.0.0.1:{board_port}"
        wait_for(lambda: listens(address))
        wait_for(lambda: listens(f"http://127.0.0.1:{driver_port}/status"))
        browser = Browser(driver_port)
        yield browser, address
    finally:
        if browser:
            browser.close()
        for process in processes:
            process.terminate()
            process.wait(timeout=30)


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.screenshot(Path(folder) / name)


def open_filtered(browser: Browser, address: str, tag_filter: str) -> None:
    """The time series page with the cards whose tag matches."""
    browser.open(f"{address}/?tagFilter={urllib.parse.quote(tag_filter, safe='')}#timeseries")


def cards_titled(browser: Browser, kind: str, tag: str) -> bool:
    """Whether a card of the time series page is headed by `tag`, which it breaks before the slash."""
    titles = f"[...document.querySelectorAll('{kind}')].map(c => c.innerText.replace(/\\s/g, ''))"
    return browser.run(f"return {titles}.some(title => title.startsWith({json.dumps(tag)}))")


def test_the_curves_are_drawn(page):
    browser, address = page
    open_filtered(browser, address, "train/(loss|grad_norm)|eval/miou$")
    wait_for(lambda: cards_titled(browser, "scalar-card", "train/loss"))
    drawn = "return [...document.querySelectorAll('scalar-card path')].filter(p => p.getTotalLength() > 0).length"
    canvases = "return document.querySelectorAll('scalar-card canvas').length"
    wait_for(lambda: browser.run(drawn) or browser.run(canvases))
    time.sleep(2)
    keep(browser, "tensorboard_scalars.png")


@pytest.mark.parametrize("tag, name", [("eval/masks", "masks"), ("eval/rounds_1", "rounds")])
def test_the_pictures_are_shown(page, tag, name):
    browser, address = page
    open_filtered(browser, address, tag)
    wait_for(lambda: cards_titled(browser, "image-card", tag))
    widths = "return [...document.querySelectorAll('image-card img')].map(i => i.complete ? i.naturalWidth : 0)"
    # Four panels of 192 pixels and more: the picture itself and not a broken one's placeholder.
    wait_for(lambda: any(width > 4 * 192 for width in browser.run(widths)))
    keep(browser, f"tensorboard_{name}.png")


def test_the_settings_can_be_read(page):
    browser, address = page
    browser.open("about:blank")
    browser.open(address + "/#text")
    frame = "return document.body.innerHTML.length > 0 && [...document.querySelectorAll('*')].length > 50"
    wait_for(lambda: browser.run(frame))
    deep = """
        const text = node => [...node.childNodes].map(c => c.nodeType == 3 ? c.textContent : text(c)).join('')
            + (node.shadowRoot ? text(node.shadowRoot) : '');
        return text(document.body);
    """
    wait_for(lambda: "global_size" in browser.run(deep) and "torch: " in browser.run(deep))
    keep(browser, "tensorboard_text.png")


def test_what_is_not_there_is_not_found(page):
    """The tests above can fail."""
    browser, address = page
    open_filtered(browser, address, "train/(loss|grad_norm)|eval/miou$")
    wait_for(lambda: cards_titled(browser, "scalar-card", "train/loss"))
    assert not cards_titled(browser, "scalar-card", "train/no_such_thing")
