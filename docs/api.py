"""What the Python reference tells of each public name beside its docstring.

``docs/api.md`` lists the names; the docstrings come there when the site is built, by mkdocstrings
and ``docs/site/reference.py``. A test holds the list complete and runs the examples.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import initflow

EXAMPLES, PAGE = (Path(__file__).with_name(name) for name in ("examples.py", "api.md"))
NAMESPACES = ("initializers", "theory", "testing")


def public() -> dict[str, Any]:
    """All public names with what they are, each once; namespaces are not among them."""
    found: dict[str, Any] = {}
    for prefix, space in {
        "": initflow,
        **{f"{n}.": getattr(initflow, n) for n in NAMESPACES},
    }.items():
        for name in _names(space):
            value = getattr(space, name)
            if not any(value is other for other in found.values()):
                found[prefix + name] = value
    return {name: value for name, value in found.items() if not isinstance(value, ModuleType)}


def listed() -> list[str]:
    """All that the page tells, public names and results, without the package before them."""
    return re.findall(r"^::: initflow\.(\S+)$", PAGE.read_text(), re.MULTILINE)


def _names(space: ModuleType) -> list[str]:
    """A namespace's, or what is defined in a module that does not list its own."""
    own = (n for n, v in vars(space).items() if getattr(v, "__module__", "") == space.__name__)
    return list(getattr(space, "__all__", None) or (n for n in own if not n.startswith("_")))


def examples() -> dict[str, str]:
    """The code of each, by the name that it is of, with dots as ``_``."""
    source = EXAMPLES.read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            code = lines[node.body[0].lineno - 1 : node.end_lineno]
            found[node.name] = _outermost(textwrap.dedent("\n".join(code)))
    return found


def _outermost(code: str) -> str:
    """Code of a function as it is formatted outside of one: two blank lines around functions."""
    lines = code.splitlines()
    for node in reversed(ast.parse(code).body):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            lines.insert(node.end_lineno or first, "")
            lines.insert(first - 1, "")
    return "\n".join(lines) + "\n"


def signature(value: Any) -> inspect.Signature:
    """How it is called; settings that are a configuration's are one word."""
    whole = inspect.signature(value)
    if "config" not in whole.parameters:
        return whole
    own = [one for one in whole.parameters.values() if one.annotation is not one.empty]
    settings = inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)
    return whole.replace(parameters=[*own, settings])


def markdown(text: str) -> str:
    """A docstring's roles and literals as Markdown; a block of code has its place in an example."""
    text = re.sub(r"^::\n\n(?: +.*\n|\n)+", "", inspect.cleandoc(text), flags=re.MULTILINE)
    text = re.sub(r":\w+:`([^`]+)`", lambda found: _link(found[1]), text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _link(target: str) -> str:
    """To where it is told on the page, if it is."""
    name = target.removeprefix("initflow.")
    told = {full.rpartition(".")[2]: full for full in listed()}
    full = name if name in told.values() else told.get(name)
    return f"[`{name}`][initflow.{full}]" if full else f"`{target}`"
