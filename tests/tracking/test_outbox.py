"""What waits: nothing lost, nothing twice, in order, whatever server, disk and process do."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout
from hypothesis import given, settings
from hypothesis import strategies as st

from initflow.errors import OutboxError
from initflow.tracking import outbox
from initflow.tracking.outbox import Entry, Outbox, RefusedError, UnknownKeyError
from initflow.tracking.sender import TRIES, Sender, Way, drained
from tests.cluster import missing, wait

TRACKING = "http://127.0.0.1:5000"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where outboxes lie."""
    place = tmp_path / "outbox"
    monkeypatch.setenv("INITFLOW_OUTBOX", str(place))
    monkeypatch.setattr("initflow.tracking.sender.PAUSES_S", (0.001, 0.01))
    return place


def entries(n, begin=0):
    """Different ones, every second with bytes."""
    return [
        Entry("metrics", f"run {i % 3}", {"i": i}, bytes([i]) * i * (i % 2))
        for i in range(begin, n)
    ]


def box(folder, *kept):
    """A new outbox with these entries."""
    made = Outbox(folder / f"{len(outbox.paths())}.outbox", TRACKING)
    for entry in kept:
        made.add(entry)
    return made


def content(made):
    """All that waits, as it was added."""
    return [
        Entry(e.kind, e.run, e.values, e.content) for e in (made.entry(n) for n in made.waiting)
    ]


class AwayError(Exception):
    """An outage."""


class Server:
    """Takes entries; ``script`` says of each attempt, by turns, what becomes of it."""

    def __init__(self, script=()):
        self.taken, self.script, self.attempts = [], list(script), 0
        self.is_up = threading.Event()
        self.is_up.set()

    def carry_out(self, entry, _):
        self.attempts += 1
        what = self.script.pop(0) if self.script else "taken"
        if what == "away" or not self.is_up.is_set():
            raise AwayError("no answer")
        if what == "refused":
            raise RefusedError("not like this")
        self.taken.append(entry.values["i"])
        if what == "lost":
            raise AwayError("the answer was lost")
        return {f"key {entry.values['i']}": str(len(self.taken))}

    def way(self, **options):
        return Way(TRACKING, self.carry_out, is_away, is_refused, **options)

    def sender(self, **options):
        return Sender(self.way(**options))


def is_away(error):
    return isinstance(error, (AwayError, UnknownKeyError))


def is_refused(error):
    return isinstance(error, RefusedError)


def without_repeats(taken):
    """What was taken, but for what came again at once, which a server takes as one."""
    return [i for at, i in enumerate(taken) if not at or taken[at - 1] != i]


def test_what_is_kept_is_read_back(folder):
    """In order, with its bytes, by another process too; and for its owner's eyes."""
    made = box(folder, *entries(6))
    made.close()
    again = Outbox.reopened(made.path)
    assert content(again) == entries(6)
    assert all(again.entry(n).is_again for n in again.waiting)
    assert (again.tracking, again.size) == (TRACKING, made.size)
    assert made.path.stat().st_mode & 0o077 == 0
    assert made.path.parent.stat().st_mode & 0o077 == 0
    again.close()


def test_what_was_sent_is_gone(folder):
    """An outbox without anything in it, too; what was learned is remembered until then."""
    made = box(folder, *entries(3))
    of_bytes = Path(f"{made.path}.d")
    assert [path.name for path in of_bytes.iterdir()] == ["2"]
    made.sent(1, {"key": "id"})
    made.sent(2, {})
    assert list(of_bytes.iterdir()) == []
    made.close()
    again = Outbox.reopened(made.path)
    assert content(again) == entries(3)[2:]
    assert again.known == {"key": "id"}
    for number in list(again.waiting):
        again.sent(number, {})
    again.close()
    assert list(folder.iterdir()) == []


def test_what_is_held_is_left_alone(folder):
    """By who holds it, and by none else."""
    made = box(folder, *entries(2))
    with pytest.raises(Timeout):
        Outbox.reopened(made.path)
    sent, there = drained(made.path, Server().way())
    assert (sent, there.waiting, there.is_held) == (0, 2, True)
    made.close()
    server = Server()
    assert drained(made.path, server.way()) == (2, None)
    assert server.taken == [0, 1]
    assert drained(made.path, server.way()) == (0, None)  # it is gone


@given(cut=st.integers(0, 400), n=st.integers(1, 4))
@settings(max_examples=60)
def test_a_line_cut_off_at_any_byte_costs_only_itself(tmp_path_factory, cut, n):
    """What was added before it is whole, and there is room for what comes."""
    made = box(tmp_path_factory.mktemp("cut"), *entries(n))
    before = made.path.stat().st_size
    made.add(entries(n + 1)[n])
    made.close()
    os.truncate(made.path, min(made.path.stat().st_size - 1, before + cut))
    again = Outbox.reopened(made.path)
    assert content(again) == entries(n)
    again.add(entries(n + 2)[n + 1])
    again.close()
    last = Outbox.reopened(made.path)
    assert content(last) == [*entries(n), *entries(n + 2)[n + 1 :]]
    last.discard()


DAMAGES = {
    "no JSON": lambda lines: [lines[0], b"{", *lines[2:]],
    "another kind": lambda lines: [lines[0], b"[1]", *lines[2:]],
    "another format": lambda lines: [b'{"format":99,"tracking":"x"}', *lines[1:]],
    "no bytes": lambda lines: [lines[0], lines[1].replace(b'"bytes":0', b'"bytes":"many"')],
    "deep": lambda lines: [lines[0], b'{"entry":' + b"[" * 100_000, *lines[2:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_outbox_is_told(folder, damage):
    """With its path and the line."""
    made = box(folder, *entries(3))
    made.close()
    lines = DAMAGES[damage](made.path.read_bytes().splitlines())
    made.path.write_bytes(b"\n".join(lines) + b"\n")
    at = 1 if damage == "another format" else 2
    for look in (Outbox.reopened, outbox.left):
        with pytest.raises(OutboxError, match=rf"outbox '{made.path}' is damaged at line {at}"):
            look(made.path)
    Outbox(made.path.with_name("other.outbox"), TRACKING).close()  # nothing is held


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_told(folder, kind):
    """And not waited for."""
    path = folder / "x.outbox"
    folder.mkdir()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for look in (Outbox.reopened, outbox.left):
        with pytest.raises(OutboxError, match=rf"outbox '{path}' is no file"):
            look(path)


@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=5) | st.floats(),
                lambda inner: st.dictionaries(
                    st.sampled_from(["entry", "sent", "refused", "known", "bytes", "kind", "run"]),
                    inner,
                ),
            ).map(lambda value: json.dumps(value).encode()),
        )
    )
)
@settings(max_examples=150)
def test_whatever_is_in_the_file_it_is_read_or_told(tmp_path_factory, lines):
    """Never another error."""
    path = tmp_path_factory.mktemp("any") / "x.outbox"
    path.write_bytes(b"\n".join([b'{"format":1,"tracking":"x"}', *lines]) + b"\n")
    with contextlib.suppress(OutboxError):
        Outbox.reopened(path).close()
    Outbox(path.with_name("other.outbox"), TRACKING).discard()


@given(
    script=st.lists(st.sampled_from(["taken", "away", "lost"]), max_size=30), n=st.integers(1, 12)
)
@settings(max_examples=40)
def test_whatever_the_server_does_all_arrives_in_order(script, n):
    """And once, but for what it was told again at once, as the answer to it was lost."""
    server = Server(script)
    sender = server.sender()
    for entry in entries(n):
        sender.send(entry)
    assert sender.flush(20)
    assert without_repeats(server.taken) == list(range(n))
    assert len(server.taken) - n <= script.count("lost")
    assert {f"key {i}" for i in range(n)} <= sender.known.keys()
    wait(lambda: not outbox.paths())
    assert (sender.lost, sender.waiting()) == (0, 0)


@given(script=st.lists(st.sampled_from(["taken", "away", "lost"]), max_size=20))
@settings(max_examples=30)
def test_what_a_process_left_is_sent_by_another(tmp_path_factory, script):
    """In as many attempts as it takes, with what the first one learned."""
    made = box(tmp_path_factory.mktemp("left"), *entries(5))
    made.sent(1, {"key 0": "1"})
    made.close()
    server = Server(script)
    for _ in range(30):
        _, there = drained(made.path, server.way())
        if not there:
            break
        assert there.reason.startswith("AwayError: ")
        assert there.is_away
    assert without_repeats(server.taken) == [1, 2, 3, 4]
    assert not made.path.exists()


def test_while_the_server_is_away_nobody_waits(folder):
    """What comes is on disk at once."""
    server = Server()
    server.is_up.clear()
    sender = server.sender()
    for entry in entries(5):
        sender.send(entry)
    (path,) = outbox.paths()
    there = outbox.left(path)
    assert (there.waiting, there.refused, there.tracking) == (5, 0, TRACKING)
    assert (sender.waiting(), sender.unsaved(), sender.place()) == (5, 0, path)
    assert sender.reason == "AwayError: no answer"
    assert not sender.flush(0.05)
    server.is_up.set()
    assert sender.flush(20)
    assert server.taken == list(range(5))


def test_a_slow_server_is_not_waited_for(monkeypatch):
    """After it was found to be: but for ids, which only it can give."""
    monkeypatch.setattr("initflow.tracking.sender.SLOW_FOR_S", 60)
    release, server = threading.Event(), Server()

    def carry_out(entry, known):
        if entry.values["i"]:
            release.wait(20)
        return server.carry_out(entry, known)

    sender = Sender(Way(TRACKING, carry_out, is_away, is_refused, slow_s=0))
    for entry in entries(4):
        sender.send(entry)  # would wait 20 s
    assert server.taken == [0]
    release.set()
    sender.send(entries(5)[4], needs_id=True)
    assert server.taken == [0, 1, 2, 3, 4]


def test_what_is_refused_holds_up_nothing(folder):
    """It stays, with the reason, and is no one else's error."""
    server = Server(["away", "refused"])
    sender = server.sender()
    for entry in entries(3):
        sender.send(entry)
    assert sender.flush(20)
    assert server.taken == [1, 2]
    (path,) = outbox.paths()
    there = wait(lambda: (left := outbox.left(path)) and not left.waiting and left)
    assert (there.refused, there.refusal) == (1, "RefusedError: not like this")
    sent, there = drained(path, server.way())
    assert (sent, there.waiting, there.refused) == (0, 0, 1)


def test_what_was_refused_is_tried_again_when_it_is_asked(folder):
    """In its place; what could not be made before may be made now."""
    made = box(folder, Entry("create", "waiting", {"i": 0}), *entries(3, begin=1))
    made.close()
    server = Server(["refused"])
    _, there = drained(made.path, server.way())
    assert (server.taken, there.refused, there.waiting) == ([1, 2], 1, 0)
    assert Outbox.reopened(made.path).known == {"waiting": "", "waiting-experiment": ""} | {
        "key 1": "1",
        "key 2": "2",
    }


def test_what_was_refused_has_a_second_chance(folder):
    """By a sync that is asked for: nothing is refused for ever."""
    made = box(folder, *entries(3))
    made.close()
    server = Server(["refused", "refused", "taken"])
    assert drained(made.path, server.way())[1].refused == 2
    assert drained(made.path, server.way())[1].refused == 2
    assert drained(made.path, server.way(), again=True) == (2, None)
    assert server.taken == [2, 0, 1]


def test_what_was_sent_at_its_second_chance_is_refused_no_more(folder):
    """Also where another one still waits, and the outbox is read again."""
    made = box(folder, *entries(3))
    made.close()
    assert drained(made.path, Server(["refused"]).way(), patience_s=60)[1].refused == 1
    made = Outbox.reopened(made.path)
    made.add(entries(4)[3])
    made.ask_again()
    made.sent(1, {})
    made.close()
    again = Outbox.reopened(made.path)
    assert (list(again.waiting), again.refused) == ([4], {})
    again.ask_again()
    again.close()
    there = outbox.left(made.path)
    assert (there.waiting, there.refused) == (1, 0)


def test_what_always_fails_is_set_aside_where_the_server_answers(folder):
    """And holds up nothing: it stays, to be tried again."""

    def carry_out(entry, known):
        if entry.values["i"] == 1:
            raise AwayError("500")
        return server.carry_out(entry, known)

    server = Server(["away"])
    way = Way(TRACKING, carry_out, is_away, is_refused, answers=lambda: True)
    sender = Sender(way)
    for entry in entries(4):
        sender.send(entry)
    assert sender.flush(20)
    assert server.taken == [0, 2, 3]
    (path,) = outbox.paths()
    there = outbox.left(path)
    assert (there.waiting, there.refused, there.refusal) == (0, 1, "AwayError: 500")
    made = box(folder, *entries(4))
    made.close()
    server.taken.clear()
    sent, there = drained(made.path, way)
    assert (sent, server.taken, there.refused) == (3, [0, 2, 3], 1)


def test_a_run_that_is_made_elsewhere_is_waited_for(folder):
    """Only by what belongs to it: the server is not away."""
    made = box(folder, *entries(2))
    made.close()

    def carry_out(*_):
        raise UnknownKeyError("not there yet")

    way = Way(TRACKING, carry_out, is_away, is_refused, answers=lambda: True)
    sent, there = drained(made.path, way)
    assert (sent, there.waiting, there.is_away) == (0, 2, False)
    assert there.reason == "UnknownKeyError: not there yet"


def test_a_server_that_is_back_just_after_a_try_has_refused_nothing(folder, monkeypatch):
    """However often it was tried before: what failed then, goes through now."""
    monkeypatch.setattr("initflow.tracking.sender.PAUSES_S", (0.001, 0.001))
    tries, asked = [], []

    def carry_out(entry, known):
        tries.append(entry)
        if len(tries) <= TRIES + 3:
            raise AwayError("Remote end closed connection without response")
        return {}

    def answers():
        asked.append(len(tries))
        return len(tries) >= TRIES + 3

    sender = Sender(Way(TRACKING, carry_out, is_away, is_refused, answers=answers))
    sender.send(entries(1)[0])
    assert sender.flush(20)
    assert len(tries) == TRIES + 4
    assert asked
    assert not outbox.paths()


def test_it_takes_no_longer_than_it_may(folder):
    """What is left is for the next time."""
    made = box(folder, *entries(3))
    made.close()
    sent, there = drained(made.path, Server().way(), patience_s=0)
    assert (sent, there.waiting) == (0, 3)


def test_what_was_tried_once_may_have_been_taken(folder, monkeypatch):
    """Also what waits in memory, as there is no disk."""
    monkeypatch.setattr(outbox, "LIMIT", 0)
    seen = []

    def carry_out(entry, _):
        seen.append(entry.is_again)
        if len(seen) < 4:
            raise AwayError
        return {}

    sender = Sender(Way(TRACKING, carry_out, is_away, is_refused))
    sender.send(entries(1)[0])
    assert sender.flush(20)
    assert seen == [False, True, True, True]


@pytest.mark.parametrize("room", range(0, 130, 7))
def test_a_disk_that_is_full_at_any_byte_spoils_no_line(folder, room):
    """The system may take a part of what is written, and say nothing."""
    made = box(folder, *entries(2))
    size = made.path.stat().st_size
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, size + room))
            with contextlib.suppress(OSError):
                made.add(Entry("metrics", "run", {"i": 2, "text": "x" * 60}))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    lines = made.path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    assert len(lines) == 3 + (len(lines[-1]) <= room and len(lines) > 3)
    assert outbox.left(made.path).waiting == len(lines) - 1


def test_what_is_refused_at_once_is_the_callers_error():
    """Where nothing waits before it."""
    with pytest.raises(RefusedError):
        Server(["refused"]).sender().send(entries(1)[0])
    assert outbox.paths() == []


def test_bytes_that_were_changed_are_not_sent(folder):
    """Nor those that are gone: the entry is refused."""
    made = box(folder, *entries(6))
    made.close()
    Path(f"{made.path}.d", "2").write_bytes(b"else")
    Path(f"{made.path}.d", "4").unlink()
    server = Server()
    sent, there = drained(made.path, server.way())
    assert (sent, there.refused) == (4, 2)
    assert server.taken == [0, 2, 4, 5]


def test_it_is_bounded(monkeypatch):
    """Then memory takes some, and the rest is counted as lost, with the reason."""
    monkeypatch.setattr(outbox, "LIMIT", 1_000)
    monkeypatch.setattr("initflow.tracking.sender.IN_MEMORY", 2_000)
    server = Server()
    server.is_up.clear()
    sender = server.sender()
    large = [Entry("file", "run", {"i": i}, b"x" * 600) for i in range(6)]
    for entry in large:
        sender.send(entry)
    assert (sender.waiting() - sender.unsaved(), sender.unsaved(), sender.lost) == (1, 3, 2)
    assert "it holds 1,000 bytes, the most that it may" in sender.reason
    server.is_up.set()
    assert sender.flush(20)
    assert server.taken == [0, 1, 2, 3]


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_nothing_that_memory_has_room_for(folder, monkeypatch):
    """When there is room again, all of it comes to disk, in its order."""
    server = Server()
    server.is_up.clear()
    sender = server.sender()
    sender.send(entries(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        for entry in entries(4, begin=1):
            sender.send(entry)
        assert "No space left on device" in sender.reason
        (path,) = outbox.paths()
        assert outbox.left(path).waiting == 1
        assert (sender.waiting(), sender.unsaved()) == (4, 3)
    sender.send(entries(5)[4])
    assert sender.unsaved() == 0
    assert outbox.left(path).waiting == 5
    server.is_up.set()
    assert sender.flush(20)
    assert server.taken == list(range(5))


@pytest.fixture
def tiny_disk(tmp_path):
    """A real one, of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        missing("right to mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.end_to_end
def test_on_a_disk_that_is_really_full(tiny_disk, monkeypatch):
    """Whatever byte it ends at, the file is whole, and nothing is lost."""
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tiny_disk / "outbox"))
    server = Server()
    server.is_up.clear()
    sender = server.sender()
    for i in range(120):
        sender.send(Entry("file", "run", {"i": i}, b"x" * 701))
    assert "No space left on device" in sender.reason
    (path,) = outbox.paths()
    on_disk = outbox.left(path).waiting
    assert 0 < on_disk < 120
    assert path.read_bytes().endswith(b"\n")
    assert (sender.waiting(), sender.unsaved(), sender.lost) == (120, 120 - on_disk, 0)
    server.is_up.set()
    assert sender.flush(20)
    assert server.taken == list(range(120))
    wait(lambda: not list((tiny_disk / "outbox").iterdir()))


def test_two_senders_have_two_outboxes(folder):
    """As two processes have."""
    first, second = Server(), Server()
    for server in (first, second):
        server.is_up.clear()
        server.sender().send(entries(1)[0])
        time.sleep(0.001)
    assert len(outbox.paths()) == 2
    for server in (first, second):
        server.is_up.set()
    wait(lambda: not outbox.paths())
