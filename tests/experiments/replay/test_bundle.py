"""The folder that holds a network's evidence: whole or absent; tampering is told apart."""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st
from safetensors.torch import load, save

from initflow.errors import ReplayError, SettingError
from initflow.experiments.replay import bundle, provenance
from initflow.experiments.replay.bundle import MANIFEST, README, REPORT
from initflow.experiments.replay.provenance import REPLAY, TRACE, UNCOMMITTED, WEIGHTS
from tests.replaying import config, evidence, stated

HISTORY = {"accuracy/test": [(0, 0.1), (30, 0.87654)], "loss/test": [(0, 2.3), (30, 0.4)]}


@pytest.fixture(scope="module")
def kept():
    return evidence(config())


@pytest.fixture(scope="module")
def files(kept):
    """Those of a bundle, with what was not committed."""
    pages = bundle.pages(kept, HISTORY, "0" * 32)
    return {**provenance.files(kept), **pages, UNCOMMITTED: b"diff --git a/x b/x\n"}


@pytest.fixture
def folder(tmp_path, files):
    bundle.write(tmp_path / "it", files)
    return tmp_path / "it"


def restated(folder, *names):
    """Make the manifest match what is there now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in names or manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_it_is_read_as_it_was_written(folder, kept):
    """With files of fixed names, each of them in the manifest."""
    found = bundle.opened(folder)
    assert found.provenance == kept.provenance
    assert torch.equal(found.losses, kept.losses)
    assert {file.name for file in folder.iterdir()} == {*bundle.FILES, MANIFEST}
    assert os.listdir(folder.parent) == ["it"]  # noqa: PTH208 - hidden ones too


def test_weights_and_a_diff_may_be_missing(tmp_path):
    """Where they were not kept, or there was none."""
    kept = evidence(config(log_model=False))
    bundle.write(tmp_path / "deep" / "in", provenance.files(kept))
    found = bundle.opened(tmp_path / "deep" / "in")
    assert (found.initial, found.final) == (None, None)


def test_what_is_there_is_never_written_over(tmp_path, folder, kept, files):
    """An empty folder is filled; a full one, a file or a link is left as it is."""
    (tmp_path / "empty").mkdir()
    bundle.write(tmp_path / "empty", files)
    assert bundle.opened(tmp_path / "empty").provenance == kept.provenance
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (folder, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(SettingError, match=f"^to must be a folder .*, not '{taken}'$"):
            bundle.write(taken, files)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(SettingError, match=f"'{tmp_path}/file/in' cannot be written"):
        bundle.write(tmp_path / "file" / "in", files)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", range(6))
def test_a_bundle_is_whole_or_absent(tmp_path, kept, monkeypatch, at, error):
    """Wherever writing fails or is interrupted; nothing else is left of it."""
    flushed = 0

    def fail(_):
        nonlocal flushed
        flushed += 1
        if flushed > at:
            raise error

    monkeypatch.setattr(os, "fsync", fail)
    files = provenance.files(kept)
    folders = at - len(files) - 1  # that were flushed, after the files and the manifest
    fails = folders < 0 or error is KeyboardInterrupt  # not every system flushes a folder
    said = pytest.raises(SettingError, match=f"'{tmp_path}/it' cannot be written: No space left on")
    if error is KeyboardInterrupt:
        said = pytest.raises(KeyboardInterrupt)
    with said if fails else contextlib.nullcontext():
        bundle.write(tmp_path / "it", files)
    there = folders > 0 or not fails
    assert os.listdir(tmp_path) == (["it"] if there else [])  # noqa: PTH208 - hidden ones too
    if there:
        assert bundle.opened(tmp_path / "it").provenance == kept.provenance


def weight(folder):
    tensors = load((folder / WEIGHTS).read_bytes())
    tensors["final.fc1.weight"] = tensors["final.fc1.weight"].clone()
    tensors["final.fc1.weight"][3, 5] += 1e-6
    (folder / WEIGHTS).write_bytes(save(tensors))
    return WEIGHTS


def parameter(folder):
    text = (folder / REPLAY).read_text()
    (folder / REPLAY).write_text(text.replace('"lr": "0.1"', '"lr": "0.2"'))
    return REPLAY


def digest(folder):
    values = json.loads((folder / REPLAY).read_text())
    values["sha256"]["final_weights"] = "0" * 64
    (folder / REPLAY).write_text(json.dumps(values))
    return REPLAY


def loss(folder):
    (folder / TRACE).write_bytes(
        save({"losses": load((folder / TRACE).read_bytes())["losses"] + 1})
    )
    return TRACE


def missing(folder):
    (folder / TRACE).unlink()
    return TRACE


def words(folder):
    (folder / REPORT).write_text((folder / REPORT).read_text() + "<p>trust me</p>")
    return REPORT


@pytest.mark.parametrize("tamper", [weight, parameter, digest, loss, missing, words])
def test_what_was_changed_is_named(folder, tamper):
    """Each file by itself."""
    name = tamper(folder)
    what = "is missing, though" if tamper is missing else "was changed: it has the SHA-256"
    with pytest.raises(ReplayError, match=rf"^'{folder}': {name} {what}"):
        bundle.opened(folder)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (weight, "the final weights in weights.safetensors have the SHA-256"),
        (digest, "the final weights in weights.safetensors have the SHA-256"),
        (loss, "the losses in trace.safetensors have the SHA-256"),
    ],
)
def test_a_manifest_that_was_made_to_match_hides_nothing(folder, tamper, said):
    """What does not go together is told; what does is found by the replay."""
    tamper(folder)
    restated(folder)
    with pytest.raises(ReplayError, match=rf"^'{folder}': {re.escape(said)} .* one of the two"):
        bundle.opened(folder)


def link(folder):
    (folder / TRACE).rename(folder / "elsewhere")
    (folder / TRACE).symlink_to(folder / "elsewhere")


def pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def large(folder):
    with (folder / TRACE).open("ab") as file:
        file.truncate(2**40)  # a sparse one, of a size that no memory holds


def unlisted(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][WEIGHTS]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def listing(**files):
    def write(folder):
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (link, "trace.safetensors is a link, and nothing is read through one"),
        (pipe, "weights.safetensors is no plain file"),
        (large, "trace.safetensors is larger than the 1,048,696 bytes it may have"),
        (unlisted, "weights.safetensors is not in manifest.json"),
        (listing(**{"../../x": "0" * 64}), "manifest.json lists '../../x', no file of its"),
        (listing(**{REPLAY: 5}), "manifest.json lists 'replay.json', no file of its"),
        (listing(**{REPLAY: "0"}), "manifest.json has no SHA-256 of replay.json"),
        (listing(), "replay.json is not in manifest.json"),
        (lambda f: (f / MANIFEST).write_text("[" * 9_999), "manifest.json is no JSON"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json must have format 1 and list"),
        (lambda f: (f / MANIFEST).write_bytes(b" " * 70_000), "manifest.json is larger than"),
        (lambda f: (f / MANIFEST).unlink(), "was not written by initflow export"),
    ],
)
def test_a_folder_that_lies_is_refused(folder, damage, said):
    """Nothing in it is a path, and no file is read further than its training can have left."""
    damage(folder)
    with pytest.raises(ReplayError) as error:
        bundle.opened(folder)
    assert str(error.value).startswith(f"'{folder}'")
    assert said in str(error.value)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    """By its name."""
    with pytest.raises(ReplayError, match=f"^there is no folder '{tmp_path}/it'$"):
        bundle.opened(tmp_path / "it")


@examples_of(max_examples=100)
@given(
    content=st.binary(max_size=200) | st.text().map(str.encode), name=st.sampled_from(bundle.FILES)
)
def test_no_content_ends_in_anything_but_our_error(folder, content, name):
    """Also where the manifest matches: any bytes in any file."""
    before = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        restated(folder)
        if name in (REPLAY, TRACE, WEIGHTS):
            with pytest.raises(ReplayError):
                bundle.opened(folder)
        else:
            bundle.opened(folder)
    finally:
        (folder / name).write_bytes(before)


def test_the_pages_tell_what_it_is_and_how_to_have_it_again(folder, kept):
    """Accuracy, hashes, settings and environment; the commands are those that give it again."""
    report, readme = (folder / REPORT).read_text(), (folder / README).read_text()
    for text in (report, readme):
        assert "87.65%" in text
        assert "initflow train --init he --dataset digits --hidden 12,8" in text
        assert "mlflow run . --env-manager local -P init=he" in text
        assert "initflow verify ." in text
    for told in (kept.provenance.final, kept.provenance.digest, "eval_every", "cpu_capability"):
        assert told in report
    assert not re.search(r"""(src|href)=["']?https?:""", report)
    for name in (*bundle.FILES, MANIFEST):
        assert f"`{name}`" in readme or name == README


def test_the_pages_of_a_hostile_bundle_hold_no_markup(kept):
    """Names stand there as text."""
    evil = "x.py:f:<img src=x onerror=alert(1)>](javascript:alert(1))\n# hi"
    hostile = stated(
        kept,
        spec=evil,
        provider=evil,
        config=replace(kept.provenance.config, init=evil),
        environment={"facts": {evil: evil}, "variables": [], "packages": {"a": None}},
    )
    pages = bundle.pages(hostile, {}, evil)
    assert b"<img src=x" not in pages[REPORT]
    assert b"&lt;img src=x" in pages[REPORT]
    lines = pages[README].decode().splitlines()
    assert all(
        line.startswith("    ") for line in lines if "onerror" in line or "javascript" in line
    )
    assert "# hi" not in lines
