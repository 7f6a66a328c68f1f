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
    return str(convert(unescape(found[1])))


def _block(found: re.Match[str]) -> str:
    return str(convert(unescape(found[1]), display="block"))
