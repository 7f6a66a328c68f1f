"""Pages that are made when the site is built, and links out of ``docs/``, where no page is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click
from mkdocs.structure.files import File, Files

from initflow.cli.commands import cli

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
COMMANDS = """\
# Commands

What each command says of itself under `--help`. Each but the last ones is also an entry point of
the [MLflow Project](project.md), and a function [in Python](api.md).
[Parameters](parameters.md) has all values that an option takes.
"""
WIDTH = 80  # of a block of code on a page


def on_files(files: Files, config: Any) -> Files:
    """The commands by click, and the pages of the repository's root."""
    files.append(File.generated(config, "commands.md", content=_commands()))
    for page, path in FROM_ROOT.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / path).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a notebook is one to its page, one to what is no page is the file's path."""
    folder = ROOT / "docs" / PurePosixPath(page.file.src_uri).parent

    def led(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        name = (folder / target).resolve().relative_to(ROOT).as_posix()
        if name.endswith(".ipynb"):
            return f"[{text}]({target.removesuffix('.ipynb')}.md)"
        if name.startswith("docs/") and name.endswith(".md"):
            return found[0]
        for made, source in FROM_ROOT.items():
            if name == source:
                return f"[{text}]({made}{anchor})"
        return text if text.strip("`") in name else f"{text} (`{name}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+|[^)#:]+\.ipynb)((?:#[^)]*)?)\)", led, markdown)


def _commands() -> str:
    return "\n\n".join([COMMANDS, *_sections("initflow", cli, 2)])


def _sections(name: str, command: click.Command, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH)
    yield f"{'#' * level} {name}\n\n```text\n{command.get_help(context)}\n```"
    for part, of in getattr(command, "commands", {}).items():
        yield from _sections(f"{name} {part}", of, 2 if level == 2 and name == "initflow" else 3)
