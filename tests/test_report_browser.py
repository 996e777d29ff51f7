"""The page of a study in a real browser: that of a run on a scripted board, opened from disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page

from pytest_llem.reporting.html import write_report
from tests.support import reports
from tests.support.browser import BrowserUnavailableError, browser

#: A browser starts, and a run is made for it; without one, the page is tested in test_report.py.
pytestmark = pytest.mark.slow

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

#: Shown, and not run, wherever it stands.
EVIL = (
    "<script>window.hit=1</script><img src=x onerror=\"window.hit=1\"><a href='javascript:window.hit=1'>a</a>"
    "<b>b</b>&lt;i&gt;%{y}$x^2$</script></style></title><svg onload=window.hit=1>\u2028"
)

#: Of the page's ground, and of the text along a plot's axis.
COLORS = (
    "[['body', 'backgroundColor'], ['.xtick text', 'fill']]"
    ".map(([one, what]) => getComputedStyle(document.querySelector(one))[what])"
)

#: The letters of a text, whose lines plotly's hover breaks where it likes.
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


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Return what opens a page. At the end it must have asked for nothing, and told of no mistake."""
    said: list[str] = []
    contexts = []

    def open_page(file: Path, **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        own = (file.as_uri(), "blob:", "data:")
        page.on("request", lambda one: None if one.url.startswith(own) else said.append(f"request: {one.url}"))
        page.goto(own[0])
        page.wait_for_selector("html[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def page(real: Path, opened: Callable[..., Page]) -> Page:
    return opened(real.parents[1] / "page.html")


def _bars(page: Page, place: int = 0) -> list[float]:
    """Return how high the first axis of a figure goes."""
    found = page.evaluate(f"document.querySelectorAll('.canvas')[{place}]._fullLayout.yaxis.range")
    assert isinstance(found, list)
    return found


def _figure(page: Page, key: str) -> Locator:
    return page.locator(f"#figure-{key}")


def _text(place: Locator) -> str:
    """Return the text of the one element at a place."""
    found = place.text_content()
    assert found is not None
    return found


def _box(place: Locator) -> FloatRect:
    """Return where the one element at a place is shown."""
    found = place.bounding_box()
    assert found
    return found


def _hover(page: Page, key: str, mark: int = 0) -> str:
    """Return what is shown when a mark of a plot is pointed at."""
    figure = _figure(page, key)
    figure.scroll_into_view_if_needed()
    box = _box(figure.locator(".scatterlayer .point").nth(mark))
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] - 30)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = figure.locator(".hoverlayer .hovertext")
    label.first.wait_for()
    return " ".join(label.all_text_contents())


def test_the_plots_are_there(page: Page) -> None:
    for key, marks in (("pareto", ".point"), ("sweep", ".point"), ("cycles", ".point"), ("power", ".js-line")):
        assert _figure(page, key).locator(f".scatterlayer {marks}").count() > 0, key
    assert _figure(page, "latency").locator(".boxlayer path.box").count() == 4
    assert _figure(page, "power").locator(".shapelayer path").count() >= 3, "the window is marked"
    assert "J per output token (measured)" in _text(_figure(page, "pareto").locator(".ytitle"))
    for figure in page.locator("figure").all():
        named = figure.locator("[role=img]").get_attribute("aria-labelledby")
        assert len(page.locator(f"#{named}").inner_text()) > 40, "screen readers are told what it shows"


def test_pointing_at_a_mark_shows_its_point(page: Page) -> None:
    text = _hover(page, "pareto")
    assert re.search(r"#\d precision=(bf16|fp32)-size=\d", text), text
    assert "J per output token, measured" in text


def test_plotly_offers_to_save_an_image_and_to_send_nothing_anywhere(page: Page) -> None:
    figure = _figure(page, "pareto")
    figure.scroll_into_view_if_needed()
    figure.hover()
    buttons = figure.locator(".modebar-btn").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert buttons == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]
    with page.expect_download() as saved:
        figure.locator(".modebar-btn").first.click()
    assert saved.value.suggested_filename == "boards – pytest-llem pareto.png"


def test_a_choice_changes_the_plot(page: Page) -> None:
    before, note = _bars(page, 1), _text(_figure(page, "sweep").locator(".ytitle"))
    _figure(page, "sweep").locator("select").nth(1).select_option(label="Energy of a pass (J)")
    assert _text(_figure(page, "sweep").locator(".ytitle")) == "Energy of a pass (J), measured" != note
    assert _bars(page, 1) != before
    _figure(page, "cycles").locator("select").nth(1).select_option(label="as measured")
    assert "%" not in _text(_figure(page, "cycles").locator(".ytitle"))
    _figure(page, "power").locator("select").select_option(index=2)
    assert "cycle 1: " in _figure(page, "power").locator(".note").inner_text()


def _column(page: Page, number: int) -> list[str]:
    return page.locator(f"#point-table tbody tr:visible > :nth-child({number})").all_inner_texts()


def test_the_table_sorts_by_keyboard_with_what_there_is_not_at_the_end(page: Page) -> None:
    head = page.locator("#point-table thead th").nth(4)
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    found = _column(page, 5)
    speeds = [float(text.partition(" ")[0]) for text in found[:-1]]
    assert speeds == sorted(speeds)
    assert len(set(speeds)) > 1
    assert found[-1].startswith("–")
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    found = _column(page, 5)
    assert [float(text.partition(" ")[0]) for text in found[:-1]] == sorted(speeds, reverse=True)
    assert found[-1].startswith("–"), "no value is neither most nor least"


def test_the_table_is_filtered_and_says_how_far(page: Page) -> None:
    field = page.get_by_role("searchbox")
    field.fill("size=3")
    assert page.get_by_role("status").inner_text() == "2 of 5 points"
    assert all("size=3" in text for text in _column(page, 2))
    field.fill("size=3 fp32")
    assert page.get_by_role("status").inner_text() == "1 of 5 points"
    field.fill("size=")
    assert page.get_by_role("status").inner_text() == "4 of 5 points"
    field.fill("")
    assert page.get_by_role("status").inner_text() == "5 points"


def test_all_metrics_are_there_and_those_without_a_value_say_why(page: Page) -> None:
    shown = page.locator("#point-table thead th:visible").count()
    page.get_by_label("all metrics").check()
    assert page.locator("#point-table thead th:visible").count() > shown + 10
    missing = page.locator("#point-table tbody tr", has_text="fault=raise").locator("td.number").nth(2)
    assert missing.get_attribute("title") == "no value: no completed cycle"
    page.get_by_text("metrics without a value, and why").click()
    assert page.get_by_text("no llem_carbon_intensity").is_visible()


def test_dark_is_dark_and_follows(real: Path, opened: Callable[..., Page]) -> None:
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(real: Path, opened: Callable[..., Page], scheme: str) -> None:
    page = opened(real.parents[1] / "page.html", viewport=PHONE, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.querySelector('#points .scroll').scrollWidth") > PHONE["width"]
    for canvas in page.locator(".canvas").all():
        assert _box(canvas)["width"] > 300


def test_on_paper_it_is_light_and_nothing_is_folded(
    real: Path, opened: Callable[..., Page], tmp_path: Path
) -> None:
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


def test_it_has_landmarks_headings_and_captions(page: Page) -> None:
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "boards"
    assert page.get_by_role("heading", level=2).count() >= 9
    assert page.evaluate("[...document.querySelectorAll('table')].filter(one => !one.caption).length") == 0
    assert page.locator("section:not([aria-label], [aria-labelledby])").count() == 0
    for link in page.get_by_role("navigation").get_by_role("link").all():
        assert page.locator(link.get_attribute("href") or "missing").count() == 1


def test_gates_failures_and_the_study_are_told(page: Page) -> None:
    text = page.locator("main").inner_text()
    for said in (
        "the engine says no",
        "BEYOND",
        "NOT JUDGED",
        "nvml_total_energy",
        "gpu_board",
        "min_window_seconds: 0.5",
        "Sampled power, integrated ÷ the counter",
        "Processes are started by\tspawn",
    ):
        assert said in text
    assert "3 failed" not in text
    assert "2 failed" in page.locator(".cards").inner_text()


def test_what_anybody_wrote_is_shown_and_not_run(real: Path, opened: Callable[..., Page], tmp_path: Path) -> None:
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
        "#point-table tbody th",
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
        assert "<script>window.hit=1</script><imgsrc=x" in text, text
    for key in ("sweep", "power", "latency"):
        for select in _figure(page, key).locator("select").all():
            for option in range(select.locator("option").count()):
                select.select_option(index=option)
    _figure(page, "sweep").locator("select").first.select_option(label="precision")
    assert "<script>" in _text(_figure(page, "sweep").locator(".xtick text").first)
    assert page.evaluate("document.querySelectorAll('figure a[href], figure b, figure script').length") == 0
    assert page.evaluate("window.hit") is None


@pytest.mark.slow
def test_200_points_of_5_cycles_are_drawn(real: Path, opened: Callable[..., Page], tmp_path: Path) -> None:
    reports.grown(real, tmp_path / "grown", 200, 5)
    write_report(tmp_path / "grown", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 15_000_000
    page = opened(tmp_path / "page.html")
    assert page.locator("#point-table tbody tr").count() == 200
    assert _figure(page, "cycles").locator(".point").count() == 1000
    assert _figure(page, "latency").locator(".boxlayer path.box").count() == 200
    assert _figure(page, "power").locator("select option").count() == 200
