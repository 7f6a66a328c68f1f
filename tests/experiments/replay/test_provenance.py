"""What a network's numbers follow from: written, read back, and refused where it is damaged."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st
from safetensors.torch import load, save

from initflow import __version__
from initflow.core.configurations import ADDED
from initflow.errors import ReplayError
from initflow.experiments.replay import provenance, recorded
from initflow.experiments.replay.provenance import REPLAY, TRACE, WEIGHTS
from initflow.initializers import built_in as initializers
from initflow.initializers.plugins import find
from initflow.training import model
from tests.initializers.test_finder import project
from tests.replaying import config, evidence, reader, stated, trained


@pytest.fixture(scope="module")
def whole():
    """The evidence of a small network, with its weights."""
    return evidence(config(init="xavier:gain=1.5", activation="tanh", validation=100))


@pytest.fixture(scope="module")
def written(whole):
    """Its files, by name."""
    return provenance.files(whole)


def same(one, other):
    assert one.provenance == other.provenance
    assert torch.equal(one.losses, other.losses)
    for ours, theirs in ((one.initial, other.initial), (one.final, other.final)):
        assert (ours is None) == (theirs is None)
        for name in ours or ():
            assert torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32))


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"log_model": False},
        {"hidden": "none"},
        {"activation": "linear", "lr": 20.0},  # it diverges
        {"init": "normal:std=1e30", "activation": "linear"},  # before its first update
    ],
    ids=str,
)
def test_what_is_written_is_read_back(own):
    """To the bit, whatever became of the training."""
    kept = evidence(config(**own))
    same(recorded.gathered(reader(provenance.files(kept)), "it"), kept)
    assert (kept.initial is not None) == own.get("log_model", True)
    assert kept.provenance.outcome == ("diverged" if "linear" in own.values() else "finished")
    assert len(kept.losses) == kept.provenance.updates


def test_it_holds_all_that_the_numbers_follow_from(whole, written):
    """The settings, data, scheme, seeds, threads, device, outcome and environment."""
    told = json.loads(written[REPLAY])
    assert told["format"] == 1
    assert (
        told["config"]
        == config(init="xavier:gain=1.5", activation="tanh", validation=100).as_text()
    )
    assert (told["device"], told["threads"]) == ("cpu", 1)
    data = told["data"]
    assert (data["pixels"], data["images"], data["tested"]) == (64, 1_337, True)
    source = hashlib.sha256(Path(initializers.__file__).read_bytes()).hexdigest()
    assert told["scheme"] == {
        "spec": "xavier:gain=1.5",
        "provider": "built-in",
        "source_sha256": source,
    }
    assert (told["outcome"], told["updates"]) == ("finished", 28)
    assert told["bit_identical_to_alone"] is True
    assert told["environment"]["facts"]["initflow"] == __version__
    assert "torch" in told["environment"]["packages"]


def test_the_hashes_are_those_of_the_numbers(whole, written):
    """Of the losses' float32 bytes, and of the weights as the tags have them."""
    records, splits = trained(config(init="xavier:gain=1.5", activation="tanh", validation=100))
    (record,) = records
    losses = struct.pack(f"<{len(record.losses)}f", *record.losses)
    hashes = json.loads(written[REPLAY])["sha256"]
    assert hashes == {
        "initial_weights": model.weights_sha256(record.initial.state()),
        "final_weights": model.weights_sha256(record.trained),
        "losses": hashlib.sha256(losses).hexdigest(),
    }
    assert load(written[TRACE])["losses"].tolist() == record.losses
    assert splits.digest == whole.provenance.digest


def test_the_source_of_a_plugin_is_that_of_its_file(tmp_path, monkeypatch):
    """In place and by place; of a notebook's function, its own text."""
    code = "def fill(weight):\n    weight.fill_(0.25)\n"
    home = project(tmp_path / "plugins", "mine", {"mine": "mine:fill"})
    (home / "mine.py").write_text(code)
    digest = hashlib.sha256(code.encode()).hexdigest()
    by_place = f"{home / 'mine.py'}:fill"
    for init in ("mine", by_place):
        assert provenance.source_sha256(find(init, tmp_path / "plugins").signature) == digest

    def fill(weight):
        weight.fill_(0.25)

    scheme = replace(find(by_place), signature=fill)
    own_file = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert provenance.source_sha256(scheme.signature) == own_file
    monkeypatch.setattr(fill, "__module__", "__main__")
    text = "    def fill(weight):\n        weight.fill_(0.25)\n"
    assert provenance.source_sha256(scheme.signature) == hashlib.sha256(text.encode()).hexdigest()
    nowhere = eval("lambda weight: None")  # noqa: S307 - code that stands in no file
    monkeypatch.setattr(nowhere, "__module__", "nowhere")
    assert provenance.source_sha256(nowhere) == "unknown"


def changed(written, *path, to):
    """The content of a replay.json with another value at ``path``; without it where it is ...."""
    values = json.loads(written[REPLAY])
    part = values
    for key in path[:-1]:
        part = part[key]
    if to is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = to
    return json.dumps(values).encode()


def test_a_file_of_an_earlier_version_has_the_settings_that_there_were(written):
    """What came later has the value that all had before there was a choice."""
    values = json.loads(written[REPLAY])
    assert {name: values["config"].pop(name) for name in ADDED} == ADDED
    older = recorded.read(json.dumps(values).encode(), "it")
    assert older == recorded.read(written[REPLAY], "it")


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (["format"], 2, "it: replay.json has the format 2, and this version of initflow reads"),
        (["format"], "1", "it: replay.json: format must be a whole number, not '1'"),
        (["config"], [], "it: replay.json: config must be a table, not 'a list'"),
        (["config", "lr"], ..., "it: replay.json, config lacks 'lr'"),
        (["config", "lr"], 0.1, "it: replay.json, config: lr must be text, not '0.1'"),
        (["config", "lr"], "nan", "it: replay.json, config: lr must be a number above 0"),
        (["config", "hidden"], "9x9999", "it: replay.json, config: hidden must be widths"),
        (["config", "epochs"], "3", "updates must be 42 of a finished training, at most that"),
        (["device"], "cpu; rm", "device must be of the form cpu|cuda"),
        (["threads"], True, "threads must be a whole number, not 'True'"),
        (["threads"], 10**6, "threads must be from 1 to 1024, not '1000000'"),
        (["threads"], 10**400, "threads must be from 1 to 1024, not '1000"),
        (["data", "digest"], "x" * 64, "it: replay.json, data: digest must be of the form"),
        (["data", "images"], 0, "it: replay.json, data: images must be from 1 to"),
        (["data", "tested"], 1, "it: replay.json, data: tested must be true or false, not '1'"),
        (["data", "pixels"], 10**9, "it: replay.json, data: pixels must be from 1 to 1048576"),
        (
            ["scheme", "spec"],
            None,
            "it: replay.json, scheme: spec must be text, not 'nothing'",
        ),
        (["scheme", "spec"], "he\n# hi", "spec must be printable text"),
        (["outcome"], "lost", "outcome must be of the form finished|diverged|pruned, not 'lost'"),
        (["updates"], 29, "updates must be 28 of a finished training"),
        (["updates"], -1, "updates must be from 0 to"),
        (["bit_identical_to_alone"], "true", "must be true or false, not 'true'"),
        (["sha256", "losses"], "A" * 64, "it: replay.json, sha256: losses must be of the form"),
        (["environment"], "mine", "it: replay.json: environment must be a table, not 'mine'"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(written, path, to, said):
    """With the value, and what would be right."""
    with pytest.raises(ReplayError) as error:
        recorded.read(changed(written, *path, to=to), "it")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"{", b"NaN", b'{"format": NaN}', b"[" * 100_000, b"9" * 5_000],
    ids=lambda content: content[:10],
)
def test_what_is_no_table_of_json_is_told(content):
    """Neither deep nor long numbers do harm."""
    with pytest.raises(ReplayError, match=r"it: replay\.json (is no JSON|must hold names)"):
        recorded.read(content, "it")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text()
    | st.sampled_from(["nan", "1e999", "cpu", "digits", "../../etc", "9" * 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@examples_of(max_examples=300)
@given(data=st.data())
def test_no_damage_ends_in_anything_but_our_error(written, data):
    """Any value at any place, any bytes cut, changed or added: a provenance or one line."""
    content = bytearray(written[REPLAY])
    if data.draw(st.booleans()):
        values = json.loads(content)
        part = values
        while True:
            key = data.draw(st.sampled_from(sorted(part)))
            if not (isinstance(part[key], dict) and part[key] and data.draw(st.booleans())):
                break
            part = part[key]
        part[key] = data.draw(JSON)
        content = bytearray(json.dumps(values).encode())
    else:
        begin = data.draw(st.integers(0, len(content)))
        content[begin : begin + data.draw(st.integers(0, 50))] = data.draw(st.binary(max_size=50))
    files = {**written, REPLAY: bytes(content)}
    said, found = "", None
    try:
        found = recorded.gathered(reader(files), "it")
    except ReplayError as error:
        said = str(error)
    assert isinstance(found, provenance.Evidence) != bool(said)
    assert "\n" not in said


def test_it_reads_no_more_than_the_training_can_have_left(written):
    """A loss for every update, and the weights of its widths, twice."""
    asked = {}

    def read(name, limit):
        asked[name] = limit
        return written.get(name)

    recorded.gathered(read, "it")
    weights = 64 * 12 + 12 + 12 * 8 + 8 + 8 * 10 + 10
    spare = 2**20
    assert asked == {REPLAY: 2**22, TRACE: spare + 4 * 28, WEIGHTS: spare + 8 * weights}


def shortened(tensors):
    return {"losses": tensors["losses"][:-1].clone()}


def not_finite(tensors):
    losses = tensors["losses"].clone()
    losses[3] = float("inf")
    return {"losses": losses}


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (TRACE, lambda _: {}, "trace.safetensors must hold losses; 'losses' is missing"),
        (TRACE, shortened, r"trace.safetensors: losses must be F32 (28,), not F32 (27,)"),
        (TRACE, lambda t: {"losses": t["losses"].double()}, "must be F32 (28,), not F64 (28,)"),
        (TRACE, not_finite, "trace.safetensors has a loss that is not finite"),
        (TRACE, lambda t: t | {"more": t["losses"].clone()}, "'more' is missing or too much"),
        (TRACE, lambda t: {"losses": t["losses"] + 1e-6}, "the losses in trace.safetensors have"),
        (
            WEIGHTS,
            lambda t: t | {"final.fc1.bias": t["final.fc1.bias"] + 1e-6},
            "the final weights",
        ),
        (WEIGHTS, lambda t: t | {"initial.fc3.bias": t["initial.fc3.bias"] * 2}, "the initial we"),
        (WEIGHTS, lambda t: t | {"final.fc1.bias": torch.zeros(13)}, "fc1.bias must be F32 (12,)"),
    ],
)
def test_numbers_that_do_not_go_with_the_rest_are_told(written, name, damage, said):
    """Too few, of another kind or shape, or with another hash than stated."""
    files = {**written, name: save(damage(load(written[name])))}
    with pytest.raises(ReplayError) as error:
        recorded.gathered(reader(files), "it")
    assert str(error.value).startswith("it: ")
    assert said in str(error.value)


@examples_of(max_examples=200)
@given(
    name=st.sampled_from([TRACE, WEIGHTS]),
    begin=st.integers(0, 400),
    length=st.integers(0, 100),
    put=st.binary(max_size=100),
)
def test_no_damaged_file_of_numbers_ends_in_anything_but_our_error(
    written, name, begin, length, put
):
    """A header that lies about sizes, kinds or places, or is none."""
    content = written[name][:begin] + put + written[name][begin + length :]
    if content == written[name]:
        return
    with pytest.raises(ReplayError, match=f"^it: .*{name}"):
        recorded.gathered(reader({**written, name: content}), "it")


@pytest.mark.parametrize("name", [REPLAY, TRACE])
def test_a_file_that_is_missing_is_named(written, name):
    """All but the weights, which are not always kept, must be there."""
    files = {key: content for key, content in written.items() if key != name}
    with pytest.raises(ReplayError, match=f"^it has no {name}$"):
        recorded.gathered(reader(files), "it")


def test_a_hash_that_was_changed_is_told(whole):
    """Of each of the three."""
    for own in ("initial", "final", "losses"):
        files = provenance.files(stated(whole, **{own: "0" * 64}))
        with pytest.raises(ReplayError, match=r"replay\.json states 000000000000…: one of the two"):
            recorded.gathered(reader(files), "it")
