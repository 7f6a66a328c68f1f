"""Passwords, tokens and users cut out of what is shown, logged or recorded."""

from __future__ import annotations

import re
from urllib.parse import unquote

SECRET = re.compile(r"(?i)pass|pwd|secret|token|api.?key|access.?key")  # in the names of some
# How a word may begin, after its quotes: as an address, of which the scheme is kept, or as a path.
ADDRESS = re.compile(r"^([\"'(\[<{]*(?:(?:[A-Za-z][\w+.-]*:)?//)?).*@")
PATH = re.compile(r"[\"'(\[<{]*(?:(?:sqlite|file):///|/(?!/))(?!.*://)")


def without_credentials(text: str) -> str:
    """What stands before an @ in its words is left out, as addresses may hold a password.

    The values of what is named as one are too; of a file's path nothing is.
    """
    return re.sub(r"\S+", lambda found: _without_user(found[0]), without_named_secrets(text))


def _without_user(word: str) -> str:
    """From the scheme of an address to its last @: a password may hold another, or a slash."""
    return word if PATH.match(word) else ADDRESS.sub(r"\1", word)


def without_named_secrets(text: str, ends: str = r"&\s") -> str:
    """``password=***`` for each such value, which lasts until one of the characters ``ends``.

    An @ in it is kept, as what stands before it may be a password whose name is a part of it.
    """
    shown, at = "", 0
    for name in re.finditer(r"([\w%.-]+)=", text):
        if name.start() >= at and SECRET.search(unquote(name[1])):
            value = re.split(f"[{ends}]", text[name.end() :], maxsplit=1)[0]
            shown += f"{text[at : name.end()]}***{'@' * ('@' in value)}"
            at = name.end() + len(value)
    return shown + text[at:]


def without_password(text: str) -> str:
    """A database's URL as it may be shown."""
    text = without_named_secrets(text, ends="&")
    if not text.startswith("sqlite"):
        # Up to the last @, as a password may hold one; of the web, a user alone may be a token.
        text = re.sub(r"(?s)(://[^:/?#@]*)(?::|[/?#@].*:).*@", r"\1:***@", text)
        text = re.sub(r"(?s)(https?://).*@", r"\1***@", text)
        # Without one, what is no port is a password whose host was forgotten.
        text = re.sub(r"(://[^:/?#@[]*):(?!\d*(?:[/?#]|$))[^@/?]*(?=[/?]|$)", r"\1:***", text)
    return text


# A user and a password before a host; not the product of a slice.
USER = r"\w[\w.%+~-]{0,63}:[^@\s()\[\]{},]{1,256}@(?=\w)"


# An address's parameter that is named as a secret.
PARAMETER = (
    r"(?i)([?&][\w%.-]{0,40}(?:token|key|secret|pass|passwd|password|pwd|credential|sig|signature)=)"
    r"[^&#]+"
)


def without_secrets(text: str) -> str:
    """``text`` whose addresses hold no credentials: neither before an @ nor as a parameter.

    Other words keep their @, as a diff is full of them: its hunks, decorators, products.
    """

    def cut(found: re.Match[str]) -> str:
        word = found[0]
        scheme, there, rest = word.partition("://")
        if there:
            return scheme + there + re.sub(PARAMETER, r"\1***", rest.rpartition("@")[2])
        return re.sub(USER, "", word) if ":" in word and "@" in word else word

    return re.sub(r"[^\s'\"]+", cut, text)
