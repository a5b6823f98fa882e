"""The page in headless Chromium, where there is one: no error, no request, plots drawn, the filter works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright import sync_api as playwright

from pipeline.report.page import write_report
from tests.records import comparison, write_runs

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (e.g. apt-get install chromium)")

DRAWN = """() => Array.from(document.querySelectorAll("canvas"), canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 3; at < pixels.length; at += 4) if (pixels[at] > 0) return true;
  return false;
})"""
TOO_WIDE = """() => Array.from(document.querySelectorAll("body *"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, pre, .uplot"))
  .map(one => one.tagName + "." + one.className)"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page on a phone in the dark, with what it asked for and complained of."""
    root = tmp_path_factory.mktemp("checkpoints")
    file = write_report([write_runs(root, comparison())], root)
    with playwright.sync_playwright() as started:
        # A container's user is root, for whom Chromium has no sandbox.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=300_000)
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        page.set_default_timeout(300_000)
        page.said, page.asked, page.address = [], [], file.resolve().as_uri()
        # Warnings are left out: now and then Chromium has advice on speed for whoever reads a canvas, as DRAWN does.
        page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page.address)
        yield page
        browser.close()


def test_quiet_drawn_named_and_narrow(opened: Any) -> None:
    assert opened.evaluate(DRAWN) == [True] * (3 + 6)
    names = opened.evaluate('() => Array.from(document.querySelectorAll("canvas"), one => one.ariaLabel)')
    assert all(" at step " in name for name in names)
    assert opened.get_by_role("img", name="dpo: 9 of 12 pairs above 0").count() == 1
    assert opened.get_by_role("combobox", name="Show").count() == 1
    assert opened.evaluate(TOO_WIDE) == []
    assert opened.title() == "lights/dpo-001 - report"  # no script of the data ran
    assert opened.asked == [opened.address]
    assert opened.said == []


def test_the_filter(opened: Any) -> None:
    def shown() -> list[str]:
        return list(opened.locator("article.prompt:not([hidden]) h3").all_inner_texts())

    assert len(shown()) == 4
    opened.select_option("#filter-check", "check/polite")
    assert shown() == ["Prompt 1", "Prompt 3"]
    opened.select_option("#filter-version", "base")
    assert shown() == ["Prompt 3"]
    assert opened.locator("#filter-count").inner_text() == "1 of 4 prompts"
    opened.select_option("#filter-check", "*")
    assert shown() == ["Prompt 2", "Prompt 3"]
    opened.select_option("#filter-check", "")
    assert len(shown()) == 4


def test_values_under_the_pointer_and_other_themes(opened: Any) -> None:
    over = opened.locator("#dpo-reward-margin .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    opened.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    legend = opened.locator("#dpo-reward-margin .u-legend")
    playwright.expect(legend).to_contain_text("0.6", timeout=300_000)  # the last margin, at step 3
    opened.emulate_media(color_scheme="light")
    opened.emulate_media(media="print")
    assert opened.evaluate(DRAWN) == [True] * (3 + 6)
    assert opened.said == []
