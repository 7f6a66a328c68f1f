"""SIGKILL at fifty random moments: every file of ours is whole, or absent, and nothing is lost."""

import hashlib
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from torchvision import datasets as torchvision_sets

from initflow.experiments.replay import bundle
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.running import RunningTrials
from initflow.experiments.tuning.searches import Search
from initflow.experiments.tuning.studies import Study
from initflow.tracking import delivery
from initflow.tracking.outbox import Entry, Outbox
from initflow.training import datasets
from tests.conftest import small_mnist, write_raw

KILLS = 50
LONGEST_S = 0.2  # of a life
MNIST = small_mnist(side=8)
SETTINGS = {"dataset": "digits"}


def entry(i):
    return Entry("file", "run", {"i": i}, bytes([i % 251]) * (i % 7) * 1_000)


def report(i):
    return f"<html>{i}{'.' * 20_000}{i}</html>".encode()


def files(i):
    return {"README.md": f"{i}".encode() * 1_000, "replay.json": json.dumps({"i": i}).encode()}


def arrive(root, *, download):
    """As torchvision downloads: one file after the other."""
    assert download
    write_raw(Path(root), MNIST)


class Place:
    """Where a life writes: each kind of file, over and over, each time told when it is there."""

    def __init__(self, folder):
        self.folder = folder
        self.outbox = folder / "a.outbox"
        self.artifacts = folder / "run" / "artifacts"
        self.search = Search(
            str(folder / "a.journal"),
            "kills",
            (0.001, 1.0),
            (0.5, 1.0),
            "random",
            "none",
            0,
            40,
            10,
        )

    def study(self):
        return Study(self.search, SETTINGS, (0.1, 0.96))

    def live(self, begin, tell):
        """Never ends by itself."""
        box = (
            Outbox.reopened(self.outbox)
            if self.outbox.exists()
            else Outbox(self.outbox, "http://127.0.0.1:5000")
        )
        study = self.study()
        study.recover()
        for i in itertools.count(begin):
            box.add(entry(i))
            tell("outbox", i)
            datasets._download("mnist", self.folder / f"data {i}")
            tell("data", i)
            bundle.write(self.folder / f"bundle {i}", files(i))
            tell("bundle", i)
            delivery._file(
                Client, Entry("file", str(self.artifacts), {"name": "r.html"}, report(i))
            )
            tell("report", i)
            (asked,) = study.ask(1)
            trying = RunningTrials(self.search, [asked])
            trying.report(asked.number, 10, i / 10_000_000)
            trying.finished(asked.number, i / 10_000_000)
            tell("trial", i)


class Client:
    """As much of MLflow's as a store in a folder needs."""

    tracking_uri = "sqlite:///none"


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch):
    """A run's id is the folder of its files; data sets come from nowhere."""
    monkeypatch.setattr(delivery, "_artifact_root", lambda _, run: run)
    monkeypatch.setattr(torchvision_sets, "MNIST", arrive)
    storages.forget()
    yield
    storages.forget()


def killed(place, begin, after_s):
    """A life from ``begin`` on, cut off; what it told of."""
    listening, telling = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(listening)
            storages.forget()

            def tell(what, i):
                os.write(telling, f"{what} {i}\n".encode())

            os.write(telling, b"ready 0\n")
            place.live(begin, tell)
        finally:
            os._exit(1)  # only by an error
    os.close(telling)
    with os.fdopen(listening, "rb") as told:
        first = told.readline()
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        lines = [first, *told.read().splitlines()]
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it died of an error"
    found = {}
    for line in lines:
        what, _, i = line.decode().strip().partition(" ")
        found.setdefault(what, []).append(int(i))
    return found


def test_killed_at_fifty_moments_every_file_is_whole(tmp_path):
    """What was told to be there is there, with all its bytes; half of anything is nowhere."""
    place, moments = Place(tmp_path), random.Random(0)  # noqa: S311 - of when to kill
    told = {"outbox": [], "data": [], "bundle": [], "report": [], "trial": []}
    begin, seen, sound = 0, set(), set()
    for _ in range(KILLS):
        found = killed(place, begin, moments.uniform(0, LONGEST_S))
        for what in told:
            told[what] += found.get(what, [])
        begin += 100_000
        _check(place, told, sound)
        seen |= {what for what, numbers in found.items() if numbers}
    _check(place, told, set())  # no life has harmed what an earlier one left
    assert seen == {*told, "ready"}
    assert len(told["trial"]) > 10  # they did live


def _check(place, told, sound):
    """That all of it is whole, but for the folders that are known to be ``sound``, which grow."""
    if place.outbox.exists():
        box = Outbox.reopened(place.outbox)
        kept = [box.entry(number) for number in box.waiting]
        box.close()
        numbers = [e.values["i"] for e in kept]
        assert numbers == sorted(numbers)
        assert set(told["outbox"]) <= set(numbers)
        assert all(e.content == entry(e.values["i"]).content for e in kept)
    arrived = {int(p.name.split()[1]): p for p in place.folder.iterdir() if p.name[:5] == "data "}
    whole = {i: p for i, p in arrived.items() if (p / "MNIST" / "raw").exists()}
    assert set(told["data"]) <= whole.keys()
    for folder in set(whole.values()) - sound:
        raw = folder / "MNIST" / "raw"
        assert {file.name: file.read_bytes() for file in raw.iterdir()} == MNIST
    bundles = {int(p.name.split()[1]): p for p in place.folder.iterdir() if p.name[:7] == "bundle "}
    assert set(told["bundle"]) <= bundles.keys()
    for i, folder in bundles.items():
        if folder in sound:
            continue
        digests = json.loads((folder / bundle.MANIFEST).read_bytes())["files"]
        assert digests.keys() == files(i).keys()
        for name, content in files(i).items():
            assert (folder / name).read_bytes() == content
            assert digests[name] == hashlib.sha256(content).hexdigest()
    sound |= {*whole.values(), *bundles.values()}
    written = place.artifacts / "r.html"
    if written.exists():
        content = written.read_bytes()
        assert content == report(int(content[6:].partition(b".")[0]))
    assert written.exists() >= bool(told["report"])
    storages.forget()
    accuracies = {trial.accuracy for trial in place.study().trials()}
    storages.forget()
    assert {i / 10_000_000 for i in told["trial"]} <= accuracies
