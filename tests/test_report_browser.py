"""Test the HTML report in a real browser, opened from disk, for a run on a scripted GPU."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page

from pytest_llem.reporting.html import write_report
from tests.support import reports
from tests.support.browser import BrowserUnavailableError, browser
from tests.support.study_results import point, study_result

#: Slow: a browser and a run start. test_report.py tests the report without a browser.
pytestmark = pytest.mark.slow

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

#: Must be shown literally wherever it occurs, and never run.
EVIL = (
    "<script>window.hit=1</script><img src=x onerror=\"window.hit=1\"><a href='javascript:window.hit=1'>a</a>"
    "<b>b</b>&lt;i&gt;%{y}$x^2$</script></style></title><svg onload=window.hit=1>\u2028"
)

#: Reads the colours of the page's background and of a plot's axis text.
COLORS = (
    "[['body', 'backgroundColor'], ['.xtick text', 'fill']]"
    ".map(([one, what]) => getComputedStyle(document.querySelector(one))[what])"
)

#: Returns the lines of an element's text as they are shown.
_LINES = """one => {
  const lines = new Map();
  const walker = document.createTreeWalker(one, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    for (let n = 0; n < walker.currentNode.length; n++) {
      const range = document.createRange();
      range.setStart(walker.currentNode, n);
      range.setEnd(walker.currentNode, n + 1);
      const top = Math.round(range.getBoundingClientRect().top);
      lines.set(top, (lines.get(top) ?? "") + range);
    }
  }
  return [...lines.values()];
}"""

#: Removed before texts are compared, because plotly wraps the lines of hover texts.
_SPACE = re.compile(r"\s+")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser."""
    try:
        with browser() as found:
            yield found
    except BrowserUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no browser: {error}")


@pytest.fixture(scope="module")
def real(chromium: Browser, nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results directory of a real run, with its page beside it as ``page.html``."""
    folder = tmp_path_factory.mktemp("run")
    directory = reports.run(folder, nvml_library, "--llem-html", "page.html")
    assert (folder / "page.html").is_file()
    return directory


@contextmanager
def _opening(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Yield a function that opens a page, and check at the end that no page made a request or logged an error."""
    events: list[str] = []
    contexts = []

    def open_page(file: Path, **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error: {error}"))
        page.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
        own = (file.as_uri(), "blob:", "data:")
        page.on("request", lambda one: None if one.url.startswith(own) else events.append(f"request: {one.url}"))
        page.goto(own[0])
        page.wait_for_selector("html[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert events == []


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Page]]:
    with _opening(chromium) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def unchanged(real: Path, chromium: Browser) -> Iterator[Page]:
    """The page of the run, for tests that leave it as it is: it takes seconds to open."""
    with _opening(chromium) as open_page:
        yield open_page(real.parents[1] / "page.html")


@pytest.fixture
def page(real: Path, opened: Callable[..., Page]) -> Page:
    """The page of the run, for a test that changes it."""
    return opened(real.parents[1] / "page.html")


def _y_range(page: Page, place: int = 0) -> list[float]:
    """Return the range of a figure's y axis."""
    found = page.evaluate(f"document.querySelectorAll('.canvas')[{place}]._fullLayout.yaxis.range")
    assert isinstance(found, list)
    return found


def _figure(page: Page, key: str) -> Locator:
    return page.locator(f"#figure-{key}")


def _text(place: Locator) -> str:
    """Return the text of the element at *place*."""
    found = place.text_content()
    assert found is not None
    return found


def _box(place: Locator) -> FloatRect:
    """Return the bounding box of the element at *place*."""
    found = place.bounding_box()
    assert found
    return found


def _hover(page: Page, key: str, mark: int = 0) -> str:
    """Return the text shown when the pointer is over a mark of a plot."""
    figure = _figure(page, key)
    figure.scroll_into_view_if_needed()
    box = _box(figure.locator(".scatterlayer .point").nth(mark))
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] - 30)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = figure.locator(".hoverlayer .hovertext")
    label.first.wait_for()
    return " ".join(label.all_text_contents())


def test_all_plots_are_drawn(unchanged: Page) -> None:
    page = unchanged
    for key, marks in (("pareto", ".point"), ("sweep", ".point"), ("cycles", ".point"), ("power", ".js-line")):
        assert _figure(page, key).locator(f".scatterlayer {marks}").count() > 0, key
    assert _figure(page, "latency").locator(".boxlayer path.box").count() == 4
    assert _figure(page, "power").locator(".shapelayer path").count() >= 3, "the window is marked"
    assert "J per output token (measured)" in _text(_figure(page, "pareto").locator(".ytitle"))
    for figure in page.locator("figure").all():
        named = figure.locator("[role=img]").get_attribute("aria-labelledby")
        assert len(page.locator(f"#{named}").inner_text()) > 40, "screen readers need a description"


def test_hovering_over_a_mark_shows_its_point(unchanged: Page) -> None:
    page = unchanged
    text = _hover(page, "pareto")
    assert re.search(r"#\d precision=(bf16|fp32), size=\d", text), text
    assert "J per output token, measured" in text


def test_each_plot_is_saved_as_svg_and_png_and_nothing_is_uploaded(
    real: Path, opened: Callable[..., Page]
) -> None:
    page = opened(real.parents[1] / "page.html", color_scheme="dark")
    for figure in page.locator("figure").all():
        buttons = figure.locator(".modebar-btn").evaluate_all("all => all.map(one => one.ariaLabel)")
        assert buttons == ["Zoom", "Pan", "Reset axes"]
        assert figure.get_by_role("button", name="Save this plot as").count() == 2
    figure = _figure(page, "sweep")
    figure.locator("select").nth(1).select_option(label="Energy of a pass (J)")
    with page.expect_download() as saved:
        figure.get_by_role("button", name="SVG").click()
    assert saved.value.suggested_filename == "boards_sweep_precision_Energy-of-a-pass.svg"
    image = saved.value.path().read_text()
    assert image.startswith("<svg")
    assert "fill: rgb(255, 255, 255)" in image, "light on dark pages too"
    assert "Energy of a pass (J), measured" in image
    with page.expect_download() as saved:
        figure.get_by_role("button", name="PNG").click()
    assert saved.value.suggested_filename == "boards_sweep_precision_Energy-of-a-pass.png"
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")
    assert _brightness(page.evaluate(COLORS)[1]) > 180, "the page is still dark"


def test_marks_are_coloured_and_split_into_panels_by_axis(page: Page) -> None:
    figure = _figure(page, "cycles")
    marks = figure.locator(".point").count()
    figure.get_by_label("colour").select_option(label="precision")
    assert figure.locator(".legendtext").all_text_contents() == ["bf16", "fp32"]
    figure.get_by_label("panels").select_option(label="size")
    titles = figure.locator(".annotation-text").all_text_contents()
    assert titles == ["size = 1", "size = 3"]
    assert figure.locator(".subplot").count() == 2
    assert figure.locator(".point").count() == marks
    assert figure.locator(".shapelayer path").count() == 2, "the line at 0 % is in both"
    assert figure.locator(".legendtext").all_text_contents() == ["bf16", "fp32"]
    _figure(page, "sweep").get_by_label("panels").select_option(label="precision")
    assert _figure(page, "sweep").locator(".subplot").count() == 1, "the axis that lines run along has no panels"


def test_labels_of_marks_do_not_overlap(opened: Callable[..., Page], tmp_path: Path) -> None:
    # Many are near each other: some have no place for a label.
    points = [
        point(
            {"batch_size": n},
            output_tokens_per_second=[10 + n // 3 / 40],
            energy_per_output_token_j=[5 - n % 3 / 90],
        )
        for n in range(14)
    ]
    points.append(point({"batch_size": 99}, output_tokens_per_second=[40.0], energy_per_output_token_j=[1.0]))
    write_report(tmp_path, tmp_path / "page.html", study_result(*points))
    for viewport in (DESKTOP, PHONE):
        page = opened(tmp_path / "page.html", viewport=viewport)
        labels = [one for one in _figure(page, "pareto").locator(".textpoint text").all() if _text(one).strip()]
        boxes = [_box(one) for one in labels]
        assert 3 <= len(boxes) < 15
        assert "99" in map(_text, labels)
        for one, other in itertools.combinations(boxes, 2):
            assert (
                one["x"] + one["width"] <= other["x"] + 1
                or other["x"] + other["width"] <= one["x"] + 1
                or one["y"] + 11 <= other["y"] + 1
                or other["y"] + 11 <= one["y"] + 1
            ), (one, other)


def test_select_boxes_change_the_plot(page: Page) -> None:
    before, note = _y_range(page, 1), _text(_figure(page, "sweep").locator(".ytitle"))
    _figure(page, "sweep").locator("select").nth(1).select_option(label="Energy of a pass (J)")
    assert _text(_figure(page, "sweep").locator(".ytitle")) == "Energy of a pass (J), measured" != note
    assert _y_range(page, 1) != before
    _figure(page, "cycles").locator("select").nth(1).select_option(label="as measured")
    assert "%" not in _text(_figure(page, "cycles").locator(".ytitle"))
    _figure(page, "power").locator("select").select_option(index=2)
    assert "cycle 1: " in _figure(page, "power").locator(".note").inner_text()


def _heading(page: Page, name: str) -> tuple[Locator, int]:
    """Return the heading of a column of the table of points, and the column's number from 1."""
    names = page.locator("#point-table thead th").all_text_contents()
    place = next(place for place, text in enumerate(names) if text.startswith(name))
    return page.locator("#point-table thead th").nth(place), place + 1


def _column(page: Page, number: int) -> list[str]:
    return page.locator(f"#point-table tbody tr:visible > :nth-child({number})").all_inner_texts()


def test_table_sorts_by_keyboard_with_missing_values_last(page: Page) -> None:
    head, number = _heading(page, "Output tokens per second")
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    found = _column(page, number)
    speeds = [float(text.partition(" ")[0]) for text in found[:-1]]
    assert speeds == sorted(speeds)
    assert len(set(speeds)) > 1
    assert found[-1].startswith("–")
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    found = _column(page, number)
    assert [float(text.partition(" ")[0]) for text in found[:-1]] == sorted(speeds, reverse=True)
    assert found[-1].startswith("–"), "a missing value is last in both directions"


def test_table_filter_shows_number_of_matching_points(page: Page) -> None:
    field = page.get_by_role("searchbox")
    field.fill("size=3")
    assert page.get_by_role("status").inner_text() == "2 of 5 points"
    assert _column(page, _heading(page, "size")[1]) == ["3", "3"]
    field.fill("size=3 fp32")
    assert page.get_by_role("status").inner_text() == "1 of 5 points"
    field.fill("size=")
    assert page.get_by_role("status").inner_text() == "4 of 5 points"
    field.fill("")
    assert page.get_by_role("status").inner_text() == "5 points"


def test_every_row_is_on_the_page_and_the_heading_stays_visible(
    opened: Callable[..., Page], tmp_path: Path
) -> None:
    long = "/models/organisation/Meta-Llama-3.1-8B-Instruct-quantized.w4a16-finetuned"
    grid = itertools.product((f"{long}-1", f"{long}-2"), range(40))
    points = [
        point({"model": model, "batch_size": n, "precision": "bf16"}, output_tokens_per_second=[n + 1.0] * 3)
        for model, n in grid
    ]
    write_report(tmp_path, tmp_path / "page.html", study_result(*points))
    page = opened(tmp_path / "page.html")
    assert [_heading(page, name)[1] for name in ("#", "model", "batch_size", "n")] == [1, 2, 3, 4]
    assert "precision" not in page.locator("#point-table thead").inner_text(), "an axis of one value has no column"
    box = page.locator("#points .scroll")
    assert box.evaluate("one => one.scrollHeight - one.clientHeight") == 0
    broken = page.locator("#point-table td.axis").first.evaluate(_LINES)
    assert len(broken) > 1, "the cell has several lines"
    assert all(line[-1] in "/-_." for line in broken[:-1]), broken
    page.get_by_label("all columns").check()
    page.locator("#point-table tbody tr").nth(60).scroll_into_view_if_needed()
    page.locator("#point-table thead[style*=translateY]").wait_for()
    navigation = _box(page.get_by_role("navigation"))
    below = _box(_heading(page, "model")[0])["y"] - navigation["y"] - navigation["height"]
    assert abs(below) < 3


def test_all_metrics_are_shown_and_missing_values_have_reasons(page: Page) -> None:
    shown = page.locator("#point-table thead th:visible").count()
    page.get_by_label("all columns").check()
    assert page.locator("#point-table thead th:visible").count() > shown + 10
    missing = page.locator("#point-table tbody tr", has_text="fault=raise").locator("td[data-sort='']").first
    assert missing.get_attribute("title") == "no value: no completed cycle"
    page.get_by_text("metrics without a value, and why").click()
    assert page.get_by_text("no llem_carbon_intensity").is_visible()


def test_page_and_plots_follow_dark_mode(real: Path, opened: Callable[..., Page]) -> None:
    page = opened(real.parents[1] / "page.html", color_scheme="dark")
    back, ink = page.evaluate(COLORS)
    assert _brightness(back) < 40
    assert _brightness(ink) > 180, "plots too"
    page.emulate_media(color_scheme="light")
    page.locator(".xtick text[style*='rgb(26, 31, 38)']").first.wait_for(state="attached")
    back, ink = page.evaluate(COLORS)
    assert _brightness(back) > 200
    assert _brightness(ink) < 100


def _brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_phone_needs_no_horizontal_scrolling(real: Path, opened: Callable[..., Page]) -> None:
    page = opened(real.parents[1] / "page.html", viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.querySelector('#points .scroll').scrollWidth") > PHONE["width"]
    for canvas in page.locator(".canvas").all():
        assert _box(canvas)["width"] > 300


def test_print_is_light_and_unfolded(real: Path, opened: Callable[..., Page], tmp_path: Path) -> None:
    page = opened(real.parents[1] / "page.html", color_scheme="dark")
    unfolded = "!document.querySelector('details:not([open], .data)')"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.seen = [{unfolded}, ...{COLORS}] }})")
    paper = page.pdf(path=tmp_path / "page.pdf")
    unfolded, back, ink = page.evaluate("window.seen")
    assert len(paper) > 10_000
    assert unfolded
    assert _brightness(back) > 200
    assert _brightness(ink) < 100
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0, "as before"


def test_page_has_landmarks_headings_and_captions(unchanged: Page) -> None:
    page = unchanged
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "boards"
    assert page.get_by_role("heading", level=2).count() >= 9
    assert page.evaluate("[...document.querySelectorAll('table')].filter(one => !one.caption).length") == 0
    assert page.locator("section:not([aria-label], [aria-labelledby])").count() == 0
    for link in page.get_by_role("navigation").get_by_role("link").all():
        assert page.locator(link.get_attribute("href") or "missing").count() == 1


def test_gates_failures_and_study_are_shown(unchanged: Page) -> None:
    page = unchanged
    text = page.locator("main").inner_text()
    for expected in (
        "the engine says no",
        "BEYOND",
        "NOT JUDGED",
        "nvml_total_energy",
        "gpu_board",
        "min_window_seconds: 0.5",
        "Integrated sampled power ÷ energy counter",
        "Start method of experiment processes\tforkserver",
    ):
        assert expected in text
    assert "3 failed" not in text
    assert "2 failed" in page.locator(".cards").inner_text()


def test_markup_in_results_is_shown_and_not_run(real: Path, opened: Callable[..., Page], tmp_path: Path) -> None:
    directory = reports.infected(real, tmp_path / "infected", EVIL)
    write_report(directory, tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("[...document.scripts].map(one => one.type)") == ["application/json", "", ""]
    assert page.evaluate("document.querySelectorAll('main a, figure b, main svg[onload]').length") == 0
    shown = EVIL.replace("\u2028", "")
    literally = _SPACE.sub("", shown)
    for place in (
        "h1",
        ".lead",
        ".warnings",
        "#point-table tbody td",
        "#failures .message",
        "#failures",
        "#gates td.wide",
        "#gates h3",
        "#provenance td",
        "#environment",
        "#study pre",
    ):
        texts = [_SPACE.sub("", text) for text in page.locator(place).all_text_contents()]
        assert any(literally in text for text in texts), place
    for key in ("pareto", "cycles"):
        text = _SPACE.sub("", _hover(page, key))
        assert re.search(r"precision=(bf16|fp32)<script…ndow.hit=1>", text), text
    for key in ("sweep", "power", "latency"):
        for select in _figure(page, key).locator("select").all():
            for option in range(select.locator("option").count()):
                select.select_option(index=option)
    _figure(page, "sweep").locator("select").first.select_option(label="precision")
    assert _text(_figure(page, "sweep").locator(".xtick text").first).startswith("bf16<script")
    assert page.evaluate("document.querySelectorAll('figure a[href], figure b, figure script').length") == 0
    assert page.evaluate("window.hit") is None


def test_200_points_of_5_cycles_are_drawn(real: Path, opened: Callable[..., Page], tmp_path: Path) -> None:
    reports.grown(real, tmp_path / "grown", 200, 5)
    write_report(tmp_path / "grown", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 15_000_000
    page = opened(tmp_path / "page.html")
    assert page.locator("#point-table tbody tr").count() == 200
    assert _figure(page, "cycles").locator(".point").count() == 1000
    assert _figure(page, "latency").locator(".boxlayer path.box").count() == 200
    assert _figure(page, "power").locator("select option").count() == 200
