"""What the page carries of others is as published."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pipeline.report

UPLOT = Path(pipeline.report.__file__).parent / "assets" / "uplot"


def test_uplot_is_unchanged_and_its_licence_is_beside_it() -> None:
    readme = (UPLOT / "README.md").read_text(encoding="utf-8")
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        assert f"{hashlib.sha256((UPLOT / name).read_bytes()).hexdigest()}  {name}" in readme
    assert "MIT" in (UPLOT / "LICENSE").read_text(encoding="utf-8")
