"""The report in a real browser."""

import base64
import json
import math
import re
import shutil

import numpy as np
import pytest

from nnunet_multimodal.cli import main
from tests.browser import CHROMIUM, Browser
from tests.unit.report.study import CASES, LABEL, RATERS, SHAPE, SPACING_MM, make_flat, make_study, rated

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium found; install it to test the report in a browser")
EVIL = "evil  \"'<img src=x onerror=window.hacked=1>"  # two spaces, which HTML makes one


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of the small study with raters, with one case whose name is markup."""
    root = make_study(tmp_path_factory.mktemp("study"), (*CASES[:2], EVIL), raters=True)
    assert main(["report", str(root / "results"), "-i", str(root / "images"), "-o", str(root / "r.html")]) == 0
    return root / "r.html"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def clean(shared):
    """At the end nothing may have gone wrong, and nothing may have been asked of a network."""
    shared.problems.clear()
    shared.requests.clear()
    shared.resize(1200, 900)
    yield shared
    assert shared.run("window.hacked") is None
    assert not shared.problems
    assert not [url for url in shared.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture
def browser(clean, page):
    """The page, just opened."""
    clean.open(page)
    return clean


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


def text(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def is_visible(browser, name):
    return browser.run(f"document.getElementById('{name}').checkVisibility()")


def settle(browser, milliseconds=100):
    """Wait until the page has drawn."""
    browser.run(f"new Promise((done) => setTimeout(done, {milliseconds}))")


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
    for name in ("legend", "volume-chart", "agreement-table"):
        assert LABEL in text(browser, name)
    browser.run("document.querySelector('tr[data-case=case_10] button').click()")
    browser.wait("document.getElementById('view-title').textContent.startsWith('case_10')")
    browser.run("document.querySelector('tr[data-case^=evil] button').click()")
    browser.wait(f"document.getElementById('view-title').textContent.startsWith({json.dumps(EVIL)})")
    for name, value in (("filter-run", "predictions"), ("filter-label", LABEL)):
        set_value(browser, name, value)
        assert len(column(browser, 0)) == 3


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
    absent = browser.run("document.querySelectorAll('#case-table thead th').length") - 1
    for _ in range(2):  # empty cells come last, whichever way
        browser.run(f"document.querySelectorAll('#case-table thead th')[{absent}].querySelector('button').click()")
        assert column(browser, absent) == ["PET", "", ""]


def test_filtering(browser):
    set_value(browser, "filter-text", "CASE_1")
    assert column(browser, 0) == ["case_1", "case_10"]
    assert browser.run("document.getElementById('case-count').textContent") == "2 of 3 rows"
    values = sorted(map(float, column(browser, 3)))
    set_value(browser, "filter-dice", str((values[0] + values[1]) / 2))
    assert [float(value) for value in column(browser, 3)] == values[:1]
    set_value(browser, "filter-dice", "")
    for order in (values, values[::-1]):  # what is filtered is sorted, and what is sorted stays filtered
        browser.run("document.querySelectorAll('#case-table thead th')[3].querySelector('button').click()")
        assert [float(value) for value in column(browser, 3)] == order
    set_value(browser, "filter-text", "nobody")
    assert column(browser, 0) == []
    assert text(browser, "case-count") == "0 of 3 rows"
    browser.run("document.querySelector('#case-filter button[type=reset]').click()")
    browser.wait("document.getElementById('case-count').textContent === '3 of 3 rows'")
    assert len(column(browser, 0)) == 3


def test_sliders_and_overlays(browser):
    assert browser.run("document.querySelectorAll('#panels canvas').length") == 2
    assert browser.run("document.getElementById('slice-text').textContent") == "2 of 6"  # the first of the box's
    set_value(browser, "view-rater", "none", "change")
    settle(browser)
    _, labelled = pixels(browser)
    assert labelled > 1000
    for name in ("show-prediction", "show-reference"):
        browser.run(f"document.getElementById('{name}').click()")
        settle(browser)
        _, fewer = pixels(browser)
        assert fewer < labelled
        labelled = fewer
    assert labelled == 0
    grey, _ = pixels(browser)
    browser.run("document.getElementById('view-slice').focus()")
    browser.key("ArrowRight")
    browser.wait("document.getElementById('slice-text').textContent === '3 of 6'")
    assert browser.run("document.getElementById('view-slice').getAttribute('aria-valuetext')") == "3 of 6"
    assert pixels(browser)[0] != grey
    set_value(browser, "view-sample", "3")
    browser.wait("document.getElementById('sample-text').textContent === '3 of 3'")
    assert browser.run("document.getElementById('show-samples').checked")
    assert pixels(browser)[1] > 0
    before = pixels(browser)
    set_value(browser, "view-map", "entropy", "change")
    browser.wait("document.getElementById('legend').textContent.includes('entropy: 0 to 0.700')")
    assert pixels(browser) != before
    for plane, end in (("1", "of 10"), ("2", "of 12"), ("0", "of 6")):
        set_value(browser, "view-plane", plane, "change")
        browser.wait(f"document.getElementById('slice-text').textContent.endsWith('{end}')")


def test_a_row_opens_its_case(browser):
    browser.run("document.querySelector('tr[data-case=case_10] button.show').click()")
    browser.wait("document.getElementById('view-title').textContent === 'case_10, predictions'")
    assert browser.run("document.querySelector('tr.chosen').dataset.case") == "case_10"
    assert browser.run("document.querySelectorAll('tr[aria-current=true]').length") == 1
    row = "[...document.querySelectorAll('#contribution-table tbody tr > *')].map((e) => e.textContent)"
    assert browser.run(row) == ["1", LABEL, "–", "–", "0.500", "–", "–"]
    set_value(browser, "view-case", "0", "change")
    browser.wait("document.getElementById('contribution-table').textContent.includes('0.750')")


def test_a_name_opens_its_case_by_keyboard(browser):
    browser.run("document.querySelector('tr[data-case=case_10] button.show').focus()")
    browser.key("Enter")
    browser.wait("document.activeElement.id === 'view-slice'")
    assert text(browser, "view-title") == "case_10, predictions"
    for _ in range(8):  # no further than the last slice
        browser.key("ArrowRight")
    browser.wait("document.getElementById('slice-text').textContent === '6 of 6'")


def test_raters_are_drawn(browser):
    for name in ("show-prediction", "show-reference"):
        browser.run(f"document.getElementById('{name}').click()")
    assert browser.run("[...document.getElementById('view-rater').options].map((e) => e.text)") == [
        "all",
        *RATERS,
        "none",
    ]
    drawn = {}
    for value in ("none", "rater A", f"rater {RATERS[1]}", "all"):
        set_value(browser, "view-rater", value, "change")
        settle(browser)
        drawn[value] = pixels(browser)[1]
        names = {"none": "", "all": ", ".join(RATERS)}.get(value, value.removeprefix("rater "))
        assert text(browser, "legend") == LABEL + (f"raters {names}" if names else "")
    assert drawn["none"] == 0 < min(drawn["rater A"], drawn[f"rater {RATERS[1]}"])
    assert max(drawn["rater A"], drawn[f"rater {RATERS[1]}"]) < drawn["all"]
    numbers = text(browser, "volume-chart")
    assert f"raters {', '.join(RATERS)}" in numbers
    ml = [rated(rater).sum() * math.prod(SPACING_MM) / 1000 for rater in RATERS]
    assert ", ".join(f"{value:.1f}" for value in ml) in numbers
    assert browser.run("document.querySelectorAll('#volume-chart circle').length") == 1 + len(RATERS)
    assert "raters' own" in text(browser, "agreement-table")
    raters = (
        "[...document.querySelectorAll('#agreement-table table:last-of-type tr')].map((e) => e.cells[1].textContent)"
    )
    assert browser.run(raters)[-len(RATERS) :] == list(RATERS)
    assert "rater A" in browser.run("[...document.getElementById('viewer-overlay').options].map((e) => e.value)")


def test_lines_have_no_gaps_along_slopes(browser):
    for name in ("show-prediction", "show-reference"):
        browser.run(f"document.getElementById('{name}').click()")
    set_value(browser, "view-rater", f"rater {RATERS[1]}", "change")
    settle(browser)
    x, y = 9.5 / SHAPE[2], 0.5 / SHAPE[1]  # where the slope begins; it goes left and down, a voxel each
    orange = browser.run(
        "(() => { const c = document.querySelector('#panels canvas'), { width, height } = c;"
        " const { data } = c.getContext('2d').getImageData(0, 0, width, height), found = [];"
        " for (let i = 0; i < data.length; i += 4) if (data[i] > data[i + 2] + 40)"
        " found.push([(i / 4) % width / width, Math.floor(i / 4 / width) / height]); return found })()"
    )
    for voxel in range(1, 9):
        near = np.abs(np.array(orange) - (x - voxel / SHAPE[2], y + voxel / SHAPE[1])).max(1)
        assert near.min() < 0.06


def test_what_was_chosen_stays_as_far_as_it_can(browser):
    set_value(browser, "viewer-overlay", "none", "change")
    set_value(browser, "view-rater", "rater A", "change")
    set_value(browser, "view-case", "1", "change")
    browser.run("document.getElementById('view-largest').click()")  # while the case is still being read
    browser.run("document.getElementById('viewer-open').click()")
    browser.wait("document.getElementById('view-title').textContent.startsWith('case_10')")
    assert browser.run("document.getElementById('viewer-overlay').value") == "none"
    assert browser.run("document.getElementById('view-rater').value") == "rater A"


def test_what_the_browser_kept_over_a_reload_counts(clean, page):
    kept = {"filter-text": "case_10", "view-case": "1"}  # set once the controls are there, before the script runs
    source = (
        f"new MutationObserver((_, own) => {{ if (!document.getElementById('view-contrast')) return; own.disconnect();"
        f" for (const [id, value] of Object.entries({json.dumps(kept)})) document.getElementById(id).value = value;"
        " }).observe(document, { childList: true, subtree: true })"
    )
    script = clean.send("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    clean.open(page)
    clean.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    assert clean.run("document.getElementById('view-case').value") == "1"
    assert text(clean, "view-title") == "case_10, predictions"
    assert column(clean, 0) == ["case_10"]


def test_a_flat_case_without_anything_else(clean, tmp_path):
    make_flat(tmp_path)
    shutil.rmtree(tmp_path / "p" / "samples")
    assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
    clean.open(tmp_path / "r.html")
    for name in (
        "view-plane",
        "view-slice",
        "view-largest",
        "view-sample",
        "show-reference",
        "view-rater",
        "view-label",
    ):
        assert not is_visible(clean, name)
    assert text(clean, "legend") == f"{LABEL}prediction"
    assert pixels(clean)[1] > 1000
    clean.run("document.querySelector('button.show').click()")
    clean.wait("document.activeElement.id === 'view-case'")
    assert "Volumes in voxels" in text(clean, "volume-chart")
    why = "[...document.querySelectorAll('#volume-chart td span')].map((e) => [e.textContent, e.title])"
    assert clean.run(why) == [["–", "An interval takes at least two samples."]]
    assert "No measures of samples or raters" in text(clean, "agreement-table")


def test_an_evaluation_alone_has_no_pictures(clean, tmp_path):
    rows = [{"case": name, "metrics": {"1": {"Dice": dice}}, "prediction_file": "p/a", "reference_file": "r/a"}
            for name, dice in (("b", 0.5), ("a", None))]  # fmt: skip
    content = {"metric_per_case": rows, "mean": {"1": {"Dice": 0.5}}, "foreground_mean": {"Dice": 0.5}}
    (tmp_path / "e.json").write_text(json.dumps(content))
    assert main(["report", str(tmp_path / "e.json"), "-o", str(tmp_path / "r.html")]) == 0
    clean.open(tmp_path / "r.html")
    clean.run("document.querySelectorAll('#case-table thead button')[3].click()")
    assert column(clean, 3) == ["0.500", "–"]
    assert clean.run("document.querySelectorAll('button.show, canvas').length") == 0


def test_viewer_shows_the_volume(browser, tmp_path):
    browser.resize(500, 500)  # its WebGL is computed by the processor
    for _ in range(2):  # and still one viewer
        browser.run("document.getElementById('viewer-open').click()")
    browser.wait("!/Opening|shows the case/.test(document.getElementById('viewer-state').textContent)")
    assert browser.run("document.getElementById('viewer-state').textContent").startswith("Click or drag")
    assert browser.run("document.querySelectorAll('head script').length") == 1
    settle(browser, 500)
    browser.screenshot(tmp_path / "viewer.png", "#viewer-box")
    assert _orange(tmp_path / "viewer.png") > 100
    browser.run("document.getElementById('viewer').focus()")
    for key in ("ArrowLeft", "ArrowLeft", "PageUp", "ArrowUp"):
        browser.key(key)
    settle(browser, 500)
    browser.screenshot(tmp_path / "moved.png", "#viewer-box")
    assert (_read(tmp_path / "moved.png") != _read(tmp_path / "viewer.png")).any()
    set_value(browser, "viewer-overlay", "none", "change")
    settle(browser, 500)
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


@pytest.mark.parametrize("width", [1300, 800, 390])
def test_the_page_is_no_wider_than_the_window(browser, width):
    browser.resize(width, 800)
    settle(browser)
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = browser.run(
        "[...document.querySelectorAll('table')].map((e) => [e, e.parentElement])"
        ".filter(([e, box]) => e.scrollWidth > box.clientWidth).map(([e, box]) => { box.scrollLeft = box.scrollWidth;"
        " const [first, left] = [e.querySelector('tbody th'), box].map((own) => own.getBoundingClientRect().left);"
        " return [box.tabIndex, box.scrollLeft > 0, first === left] })"
    )
    assert wide == [[0, True, True]] * len(wide)  # they scroll in their own box, but for the first column
    assert wide or width > 800


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
        browser.resize(700, 900)  # A4 without its margins
        settle(browser)
        tables = "[...document.querySelectorAll('table')]"
        assert browser.run(f"{tables}.filter((e) => e.getBoundingClientRect().right > innerWidth).length") == 0
    finally:
        browser.resize(1200, 900)
        browser.send("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(browser.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 9
