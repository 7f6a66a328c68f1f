"""docs/api.md has all public names, and examples that print what they say."""

import inspect
import re

import pytest
import torch

import initflow as inf
from docs import api
from initflow.reporting.results import Result
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
PUBLIC = api.public()
RESULTS = set(re.findall(r"^::: initflow\.((?:experiments|reporting)\.\S+)$", PAGE, re.MULTILINE))
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
EXAMPLES = api.examples()
# What these packages warn of is their own.
OTHERS = [
    pytest.mark.filterwarnings(f"ignore::{category}")
    for category in (
        "UserWarning",
        "DeprecationWarning",
        "FutureWarning",
        "lightning.fabric.utilities.rank_zero.LightningDeprecationWarning",
    )
]


def test_every_public_name_is_told_once():
    """Under the sections of the page; of results and errors, those that there are."""
    told = re.findall(r"^::: initflow\.([\w.]+)$", PAGE, re.MULTILINE)
    assert sorted(name for name in told if name not in RESULTS) == sorted(PUBLIC)
    assert set(told) >= {"train", "theory.gain", "initializers.find", "testing.check", *RESULTS}


def test_every_result_of_a_function_is_told():
    """What it has beside what all results have."""
    given = set()
    for name in FUNCTIONS:
        function = inspect.unwrap(PUBLIC[name])
        kind = function.__globals__.get(function.__annotations__.get("return"))
        if inspect.isclass(kind) and issubclass(kind, Result):
            given.add(f"{kind.__module__}.{kind.__qualname__}".removeprefix("initflow."))
    assert given == RESULTS - {"reporting.results.Result"}


def test_no_name_is_without_a_word_on_it():
    """No function, class or error."""
    for name, value in PUBLIC.items():
        assert isinstance(value, dict) or inspect.getdoc(value), name


def test_every_public_function_has_an_example():
    """And no example is of what there is not."""
    names = {name.replace(".", "_") for name in PUBLIC}
    assert {name.replace(".", "_") for name in FUNCTIONS} <= EXAMPLES.keys() <= names


def test_settings_are_one_word_of_a_signature():
    """Those of the configuration; functions without one are as they are."""
    assert list(api.signature(inf.train).parameters) == [
        "config",
        "experiment",
        "progress",
        "settings",
    ]
    assert api.signature(inf.theory.gain) == inspect.signature(inf.theory.gain)


def of_others(name):
    return pytest.param(name, marks=OTHERS if name.endswith("_callback") else ())


@pytest.mark.parametrize("name", [of_others(name) for name in EXAMPLES])
def test_the_examples_print_what_they_say(name, store, capsys):
    """Each runs by itself as it stands, in an empty folder; ``...`` is for what may differ."""
    torch.manual_seed(0)
    exec(EXAMPLES[name], {"__name__": "__main__"})  # noqa: S102 - our own
    printed = iter(capsys.readouterr().out.splitlines())
    said = re.findall(r"^ *print\(.*\)  # (.*)$", EXAMPLES[name], re.MULTILINE)
    for line in said:
        pattern = re.escape(line).replace(r"\.\.\.", ".*")
        assert any(re.fullmatch(pattern, other) for other in printed), line
    tells_by_raising = ("testing_assert_initializer_contract",)
    assert said or name in tells_by_raising


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("``gain`` of :class:`str`", "`gain` of `str`"),
        ("see :func:`initflow.theory.gain`", "see [`theory.gain`][initflow.theory.gain]"),
        ("as :class:`Place` does", "as [`Place`][initflow.initializers.Place] does"),
        ("a :class:`initflow.SettingError`", "a [`SettingError`][initflow.SettingError]"),
        (
            "A decorator:\n\n::\n\n    @it\n    def f(): ...\n\nIt stays.",
            "A decorator:\n\nIt stays.",
        ),
    ],
)
def test_docstrings_become_markdown(text, markdown):
    """Roles are links to where they are told, and a block of code is left to the example."""
    assert api.markdown(text) == markdown
