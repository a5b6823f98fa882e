"""Takes the picture of a report that the README shows: `python scripts/picture.py REPORT.html docs/report.png`.

Needs Chromium on the path, which `pip` does not install.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=300_000)
        page = browser.new_page(viewport={"width": 1100, "height": 1000}, color_scheme="light")
        page.goto(arguments.report.resolve().as_uri())
        page.screenshot(path=arguments.picture, timeout=300_000)
        browser.close()


if __name__ == "__main__":
    main()
