"""Formulas as MathML, which browsers draw by themselves, with no script."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert


def on_page_content(html: str, **_: Any) -> str:
    """What arithmatex has marked on a page."""
    html = re.sub(r"\\\((.*?)\\\)(?=</span>)", _inline, html, flags=re.DOTALL)
    return re.sub(r"\\\[(.*?)\\\](?=</div>)", _block, html, flags=re.DOTALL)


def _inline(found: re.Match[str]) -> str:
    return _mathml(found[1], "inline")


def _block(found: re.Match[str]) -> str:
    return _mathml(found[1], "block")


def _mathml(formula: str, display: str) -> str:
    """A prime at its full size: as an exponent it could not be seen, and φ′ would be read as φ."""
    made = convert(unescape(formula), display=display)
    return re.sub(r"<msup>(<mi>[^<]*</mi>)<mi>(&#x02032;)</mi></msup>", r"\1<mo>\2</mo>", made)
