"""Public names that are loaded when they are used, from a stub that type checkers read too.

As lazy_loader does it, but also from a zip file, and whatever EAGER_IMPORT says: MLflow imports a
part of this package in each process, which must stay light.
"""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from initflow.errors import naming_extras


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a ``package`` (PEP 562).

    Its ``__init__.pyi`` imports each name from a module within it, or a module from itself.
    """
    module = sys.modules[package]
    stub = module.__spec__.loader.get_data(  # type: ignore[union-attr]
        str(Path(str(module.__file__)).with_suffix(".pyi"))
    )
    homes: dict[str, str | None] = {}  # None of a module
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module for alias in node.names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home = homes[name]
        # In a notebook tqdm, which MLflow loads, advises an extension that no bar of ours needs.
        warnings.filterwarnings("ignore", "IProgress not found")
        with naming_extras(f"{package}.{name}"):
            found = importlib.import_module(f"{package}.{home or name}")
        value = getattr(found, name) if home else found
        setattr(module, name, value)
        return value

    return load, lambda: sorted(homes), sorted(homes)
