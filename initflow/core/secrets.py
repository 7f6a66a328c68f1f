"""Passwords, tokens and users cut out of what is shown, logged or recorded."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

# What is in the names of secrets; the parameters of addresses have further ones.
NAMED = r"(?i)pass|pwd|secret|token|api.?key|access.?key"
PARAMETER = rf"{NAMED}|credential|signature|(?:key|sig)$"
# How a word may begin, after its quotes: as an address, of which the scheme is kept, or as a path.
ADDRESS = re.compile(r"^([\"'(\[<{]*(?:(?:[A-Za-z][\w+.-]*:)?//)?).*@")
PATH = re.compile(r"[\"'(\[<{]*(?:(?:sqlite|file):///|/(?!/))(?!.*://)")
# A user and a password before a host; not the product of a slice.
USER = re.compile(r"\w[\w.%+~-]{0,63}:[^@\s()\[\]{},]{1,256}@(?=\w)")


def without_credentials(text: str) -> str:
    """``text`` without what stands before an @ in its words, as addresses may hold a password.

    From the scheme of an address to its last @: a password may hold another, or a slash. The
    values of what is named as a secret are ``***``. A file's path stays as it is.
    """

    def cut(found: re.Match[str]) -> str:
        return found[0] if PATH.match(found[0]) else ADDRESS.sub(r"\1", found[0])

    return re.sub(r"\S+", cut, _without_values(text, NAMED, ends=r"&\s"))


def without_password(text: str) -> str:
    """A database's URL as it may be shown: ``***`` for its password, but with its user."""
    text = _without_values(text, NAMED, ends="&")
    if not text.startswith("sqlite"):
        # Up to the last @, as a password may hold one; of the web, a user alone may be a token.
        text = re.sub(r"(?s)(://[^:/?#@]*)(?::|[/?#@].*:).*@", r"\1:***@", text)
        text = re.sub(r"(?s)(https?://).*@", r"\1***@", text)
        # Without one, what is no port is a password whose host was forgotten.
        text = re.sub(r"(://[^:/?#@[]*):(?!\d*(?:[/?#]|$))[^@/?]*(?=[/?]|$)", r"\1:***", text)
    return text


def without_secrets(text: str) -> str:
    """``text`` whose addresses hold no credentials: neither before an @ nor as a parameter.

    Other words keep their @, as a diff is full of them: its hunks, decorators, products.
    """

    def cut(found: re.Match[str]) -> str:
        scheme, there, rest = found[0].partition("://")
        if there:
            return scheme + there + _without_values(rest.rpartition("@")[2], PARAMETER, ends="&#")
        return USER.sub("", found[0])

    return re.sub(r"[^\s'\"]+", cut, text)


def without_home(text: str) -> str:
    """``text`` with ``~`` for the user's home folder, whose name is often the user's."""
    try:
        home = str(Path.home())
    except RuntimeError:  # it is not known
        return text
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)


def _without_values(text: str, names: str, ends: str) -> str:
    """``password=***`` for each value whose name has one of ``names`` in it.

    A value lasts until one of the characters ``ends``. An @ in it is kept, as what stands before
    it may be a password whose name is a part of it.
    """
    shown, at, value = "", 0, re.compile(f"[^{ends}]*")
    for name in re.finditer(r"(?<![\w%.-])([\w%.-]++)=", text):
        if name.start() >= at and re.search(names, unquote(name[1])):
            found = value.match(text, name.end())
            assert found
            shown += f"{text[at : name.end()]}***{'@' * ('@' in found[0])}"
            at = found.end()
    return shown + text[at:]
