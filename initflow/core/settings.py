"""Named settings as frozen dataclasses: each is read and checked by its kind."""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self, dataclass_transform

from initflow.core.kinds import Kind
from initflow.errors import SettingError, did_you_mean, unknown


def setting(
    default: object, kind: Kind, meaning: str, *, only: tuple[str, tuple[str, ...]] | None = None
) -> Any:
    """One of ``Settings``. ``only`` names another one, and which of its values this one is for."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "only": only})


def shared(owner: type[Settings], name: str) -> Any:
    """A setting that is the same as its ``owner``'s."""
    its = owner.__dataclass_fields__[name]
    return field(default=its.default, metadata=its.metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Named settings, each read and checked by its kind; invalid ones are a `SettingError`.

    Every class that inherits from this one is a frozen dataclass, too, whose help lists them.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", *map(_line, fields(cls))])

    def __post_init__(self) -> None:
        for setting in fields(self):
            kind: Kind = setting.metadata["kind"]
            value = getattr(self, setting.name)
            try:
                parsed = kind.parse(value)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise invalid(setting.name, kind, value) from None
            object.__setattr__(self, setting.name, parsed)
        for setting in fields(self):
            if getattr(self, setting.name) != setting.default and not self.has(setting.name):
                choice, values = setting.metadata["only"]
                text = setting.metadata["kind"].format(getattr(self, setting.name))
                raise SettingError(
                    f"{setting.name}={text} is for {choice}={either(values)}, not for "
                    f"'{getattr(self, choice)}'"
                )

    def has(self, name: str) -> bool:
        """Whether the setting ``name`` says anything with the others as they are."""
        only = self.__dataclass_fields__[name].metadata["only"]
        return only is None or getattr(self, only[0], only[1][0]) in only[1]

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Self:
        """The ``settings``, each as text or a Python value; the others have their defaults."""
        names = [one.name for one in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("a setting", name, names)
        return cls(**settings)

    def as_text(self) -> dict[str, str]:
        """Every setting by name, as the text that gives it back, but for a password."""
        return {
            setting.name: setting.metadata["kind"].format(getattr(self, setting.name))
            for setting in fields(self)
        }

    def command(self, name: str, always: tuple[str, ...] = (), launcher: Sequence[str] = ()) -> str:
        """The command line of the command ``name`` with these settings; defaults are left out.

        Those named in ``always`` are always there. It is an ``initflow name`` or, where
        ``launcher`` has a project and options, an ``mlflow run`` of that project.
        """
        defaults = type(self)().as_text()
        chosen = {
            setting: shlex.quote(text)
            for setting, text in self.as_text().items()
            if text != defaults[setting] or setting in always
        }
        if launcher:
            parameters = (f"-P {setting}={text}" for setting, text in chosen.items())
            entry_point = [] if name == "train" else ["-e", name]
            project, *others = map(shlex.quote, launcher)
            words = ["mlflow run", project, *entry_point, *others, *parameters]
        else:
            options = (f"--{key.replace('_', '-')} {text}" for key, text in chosen.items())
            words = ["initflow", name, *options]
        return " ".join(words)


def _line(its: Field[Any]) -> str:
    """What a setting means, the values that it takes, and its default."""
    kind, meaning, only = (its.metadata[key] for key in ("kind", "meaning", "only"))
    alone = f" (for {only[0]}={either(only[1])} only)" if only else ""
    values = f"{kind.expected} (default {kind.format(its.default)})"
    line = f"- ``{its.name}``: {meaning}{alone}; {values}."
    return textwrap.fill(line, 100, subsequent_indent="  ", break_long_words=False)


def check_range(settings: Settings, name: str) -> None:
    """Raise :class:`SettingError` where ``name_low`` is not below ``name_high``."""
    low, high = getattr(settings, f"{name}_low"), getattr(settings, f"{name}_high")
    if low >= high:
        raise SettingError(
            f"{name}_low must be below {name}_high, not '{low:g}' with {name}_high={high:g}"
        )


def either(values: Sequence[str]) -> str:
    """``a, b or c``."""
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def invalid(name: str, kind: Kind, value: object) -> SettingError:
    if kind.choices:
        return unknown(name, value, kind.choices)
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else []
    hints = (did_you_mean(word, kind.names) for word in words if word not in kind.names)
    hint = next(filter(None, hints), "")
    return SettingError(f"{name} must be {kind.expected}, not '{value}'{hint}")
