"""The report in a real browser: headless Chromium over its debugging pipe, which needs no driver library."""

import base64
import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.cli import main
from tests.unit.test_report import CASES, LABEL, make_study

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
TIMEOUT_S = 240  # on a machine with other work to do
KEYS = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Space": 32}


class Browser:
    """A page in headless Chromium, and what it wrote to its console."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_child, from_child)]
        self._process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--hide-scrollbars", "--no-first-run",
                f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank",
            ],
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
            close_fds=False,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_child, from_child, *high):
            os.close(fd)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def send(self, method: str, **params):
        """A command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _receive(self):
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _note(self, event) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            if "GPU stall" not in params["entry"]["text"]:  # of reading the pictures of software WebGL
                self.problems.append(json.dumps(params["entry"]))
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, file: Path) -> None:
        """Open a file and wait for the first case's picture, if the page has pictures."""
        self.send("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete'")
        self.wait("!document.querySelector('script.view') || document.querySelector('#panels canvas')")

    def run(self, script: str):
        """The value of an expression (its promise is awaited)."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds; a browser that never gets there fails the test."""
        script = f"""new Promise((done, fail) => {{
            const end = Date.now() + {TIMEOUT_S * 1000};
            const late = () => fail(new Error('not: ' + {json.dumps(condition)}));
            const look = () => ({condition}) ? done(true) : Date.now() > end ? late() : setTimeout(look, 20);
            look();
        }})"""
        self.run(script)

    def key(self, name: str) -> None:
        """Press a key where the focus is."""
        text = {"Enter": "\r", "Space": " "}.get(name)
        code = {"key": " " if name == "Space" else name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        self.send("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def resize(self, width: int, height: int) -> None:
        """The window's size in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path, selector: str = "body") -> None:
        """A PNG of an element, beyond the window too."""
        box = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: b.left + scrollX, y: b.top + scrollY, width: b.width, height: b.height, scale: 1} })()"
        )
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=box)
        file.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.send("Browser.close")
        self._process.wait(TIMEOUT_S)
        os.close(self._write)
        os.close(self._read)


pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium found; install it to test the report in a browser")
EVIL = "evil<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of the small study, with one case whose name is markup."""
    root = make_study(tmp_path_factory.mktemp("study"), (*CASES[:2], EVIL))
    assert main(["report", str(root / "results"), "-i", str(root / "images"), "-o", str(root / "r.html")]) == 0
    return root / "r.html"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(shared, page):
    """The page, just opened; at the end nothing may have gone wrong, and nothing may have been asked of a network."""
    shared.problems.clear()
    shared.requests.clear()
    shared.resize(1200, 900)
    shared.open(page)
    yield shared
    assert not shared.problems
    assert not [url for url in shared.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert shared.run("window.hacked") is None


def column(browser, index):
    """The texts of the visible cells of a column of the table of cases."""
    rows = "[...document.querySelectorAll('#case-table tbody tr')].filter((row) => !row.hidden)"
    return browser.run(f"{rows}.map((row) => row.cells[{index}].textContent)")


def pixels(browser, selector="#panels canvas"):
    """The sum of a picture's pixels and, of how many of them red is more than 40 above blue."""
    return browser.run(
        f"(() => {{ const c = document.querySelector('{selector}'), own = new OffscreenCanvas(c.width, c.height);"
        " const context = own.getContext('2d'); context.drawImage(c, 0, 0);"
        " const p = context.getImageData(0, 0, c.width, c.height).data; let sum = 0, orange = 0;"
        " for (let i = 0; i < p.length; i += 4) { sum += p[i] + p[i + 1] + p[i + 2]; orange += p[i] > p[i + 2] + 40; }"
        " return [sum, orange] })()"
    )


def set_value(browser, name, value, event="input"):
    browser.run(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event('{event}', {{bubbles: true}})) }})()"
    )


def test_names_are_text(browser):
    assert EVIL in column(browser, 0)
    assert browser.run("document.querySelector('img[src=x]')") is None
    set_value(browser, "view-case", "2", "change")
    browser.wait(f"document.getElementById('view-title').textContent.startsWith({json.dumps(EVIL)})")
    assert LABEL in browser.run("document.getElementById('legend').textContent")
    assert LABEL in browser.run("document.getElementById('volume-chart').textContent")


def test_sorting_by_mouse_and_keyboard(browser):
    dice = 3
    head = f"document.querySelectorAll('#case-table thead th')[{dice}]"
    browser.run(f"{head}.querySelector('button').click()")
    values = list(map(float, column(browser, dice)))
    assert values == sorted(values)
    assert len(set(values)) > 1
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{head}.querySelector('button').focus()")
    browser.key("Enter")
    assert list(map(float, column(browser, dice))) == sorted(values, reverse=True)
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    browser.run("document.querySelector('#case-table thead button').click()")  # by case, as people count
    assert column(browser, 0) == ["case_1", "case_10", EVIL]


def test_filtering(browser):
    set_value(browser, "filter-text", "CASE_1")
    assert column(browser, 0) == ["case_1", "case_10"]
    assert browser.run("document.getElementById('case-count').textContent") == "2 of 3 rows"
    values = sorted(map(float, column(browser, 3)))
    set_value(browser, "filter-dice", str((values[0] + values[1]) / 2))
    assert [float(value) for value in column(browser, 3)] == values[:1]
    browser.run("document.querySelector('#case-filter button[type=reset]').click()")
    browser.wait("document.getElementById('case-count').textContent === '3 of 3 rows'")
    assert len(column(browser, 0)) == 3


def test_sliders_and_overlays(browser):
    assert browser.run("document.querySelectorAll('#panels canvas').length") == 2
    assert browser.run("document.getElementById('slice-text').textContent") == "2 of 6"  # the first of the box's
    _, labelled = pixels(browser)
    assert labelled > 1000
    for name in ("show-prediction", "show-reference"):
        browser.run(f"document.getElementById('{name}').click()")
        browser.run("new Promise((done) => setTimeout(done, 100))")
        _, fewer = pixels(browser)
        assert fewer < labelled
        labelled = fewer
    assert labelled == 0
    grey, _ = pixels(browser)
    browser.run("document.getElementById('view-slice').focus()")
    browser.key("ArrowRight")
    browser.wait("document.getElementById('slice-text').textContent === '3 of 6'")
    assert pixels(browser)[0] != grey
    set_value(browser, "view-sample", "3")
    browser.wait("document.getElementById('sample-text').textContent === '3 of 3'")
    assert browser.run("document.getElementById('show-samples').checked")
    assert pixels(browser)[1] > 0
    before = pixels(browser)
    set_value(browser, "view-map", "entropy", "change")
    browser.wait("document.getElementById('legend').textContent.includes('entropy: 0 to 0.700')")
    assert pixels(browser) != before
    for plane, text in (("1", "of 10"), ("2", "of 12"), ("0", "of 6")):
        set_value(browser, "view-plane", plane, "change")
        browser.wait(f"document.getElementById('slice-text').textContent.endsWith('{text}')")


def test_a_row_opens_its_case(browser):
    browser.run("document.querySelector('tr[data-case=case_10] button.show').click()")
    browser.wait("document.getElementById('view-title').textContent === 'case_10, predictions'")
    assert browser.run("document.querySelector('tr.chosen').dataset.case") == "case_10"
    set_value(browser, "view-case", "0", "change")
    browser.wait("document.getElementById('contribution-table').textContent.includes('0.750')")


def test_viewer_shows_the_volume(browser, tmp_path):
    browser.resize(500, 500)  # its WebGL is computed by the processor
    browser.run("document.getElementById('viewer-open').click()")
    browser.wait("!/Opening|shows the case/.test(document.getElementById('viewer-state').textContent)")
    assert browser.run("document.getElementById('viewer-state').textContent").startswith("Click or drag")
    browser.run("new Promise((done) => setTimeout(done, 500))")
    browser.screenshot(tmp_path / "viewer.png", "#viewer-box")
    assert _orange(tmp_path / "viewer.png") > 100
    set_value(browser, "viewer-overlay", "", "change")
    browser.run("new Promise((done) => setTimeout(done, 500))")
    browser.screenshot(tmp_path / "plain.png", "#viewer-box")
    plain = _read(tmp_path / "plain.png")
    assert plain.std() > 10  # the image
    assert _orange(tmp_path / "plain.png") < _orange(tmp_path / "viewer.png") / 4
    set_value(browser, "view-case", "1", "change")
    browser.wait("document.getElementById('view-title').textContent.startsWith('case_10')")


def _read(file):
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def _orange(file):
    """Pixels in the first label's colour, not the red of the crosshair."""
    red, green, blue = np.moveaxis(_read(file), -1, 0)
    return int(((red > blue + 40) & (green > blue + 20)).sum())


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_is_no_wider_than_the_window(browser, width):
    browser.resize(width, 800)
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_is_reached_by_keyboard(browser):
    assert (
        browser.run("[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).map((e) => e.id)")
        == []
    )
    assert browser.run("[...document.querySelectorAll('button')].filter((e) => !e.textContent.trim()).length") == 0
    seen = set()
    for _ in range(80):
        browser.key("Tab")
        seen.add(browser.run("document.activeElement.id"))
    assert {"filter-text", "view-slice", "view-sample", "show-prediction", "viewer-open"} <= seen


def test_it_prints_tables_and_pictures_without_controls(browser, tmp_path):
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        controls = "[...document.querySelectorAll('nav, input, select, button')]"
        assert browser.run(f"{controls}.every((e) => !e.checkVisibility() || e.closest('th'))")
        assert browser.run("document.querySelector('#panels canvas').checkVisibility()")
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(browser.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 9
