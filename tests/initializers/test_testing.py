"""The conformance table: built-in schemes pass it, and each way to be wrong fails its own row."""

import textwrap

import pytest
import torch

from initflow import testing
from initflow.cli import process
from initflow.core import importing
from initflow.errors import SettingError
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.scheme import initializer
from initflow.testing import ALL_RULES, assert_initializer_contract, check
from tests.initializers.test_finder import project

GOOD = "    weight.normal_(0.0, fan_in**-0.5, generator=generator)\n"
NAN = "float('nan')"
HEAD = "import sys, time, torch, initflow\n"


def plugin(body, asks="weight, fan_in, generator", decorated=""):
    return f"{HEAD}\n{decorated}\ndef fill({asks}):\n{body}"


# What is wrong, the plugin's code, the row that must fail, and what it must say.
WRONG = {
    "wrong variance": (
        plugin(GOOD, decorated="@initflow.initializer(variance=lambda fan_in: 1.1 / fan_in)"),
        "variance",
        "100×200 float32, layer 0 of 3, relu: states 0.0055, the seeds give 0.00",
    ),
    "wrong bias variance": (
        plugin(
            GOOD + "    bias.normal_(0.0, 0.2, generator=generator)\n",
            "weight, bias, fan_in, generator",
            decorated="@initflow.initializer(bias_variance=lambda: 0.09)",
        ),
        "bias variance",
        "states 0.09, the seeds give 0.0",
    ),
    "no variance": (
        plugin(GOOD, decorated="@initflow.initializer(variance=lambda fan_in: float('nan'))"),
        "variance",
        "states nan, which is no variance",
    ),
    "global generator used": (
        plugin("    weight.normal_()\n"),
        "global state",
        "torch's random state was changed",
    ),
    "global seed set": (
        plugin("    torch.manual_seed(0)\n" + GOOD),
        "global state",
        "torch's random state was changed",
    ),
    "a seed of its own": (
        plugin("    weight.normal_(generator=torch.Generator().manual_seed(0))\n"),
        "other seed",
        "seeds 0 and 1 give the same, although it asks for one",
    ),
    "NaN by chance": (
        plugin(f"{GOOD}    if torch.rand((), generator=generator) < 0.05: weight[0] = {NAN}\n"),
        "finite",
        " entries are NaN or infinite",
    ),
    "refuses by chance": (
        plugin(
            GOOD + "    if torch.rand((), generator=generator) < 0.05: raise ValueError('no')\n",
            decorated="@initflow.initializer(variance=lambda fan_in: 1 / fan_in)",
        ),
        "runs",
        "float32, layer ",
    ),
    "wrong variance for another activation": (
        plugin(
            "    std = 2.0 if activation.name == 'tanh' else 1.0\n"
            "    weight.normal_(0.0, std, generator=generator)\n",
            "weight, activation, generator",
            decorated="@initflow.initializer(variance=lambda activation: 1.0)",
        ),
        "variance",
        "200×60 float32, layer 1 of 3, tanh: states 1, the seeds give ",
    ),
    "wrong variance for another argument": (
        plugin(
            "    weight.normal_(0.0, gain, generator=generator)\n",
            "weight, generator, *, gain: float = 1.0",
            decorated="@initflow.initializer(variance=lambda: 1.0)",
        ),
        "variance",
        "200×60 float32, layer 1 of 3, relu, gain=1.5: states 1, the seeds give 2.2",
    ),
    "an exit": (plugin("    raise SystemExit(0)\n"), "runs", "SystemExit: 0"),
    "a failure that looks like a refusal": (
        plugin("    if activation.name != 'relu': torch.zeros(3).numpy() + torch.zeros(4).numpy()\n"
               + GOOD, "weight, fan_in, generator, activation"),
        "runs",
        "sigmoid: ValueError: operands could not be broadcast",
    ),
    "a default that a spec cannot hold": (
        plugin(GOOD, "weight, fan_in, generator, *, mode: str = 'a,b'"),
        "arguments",
        "init must look like name or name:key=value",
    ),
    "no seed": (
        plugin("    own = torch.Generator(); own.seed(); weight.normal_(generator=own)\n"),
        "same seed",
        "entries differ in a second run",
    ),
    "NaN": (plugin("    weight.fill_(float('nan'))\n"), "finite", "or NaN only"),
    "NaN in tiny layers": (
        plugin(GOOD + "    weight.sub_(weight.mean()).div_(weight.abs().mean())\n"),
        "finite",
        "1×1 float32, layer 0 of 3, relu: ",
    ),
    "replaced tensor": (
        plugin("    weight.data = torch.randn(weight.shape, generator=generator)\n"),
        "in place",
        "it was replaced by another tensor",
    ),
    "returned tensor": (
        plugin("    return torch.randn(weight.shape, generator=generator)\n"),
        "in place",
        "another tensor was returned instead",
    ),
    "wrong dtype": (
        plugin("    weight.data = weight.double().normal_(generator=generator)\n"),
        "dtype",
        "was torch.float32, became torch.float64",
    ),
    "one dtype only": (
        plugin("    weight.zero_().matmul(torch.zeros(weight.shape[-1]))\n"),
        "runs",
        "float64, layer 0 of 3, relu: RuntimeError: ",
    ),
    "one shape only": (
        plugin("    weight.copy_(torch.ones(len(weight), fan_in))\n"),
        "runs",
        "16×8×3×3 float32, layer 0 of 3, relu: RuntimeError: ",
    ),
    "refuses all": (
        plugin("    raise ValueError('not today')\n"),
        "runs",
        "refuses every activation; sigmoid: not today",
    ),
    "refuses a shape": (
        plugin("    if fan_in % 2: raise ValueError('fan_in must be even')\n" + GOOD),
        "runs",
        "1×1 float32, layer 0 of 3, relu: fan_in must be even",
    ),
    "fails half-way": (
        plugin("    weight[0] = 1.0\n    raise RuntimeError('half-way')\n"),
        "runs",
        "200×60 float32, layer 1 of 3, sigmoid: RuntimeError: half-way",
    ),
    "import error": ("import no_such_module", "loads", "No module named 'no_such_module'"),
    "missing attribute": ("def fil(weight): ...", "loads", "has no attribute 'fill'"),
    "hanging import": (f"{HEAD}time.sleep(1000)", "loads", "TimeoutError: not done within 0.5 s"),
    "hanging fill": (
        plugin("    time.sleep(1000)\n"), "runs", "sigmoid: not done within 0.5 s"
    ),
    "another default dtype": (
        plugin("    torch.set_default_dtype(torch.float64)\n" + GOOD),
        "global state",
        "torch's default dtype was changed",
    ),
    "a default of another type": (
        plugin(GOOD, "weight, fan_in, generator, *, gain: int = 1.5"),
        "loads",
        "the default of 'gain' must be int, not 1.5",
    ),
    "a variance that exits": (
        plugin(GOOD, decorated="@initflow.initializer(variance=lambda: sys.exit())"),
        "variance",
        "the variance that it states failed: SystemExit",
    ),
    "a variance that hangs": (
        plugin(GOOD, decorated="@initflow.initializer(variance=lambda: time.sleep(1000))"),
        "variance",
        "not done within 0.5 s",
    ),
    "NaN in a network": (
        plugin("    network[0].weight.zero_()\n", "network"),
        "finite",
        "30-40-10 float32, images, sigmoid: fc2.weight: nothing was written into it",
    ),
    "replaced in a network": (
        plugin(
            "    for layer in network[::2]:\n"
            "        layer.weight.normal_(generator=generator)\n"
            "        layer.weight.data = layer.weight / 100\n",
            "network, generator",
        ),
        "in place",
        "fc1.weight: it was replaced by another tensor",
    ),
    "dies on black images": (
        plugin(
            "    for layer in network:\n"
            "        if isinstance(layer, torch.nn.Linear):\n"
            "            layer.weight.normal_(generator=generator)\n"
            "            layer.bias.zero_()\n"
            "            layer.weight.div_(layer(images).std())\n"
            "        images = layer(images)\n",
            "network, images, generator",
        ),
        "finite",
        "30-20-10 float32, black images, relu: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_every_way_to_be_wrong_fails_its_row(tmp_path, monkeypatch, capsys, checked_once, what):
    """By the command: exit 1, the row is marked, and what failed is told."""
    code, rule, detail = WRONG[what]
    torch.manual_seed(7)  # none that one of them sets: that would change nothing
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importing, "LIMIT_S", 0.5 if "hang" in what else 30.0)
    name = "wrong-" + what.lower().replace(" ", "-")
    module = name.replace("-", "_")
    home = project(tmp_path / "plugins", name, {name: f"{module}:fill"})
    (home / f"{module}.py").write_text(textwrap.dedent(code))
    assert process.main(["plugins", "check", name]) == 1
    out, err = capsys.readouterr()
    assert f" ✗  {rule} " in out
    assert f"\n{rule}: " in out
    assert detail in out
    assert err.startswith(f"Error: '{name}' breaks its contract: ")
    assert err.count("\n") == 1
    with pytest.raises(AssertionError) as error:
        assert_initializer_contract(name)
    assert str(error.value).startswith("the initializer breaks its contract\n")
    assert f"\n{rule} ({ALL_RULES[rule]}): " in str(error.value)


def test_every_rule_can_fail():
    """Each has a row above, but for those that the unit tests of the contract break."""
    assert {rule for _, rule, _ in WRONG.values()} | {"shape", "device"} == set(ALL_RULES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_schemes_keep_the_contract(name):
    """Each in every row."""
    assert_initializer_contract(name)


def test_arguments_and_functions_are_checked_too():
    """As a spec, or the function itself, decorated or not."""
    assert_initializer_contract("he:mode=fan_out")

    def plain(weight):
        weight.fill_(0.1)

    assert_initializer_contract(plain)
    assert_initializer_contract(initializer(plain, variance=lambda: 0.0))
    with pytest.raises(AssertionError, match=r"states 0\.5, the seeds give 0"):
        assert_initializer_contract(initializer(plain, variance=lambda: 0.5))
    with pytest.raises(SettingError, match="init must be one of zero"):
        assert_initializer_contract("no-such-scheme")


def test_what_it_refuses_is_noted_and_the_others_are_tried():
    """An initializer may be made for some activations only."""

    def for_tanh(weight, activation):
        if activation.name != "tanh":
            raise ValueError("made for tanh")
        weight.fill_(0.5)

    rows = {row.rule: row for row in check(for_tanh)}
    assert all(row.passed for row in rows.values())
    assert rows["runs"].note.startswith("refuses sigmoid, relu, leaky_relu")
    assert rows["runs"].cases >= 64
    assert rows["variance"].note == "states none: theory takes the one it finds"


def test_layers_that_differ_are_checked_by_what_they_state():
    """First, middle and last have variances of their own."""

    def by_layer(weight, layer, depth, generator):
        weight.normal_(0.0, layer / depth, generator=generator)

    right = initializer(by_layer, variance=lambda layer, depth: (layer / depth) ** 2)
    assert_initializer_contract(right)
    wrong = initializer(by_layer, variance=lambda depth: 1 / depth**2)
    with pytest.raises(AssertionError) as error:
        assert_initializer_contract(wrong)
    assert "layer 0 of 3" in str(error.value)
    assert "layer 1 of 3" not in str(error.value)


def test_a_row_as_json():
    """For programs."""
    (row, *_) = check("zero")
    assert row.as_json() == {
        "rule": "loads",
        "cases": 1,
        "failures": (),
        "note": "",
        "meaning": testing.ALL_RULES["loads"],
        "passed": True,
    }
