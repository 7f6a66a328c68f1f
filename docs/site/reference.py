"""What mkdocstrings, which only reads the code, is told of the public names by running it."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from docs import api
from initflow.core.settings import Settings

EXAMPLES = api.examples()
PUBLIC = {
    f"{value.__module__}.{value.__qualname__}": (name, value)
    for name, value in api.public().items()
    if hasattr(value, "__qualname__")
}


class Reference(griffe.Extension):
    """Docstrings as Markdown, each with its example, and signatures as they are at run time."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if not obj.docstring:
            return
        obj.docstring.value = api.markdown(obj.docstring.value)
        name, value = PUBLIC.get(obj.path, ("", None))
        if name:
            _sign(obj, value)
            code = EXAMPLES.get(name.replace(".", "_"))
            obj.docstring.value += f"\n\n```python\n{code}```" if code else ""


def _sign(obj: griffe.Object, value: Any) -> None:
    """A class is called as its ``__init__`` is, also one that is made for it.

    Of settings the signature is all: their methods are not for users, but those of all of them.
    """
    if isinstance(value, type) and issubclass(value, Exception):
        return
    parameters = griffe.Parameters(*map(_parameter, api.signature(value).parameters.values()))
    if isinstance(obj, griffe.Function):
        obj.parameters = parameters
    else:
        if issubclass(value, Settings):
            obj.members.clear()
        obj.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _parameter(one: inspect.Parameter) -> griffe.Parameter:
    default = repr(one.default).replace("'", '"')
    return griffe.Parameter(
        one.name,
        kind=griffe.ParameterKind(one.kind.description),
        annotation=None if one.annotation is one.empty else str(one.annotation),
        default=None if one.default is one.empty else "..." if "<" in default else default,
    )
