"""docs/api.md has all public names, and examples that print what they say."""

import inspect
import re

import pytest
import torch

from docs import api
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
PUBLIC = api.public()
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


def test_the_page_is_what_the_script_writes():
    """To the letter, so that nothing in it is kept by hand."""
    assert api.page() == PAGE, "run: python docs/api.py"


def test_every_public_name_is_told_once():
    """Under a heading of its own or, of an error, in the table."""
    headings = re.findall(r"^### ([\w.]+)$", PAGE.partition("\n## Results\n")[0], re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| `\w+` \| .+ \| \d \|$", PAGE, re.MULTILINE)
    assert sorted([*headings, *rows]) == sorted(PUBLIC)
    assert {"train", "theory.gain", "initializers.find", "testing.check"} <= set(headings)


def test_no_name_is_without_a_word_on_it():
    """No function, class or error."""
    for name, value in PUBLIC.items():
        assert name in api.CONSTANTS or inspect.getdoc(value), name


def test_every_public_function_has_an_example():
    """And no example is of what there is not; each is on the page once."""
    names = {name.replace(".", "_") for name in PUBLIC}
    assert {name.replace(".", "_") for name in FUNCTIONS} <= EXAMPLES.keys() <= names
    for code in EXAMPLES.values():
        assert PAGE.count(f"```python\n{code}```") == 1


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
        ("see :func:`initflow.theory.gain`", "see [`initflow.theory.gain`](#theorygain)"),
        ("as :class:`Place` does", "as [`Place`](#initializersplace) does"),
        ("a :class:`initflow.SettingError`", "a [`initflow.SettingError`](#errors)"),
        (
            "A decorator:\n\n::\n\n    @it\n    def f(): ...\n\nIt stays.",
            "A decorator:\n\nIt stays.",
        ),
    ],
)
def test_docstrings_become_markdown(text, markdown):
    """Roles are links to where they are told, and a block of code is left to the example."""
    assert api._markdown(text) == markdown
