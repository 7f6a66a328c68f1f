"""A new plugin's first files: a whole distribution, with a small initializer that works."""

from __future__ import annotations

import builtins
import keyword
import re
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from initflow.core.configurations import SCHEME_NAMES
from initflow.errors import SettingError
from initflow.initializers.finder import found

# A scheme's name that can also end a distribution's.
NAME = re.compile(r"[A-Za-z]([\w.-]*[A-Za-z0-9])?", re.ASCII)
USED = {"initflow", "torch", "Tensor", "variance", *dir(builtins)}  # by the module itself

# What the template's files become, in the plugin's folder.
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "module.py": "src/$module.py",
    "test.py": "tests/test_$function.py",
}


def new(name: str, folder: Path) -> Path:
    """Write the plugin ``initflow-NAME`` into ``folder``, and return where it is.

    It offers a scheme ``name`` by the function of the same name, with ``_`` for ``-`` and
    ``.``, and is written as a whole or not at all. Raises :class:`SettingError` for a name
    that cannot be a scheme's and a function's or is taken, for a folder that exists already, and
    for one that cannot be written.
    """
    module = f"initflow_{_function(name)}"
    target = folder / f"initflow-{name}"
    try:
        if target.exists():
            raise SettingError(f"'{target}' exists already")
        for other in folder.glob(f"*/src/{module}.py"):
            raise SettingError(f"'{name}' would have the module of '{other.parent.parent}'")
        offered = found(folder if folder.is_dir() else None).get(name)
        if offered:
            raise SettingError(f"'{name}' is offered already, by {offered.origin}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as beside:
            whole = Path(beside) / target.name
            write(name, whole)
            whole.rename(target)
    except OSError as error:
        raise SettingError(f"'{target}' cannot be written: {error.strerror}") from error
    return target


def write(name: str, home: Path) -> None:
    """Write the plugin's files into the folder ``home``, which need not be there."""
    function = _function(name)
    values = {"name": name, "function": function, "module": f"initflow_{function}"}
    for source, place in FILES.items():
        file = home / Template(place).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = files("initflow.initializers").joinpath("template", f"{source}.template")
        content = Template(text.read_text(encoding="utf-8")).substitute(values)
        file.write_text(content, encoding="utf-8")


def _function(name: str) -> str:
    """The function that ``name`` stands for."""
    if not NAME.fullmatch(name):
        raise SettingError(
            "a new plugin's name must be letters and digits, with '_', '-' or '.' between them "
            f"and a letter first, not '{name}'"
        )
    if name in SCHEME_NAMES:
        raise SettingError(f"'{name}' is the name of a built-in scheme, which no plugin may take")
    function = re.sub(r"[.-]", "_", name)
    if keyword.iskeyword(function) or function in USED:
        raise SettingError(f"'{name}' cannot name a function: Python or its module uses it already")
    return function
