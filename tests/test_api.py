"""docs/api.md has all public names, and examples that print what they say."""

import builtins
import dataclasses
import inspect
import re

import pytest
import torch

import initflow as inf
from docs import api
from initflow.reporting.results import Result

PUBLIC = api.public()
RESULTS = {name for name in api.listed() if name.startswith(("experiments.", "reporting."))}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
EXAMPLES = api.examples()
TANH, ONE = inf.initializers.ACTIVATIONS["tanh"], torch.tensor(1.0, dtype=torch.float64)
MODEL = torch.nn.Linear(2, 2)
# A wrong call of each function.
WRONG = {
    "train": lambda: inf.train(lr=-1),
    "compare": lambda: inf.compare(progress="fast"),
    "trainability": lambda: inf.trainability(points=1),
    "rates": lambda: inf.rates(lr_low=20),
    "tune": lambda: inf.tune(sampler="grid"),
    "diagnose": lambda: inf.diagnose(fail_on="bad"),
    "phase": lambda: inf.phase(sigma_w2_low=5),
    "reproduce": lambda: inf.reproduce(table="mine"),
    "verify": lambda: inf.verify("mine"),
    "export": lambda: inf.export("0" * 32, to=5),
    "read": lambda: inf.read(None),
    "compare_runs": lambda: inf.compare_runs(by=""),
    "initialize": lambda: inf.initialize(5, "he"),
    "inspect": lambda: inf.inspect(MODEL, 5, torch.sum),
    "watch": lambda: inf.watch(MODEL, every=0).__enter__(),
    "lightning_callback": lambda: inf.lightning_callback(every=0),
    "transformers_callback": lambda: inf.transformers_callback(quantities="all"),
    "initializer": lambda: inf.initializer(5),
    "initializers.find": lambda: inf.initializers.find(5),
    "testing.assert_initializer_contract": lambda: inf.testing.assert_initializer_contract("hee"),
    "testing.check": lambda: next(inf.testing.check(5)),
    "theory.gain": lambda: inf.theory.gain("tanh", q=0),
    "theory.mean_field": lambda: inf.theory.mean_field("tanh", 1.0, 0.0),
    "theory.mean_fields": lambda: inf.theory.mean_fields(TANH, 1.0, 0.0),
    "theory.critical_line": lambda: inf.theory.critical_line(TANH, 0.05),
    "theory.variance_map": lambda: inf.theory.variance_map(TANH, 1.0, 1.0, 0.0),
    "theory.correlation_map": lambda: inf.theory.correlation_map(TANH, ONE, 0.0, 1.0, 0.0),
    "theory.fixed_point": lambda: inf.theory.fixed_point(TANH, 1.0, 0.0, start=0.0),
    "theory.fixed_points": lambda: inf.theory.fixed_points(TANH, -ONE, ONE),
    "theory.second_moment": lambda: inf.theory.second_moment("tanh", ONE),
    "theory.slope_moment": lambda: inf.theory.slope_moment(TANH, 1.0),
    "theory.product_moment": lambda: inf.theory.product_moment(TANH, ONE, 0.5),
    "theory.slope_product_moment": lambda: inf.theory.slope_product_moment("tanh", ONE, ONE),
    "theory.expectation": lambda: inf.theory.expectation(torch.abs, ONE.float()),
    "theory.pair_expectation": lambda: inf.theory.pair_expectation(torch.abs, ONE, 0.5),
}
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
    told = api.listed()
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


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_name_takes_is_told(name):
    """Each parameter of a function and each field of a dataclass, by its name, in its help."""
    value = PUBLIC[name]
    if dataclasses.is_dataclass(value):
        taken = [field.name for field in dataclasses.fields(value)]
    elif inspect.isfunction(value):
        of_own = api.signature(value).parameters.values()
        taken = [one.name for one in of_own if one.kind is not one.VAR_KEYWORD]
        assert taken
    else:
        assert isinstance(value, dict) or issubclass(value, Exception)
        return
    told = inspect.getdoc(value)
    assert [one for one in taken if f"``{one}``" not in told] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_raises_is_told(name):
    """In its help: errors that there are; and it does so, in one line, before anything is done."""
    told = inspect.getdoc(PUBLIC[name])
    errors = re.findall(r"\b[A-Z]\w*Error\b", told)
    as_another = re.search(r"Raises,? .*what :func:`initflow\.(\w+)`\s+does", told, re.DOTALL)
    assert errors or (as_another and as_another[1] in FUNCTIONS)
    assert all(hasattr(inf, error) or hasattr(builtins, error) for error in errors)
    with pytest.raises(inf.SettingError) as caught:
        WRONG[name]()
    assert "\n" not in str(caught.value)


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
        ("a :class:`Training`", "a [`Training`][initflow.experiments.train.Training]"),
        (
            "A decorator:\n\n::\n\n    @it\n    def f(): ...\n\nIt stays.",
            "A decorator:\n\nIt stays.",
        ),
    ],
)
def test_docstrings_become_markdown(text, markdown):
    """Roles are links to where they are told, and a block of code is left to the example."""
    assert api.markdown(text) == markdown
