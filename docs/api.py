"""The reference of all that ``import initflow`` offers: ``python docs/api.py``.

Signatures and docstrings come from the code, the examples from ``docs/examples.py``, so that
nothing about them is written twice. The page is ``docs/api.md``; a test holds it equal to what is
made here, and runs the examples.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import initflow
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.reporting.results import Result

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# API reference

All that `import initflow as inf` offers, with the namespaces `inf.initializers`, `inf.theory` and
`inf.testing`. These names stay; all else may move. Nothing heavy is imported before it is used.

`python docs/api.py` writes this page from the code. Each example is run by a test, as it stands;
behind a `print` is what it prints, `...` for what may differ.
"""
NAMESPACES = ("initializers", "theory", "testing")


@dataclass(frozen=True)
class Group:
    """What a reader looks for, a sentence or some on it, and the names that are of use there."""

    title: str
    lead: str
    names: tuple[str, ...]


COMMANDS = """\
Each is the command of the same name. Settings are keywords, or one object, `config`: `settings` are
[the fields](#settings) of that class, by default as there. `experiment` is the name of MLflow's
experiment. `progress=False` makes them silent; a function `progress(what, done, total)` is told
instead of a bar. Each but `export` gives [a result](#results).
"""
GROUPS = (
    Group(
        "Train and compare",
        COMMANDS,
        ("train", "compare", "trainability", "rates", "tune", "reproduce", "verify", "export"),
    ),
    Group(
        "Any model",
        "For any `torch.nn.Module`. `diagnose`, whose settings are given as above, takes "
        "feed-forward networks where no model is named.",
        (
            "initialize",
            "inspect",
            "watch",
            "lightning_callback",
            "transformers_callback",
            "diagnose",
            "phase",
        ),
    ),
    Group(
        "Schemes",
        "How weights are filled: the schemes that are there, and [your own](plugins.md).",
        (
            "initializer",
            "initializers.find",
            "initializers.Scheme",
            "initializers.Place",
            "initializers.BUILT_IN",
            "initializers.ACTIVATIONS",
            "initializers.Activation",
            "testing.assert_initializer_contract",
            "testing.check",
            "testing.RuleResult",
        ),
    ),
    Group(
        "Theory",
        "What [theory](theory.md) predicts: numbers from numbers, nothing is drawn or measured. "
        "φ is the activation function, z a number from N(0, 1). Tensors are of double precision "
        "(`dtype=torch.float64`), of any shape.",
        (
            "theory.gain",
            "theory.mean_field",
            "theory.MeanField",
            "theory.mean_fields",
            "theory.MeanFields",
            "theory.critical_line",
            "theory.variance_map",
            "theory.correlation_map",
            "theory.fixed_point",
            "theory.fixed_points",
            "theory.second_moment",
            "theory.slope_moment",
            "theory.product_moment",
            "theory.slope_product_moment",
            "theory.expectation",
            "theory.pair_expectation",
        ),
    ),
    Group(
        "Settings",
        "Frozen dataclasses, one for each command: `dataclasses.replace` makes another of one. "
        "Every field takes its value or the text of it (`(300, 100)` or `'300,100'`); a wrong one "
        "is a `SettingError`. `config.command('train')` is the command line, `config.as_text()` "
        "all fields as text. What each means is in [parameters](parameters.md).",
        (
            "TrainConfig",
            "CompareConfig",
            "TrainabilityConfig",
            "RatesConfig",
            "TuneConfig",
            "ReproduceConfig",
            "DiagnoseConfig",
            "PhaseConfig",
            "VerifyConfig",
        ),
    ),
)
RESULTS = """\
What these functions give. In a terminal a result is one line, in a notebook its sentences, its
table and its figures. `title` says what it is of, `conclusions` are sentences on what came of it.
All of them have:
"""
# Of which functions, and what is to be told of it beside what all of them have.
MEMBERS = {
    "train": ("outcome", "last"),
    "compare": ("runs_to_pandas",),
    "trainability": ("runs_to_pandas",),
    "rates": ("runs_to_pandas",),
    "tune": (),
    "reproduce": ("runs_to_pandas",),
    "diagnose": ("failed",),
    "phase": (),
    "verify": ("verdict",),
    "initialize": ("__str__",),
    "inspect": ("metrics",),
}
SHARED = ("to_pandas", "figures", "figure")
ERRORS = """\
Each is one line that names what is wrong and what would be right. `except inf.InitflowError`
catches all of them. The exit code is that of the command `initflow`.
"""
CONSTANTS = {
    "initializers.BUILT_IN": "The built-in schemes by name, each a `Scheme`: "
    "[what they are](training.md#schemes).",
    "initializers.ACTIVATIONS": "The built-in activation functions by name, each an `Activation`:",
}
PAGES = {  # with more on a name
    "train": "training.md",
    "compare": "comparing.md",
    "trainability": "pictures.md#trainable-depth",
    "rates": "pictures.md#learning-rates-that-a-scheme-bears",
    "tune": "tuning.md",
    "reproduce": "comparing.md#published-tables",
    "verify": "verifying.md",
    "export": "verifying.md#for-somebody-else",
    "initialize": "models.md",
    "inspect": "watching.md#inspect",
    "watch": "watching.md",
    "lightning_callback": "watching.md#lightning",
    "transformers_callback": "watching.md#hugging-faces-trainer",
    "diagnose": "signals.md",
    "phase": "pictures.md",
    "initializer": "plugins.md",
    "theory.gain": "theory.md#gains",
    "theory.mean_field": "theory.md#mean-field",
    "theory.critical_line": "theory.md#the-critical-line",
}
WIDTH = 100


def page() -> str:
    """The whole page, as Markdown."""
    sections = ["\n\n".join(_group(group)) for group in GROUPS]
    listed = [f"- [{one.title}](#{_anchor(one.title)}): {_listed(one.names)}" for one in GROUPS]
    listed += ["- [Results](#results)", "- [Errors](#errors)"]
    parts = [HEAD, "\n".join(listed), *sections, "\n\n".join(_results()), "\n\n".join(_errors())]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


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


def errors() -> list[str]:
    """Their names, those that others come of first."""
    found = {n: v for n, v in public().items() if _is_error(v)}
    return sorted(found, key=lambda name: [kind.__name__ for kind in found[name].__mro__[::-1]])


def examples() -> dict[str, str]:
    """The code of each, by the name that it is of, with dots as ``_``."""
    source = PAGE.with_name("examples.py").read_text()
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


def _names(space: ModuleType) -> list[str]:
    """A namespace's, or what is defined in a module that does not list its own."""
    own = (n for n, v in vars(space).items() if getattr(v, "__module__", "") == space.__name__)
    return list(getattr(space, "__all__", None) or (n for n in own if not n.startswith("_")))


def _group(group: Group) -> Iterator[str]:
    yield f"## {group.title}"
    yield _filled(group.lead)
    for name in group.names:
        yield f"### {name}"
        yield from _entry(name, public()[name])


def _entry(name: str, value: Any) -> Iterator[str]:
    """Signature, docstring, members and example of what has a name."""
    if name in CONSTANTS:
        more = f" {', '.join(f'`{key}`' for key in value)}." if value is ACTIVATIONS else ""
        yield _filled(CONSTANTS[name] + more)
        return
    yield f"```python\n{_signature(f'inf.{name}', value)}\n```"
    yield from _aliases(value)
    yield _markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not name.endswith("Config"):
        yield from _members(value)
    if name in PAGES:
        file, _, _ = PAGES[name].partition(".")
        yield f"More: [{file}]({PAGES[name]})."
    if name.endswith("Config"):
        command = name.removesuffix("Config").lower()
        yield f"Meanings and values: [{command}](parameters.md#{command})."
    yield from _example(name)


def _example(name: str) -> Iterator[str]:
    code = examples().get(name.replace(".", "_"))
    if code:
        yield f"```python\n{code}```"


def _signature(name: str, value: Any) -> str:
    """How it is called; settings that are a configuration's are one word."""
    signature = inspect.signature(value)
    shown: list[str] = []
    star = False
    for one in signature.parameters.values():
        if "config" in signature.parameters and one.annotation is one.empty:
            continue  # a setting
        if one.kind is one.KEYWORD_ONLY and not star:
            star = True
            shown.append("*")
        shown.append(_parameter(one))
    if "config" in signature.parameters:
        shown.append("**settings")
    result = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    before = ""
    if inspect.isgeneratorfunction(inspect.unwrap(value)) and inspect.unwrap(value) is not value:
        before, result = "with ", ": ..."  # a context manager
    line = f"{before}{name}({', '.join(shown)}){result}"
    if len(line) <= WIDTH:
        return line
    lines = "".join(f"    {one},\n" for one in shown)
    return f"{before}{name}(\n{lines}){result}"


def _parameter(one: inspect.Parameter) -> str:
    text = f"{one.name}: {one.annotation}" if one.annotation is not one.empty else one.name
    if one.default is one.empty:
        return text
    default = repr(one.default).replace("'", '"')
    if isinstance(one.default, Activation):
        default = f'ACTIVATIONS["{one.default.name}"]'
    return f"{text} = {'...' if default.startswith('<') else default}"


def _aliases(value: Any) -> Iterator[str]:
    """What the names in a signature stand for that are no types themselves."""
    function = inspect.unwrap(value)
    if inspect.isclass(value) or "config" in inspect.signature(function).parameters:
        return
    words = re.findall(r"(?<![.\w])[A-Za-z_]\w*", str(inspect.signature(function)))
    told = []
    for word in dict.fromkeys(words):
        meaning = function.__globals__.get(word)
        if isinstance(meaning, typing.TypeVar):
            meaning = meaning.__bound__
        if typing.get_origin(meaning):
            text = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", str(meaning))
            told.append(f"`{word}` is `{text}`")
    if told:
        yield _filled(f"{'; '.join(told)}.")


def _members(kind: type) -> Iterator[str]:
    """The public methods and properties that say what they are."""
    lines: list[str] = []
    for name, member in vars(kind).items():
        if not name.startswith("_") and not inspect.isclass(member):
            lines += _member(kind, name, member)
    if lines:
        yield "\n".join(lines)


def _member(kind: type, name: str, member: Any) -> Iterator[str]:
    function = member.__func__ if isinstance(member, classmethod) else member
    text = inspect.getdoc(function)
    if not text or not (callable(function) or hasattr(function, "__get__")):
        return
    call = f"{name}({', '.join(_arguments(function))})" if callable(function) else name
    call = {"__str__": "print(…)"}.get(name, call)
    owner = f"{kind.__name__}." if isinstance(member, classmethod) else ""
    yield f"- `{owner}{call}`: " + textwrap.indent(_markdown(text), "  ").lstrip()


def _arguments(function: Callable[..., Any]) -> Iterator[str]:
    """Their names, with defaults, as in a signature."""
    star = False
    for one in [*inspect.signature(function).parameters.values()][1:]:  # without self
        if one.kind is one.KEYWORD_ONLY and not star:
            star = True
            yield "*"
        yield one.name if one.default is one.empty else f"{one.name}={one.default!r}"


def _results() -> Iterator[str]:
    yield "## Results"
    yield _filled(RESULTS)
    yield "\n".join(line for name in SHARED for line in _member(Result, name, vars(Result)[name]))
    yield "Those in an MLflow run have its id, `run_id`."
    for name, own in MEMBERS.items():
        function = inspect.unwrap(public()[name])
        kind = function.__globals__[function.__annotations__["return"]]
        yield f"### {kind.__name__}"
        yield f"From [`{name}`](#{_anchor(name)})."
        yield _markdown(inspect.getdoc(kind) or "")
        rows = f"`to_pandas()`: {_markdown(inspect.getdoc(kind.numbers) or '')}"
        lines = ["- " + textwrap.indent(rows, "  ").lstrip()]
        for member in own:
            found = inspect.getattr_static(kind, member)
            lines += _member(kind, member, found)
        yield "\n".join(lines)


def _errors() -> Iterator[str]:
    yield "## Errors"
    yield _filled(ERRORS)
    rows = ["| error | is a | when | exit code |", "|---|---|---|---|"]
    for name in errors():
        kind = public()[name]
        base = kind.__base__.__name__
        rows.append(f"| `{name}` | `{base}` | {_markdown(kind.__doc__)} | {kind.exit_code} |")
    yield "\n".join(rows)
    yield from _example("SettingError")


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def _markdown(text: str) -> str:
    """A docstring's roles and literals as Markdown; a block of code has its place in an example."""
    text = re.sub(r"^::\n\n(?: +.*\n|\n)+", "", inspect.cleandoc(text), flags=re.MULTILINE)
    text = re.sub(r":(\w+):`([^`]+)`", lambda found: _link(found[2]), text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _link(target: str) -> str:
    """To where on this page it is told, if it is."""
    name = target.removeprefix("initflow.")
    told = {full.rpartition(".")[2]: full for group in GROUPS for full in group.names}
    full = name if name in told.values() else told.get(name)
    if name == "errors" or name in errors():
        return f"[`{target}`](#errors)"
    return f"[`{target}`](#{_anchor(full)})" if full else f"`{target}`"


def _anchor(heading: str) -> str:
    """What GitHub makes of it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"[`{name}`](#{_anchor(name)})" for name in names)


def _filled(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Written: {PAGE}")
