"""How much of the machine may be used: by its processors, and by what a container leaves."""

import math
import os

import pytest

from initflow.core import capacity


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One of eight processors and 1 GiB, whose control groups are files of the test."""
    monkeypatch.setattr(capacity, "GROUPS", tmp_path)
    monkeypatch.setattr(capacity, "OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    pages = {"SC_PHYS_PAGES": 2**18, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__, raising=False)
    return tmp_path


def limit(machine, own, **files):
    """The process in the group ``own``, and the contents of files, with _ for the folders' /."""
    (machine / "cgroup").write_text(f"1:name=systemd:/elsewhere\n0::/{own}\n")
    for name, content in files.items():
        *folders, file = name.split("__")
        place = machine.joinpath(*folders, file.replace("_", "."))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)


def test_processors_are_those_that_it_may_run_on(machine, monkeypatch):
    """All of the machine's where that is not known."""
    assert capacity.cpus() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    assert capacity.cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert capacity.cpus() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert capacity.cpus() == 1


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {"cpu_max": "max 100000"}, 8),
        ("", {"cpu_max": "250000 100000"}, 2),
        ("", {"cpu_max": "50000 100000"}, 1),  # there is always one
        ("", {"cpu_max": "9900000 100000"}, 8),
        ("a/b", {"a__b__cpu_max": "300000 100000", "a__cpu_max": "max 100000"}, 3),
        ("a/b", {"a__b__cpu_max": "max 100000", "a__cpu_max": "400000 100000"}, 4),
        ("a/b", {"c__cpu_max": "100000 100000"}, 8),  # of another group
    ],
)
def test_a_container_may_use_fewer_at_once(machine, own, files, expected):
    """The least that its group and those above leave, in whole ones."""
    limit(machine, own, **files)
    assert capacity.cpus() == expected


def test_memory_is_the_machines_or_what_a_container_may_use(machine, monkeypatch):
    """Infinite where it is not known."""
    assert capacity.memory() == 2**30
    limit(machine, "a", memory_max="max", a__memory_max=f"{2**20}")
    assert capacity.memory() == 2**20
    limit(machine, "a", a__memory_max="max")
    monkeypatch.delattr(os, "sysconf")
    assert capacity.memory() == math.inf
