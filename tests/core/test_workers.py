"""Where work is carried out: in order and on demand, by processes and nodes that may die."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import spawn

import pytest

import initflow
from initflow.core import capacity, workers
from initflow.core.workers import WorkerLostError, WorkerPool, results, worker_pool
from initflow.errors import DataError, SettingError
from tests.conftest import ROOT

PATIENCE_S = 30
end_to_end = pytest.mark.end_to_end
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="there is no ray")


@pytest.fixture(autouse=True)
def _cold(monkeypatch):
    """They are new processes, as a user's are."""
    monkeypatch.setattr(spawn, "get_executable", lambda: os.fsencode(sys.executable))


# ------------------------------------------------------------------ what the workers are sent


def double(n):
    return 2 * n


def told(name, *_):
    return os.environ.get(name)


def refuse(message):
    raise DataError(message)


class OddError(Exception):
    """Cannot be made again from its ``args``, which pickle does."""

    def __init__(self, *, why):
        super().__init__(f"odd: {why}")


def fail_oddly(why):
    raise OddError(why=why)


def torch_threads(_):
    import torch

    return torch.get_num_threads()


def until(condition):
    """Wait for it, some time."""
    for _ in range(PATIENCE_S * 50):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


def arrive(folder, name, others):
    """Say who carries out ``name``, and wait for each of ``others``."""
    partial = folder / f".{name}"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / name)
    until(lambda: all((folder / other).exists() for other in others))
    return name


def meet(task):
    return arrive(*task)


def die_after(task):
    """Kill the worker, if the task's name is so, once all have arrived."""
    name = arrive(*task)
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def arrive_on_node(task):
    import ray

    folder, name, others = task
    (folder / f"node of {name}").write_text(ray.get_runtime_context().get_node_id())
    return arrive(folder, name, others)


# ------------------------------------------------------------------ helpers


def pids(folder, *names):
    """The workers that have arrived, waited for."""
    until(lambda: all((folder / name).exists() for name in names))
    return [int((folder / name).read_text()) for name in names]


def is_there(pid):
    """Whether it runs; what is dead and not yet buried does not."""
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True
    )
    return bool(found.stdout.strip().strip("Z+sl<N"))


def taken_from(tasks):
    """As ``next_task`` gives them, None at the end."""
    tasks = iter(tasks)
    return lambda: next(tasks, None)


# ------------------------------------------------------------------ results


def test_one_task_is_asked_for_when_the_one_before_is_through():
    """In this process each is asked for, carried out and yielded before the next."""
    events = []

    def next_task():
        events.append("asked")
        return next(tasks, None)

    def work(task):
        events.append(f"work {task}")
        return task.upper()

    tasks = iter("ab")
    with worker_pool("local", 1, None) as pool:
        for task, outcome in results(pool, work, next_task):
            events.append(f"{task} is {outcome}")
    assert events == ["asked", "work a", "a is A", "asked", "work b", "b is B", "asked"]


def test_nothing_is_asked_for_before_the_first_is():
    """And nothing after who consumes the results has stopped."""
    asked = []

    def next_task():
        asked.append(len(asked))
        return asked[-1]

    with worker_pool("local", 1, None) as pool:
        through = results(pool, double, next_task)
        assert asked == []
        assert next(through) == (0, 0)
        through.close()
    assert asked == [0]


def test_as_many_as_the_pool_are_at_hand():
    """The first one through makes room for one more."""
    futures = {}

    def submit(_, task):
        return futures.setdefault(task, Future())

    through = results(WorkerPool(2, 1, submit), double, taken_from("abc"))
    threading.Timer(0.05, lambda: futures["b"].set_result("second")).start()
    assert next(through) == ("b", "second")
    assert list(futures) == ["a", "b"]
    futures["a"].set_result("first")
    assert next(through) == ("a", "first")
    assert list(futures) == ["a", "b", "c"]
    futures["c"].set_result("third")
    assert list(through) == [("c", "third")]


def test_those_through_at_once_come_in_their_order():
    """Results do not depend on a set's order."""
    submitted = []

    def submit(_, task):
        submitted.append(Future())
        if len(submitted) == 8:
            for future in reversed(submitted):
                future.set_result(None)
        return submitted[-1]

    through = results(WorkerPool(8, 1, submit), double, taken_from(range(8)))
    assert [task for task, _ in through] == list(range(8))


def test_none_is_nothing_for_the_moment():
    """While something is at hand it is asked again, after each result."""
    answers = iter(["a", None, "b", None, None])
    with ThreadPoolExecutor(2) as threads:
        pool = WorkerPool(2, 1, threads.submit)
        assert list(results(pool, str.upper, lambda: next(answers))) == [("a", "A"), ("b", "B")]
    assert list(answers) == []


def test_what_becomes_of_a_task_may_make_the_next():
    """The next one is asked for after the last one's result was seen."""
    todo = [1]
    seen = []
    with worker_pool("local", 1, None) as pool:
        for task, outcome in results(pool, double, lambda: todo.pop() if todo else None):
            seen.append((task, outcome))
            if outcome < 10:
                todo.append(outcome)
    assert seen == [(1, 2), (2, 4), (4, 8), (8, 16)]


def test_an_error_of_the_work_is_raised_as_itself():
    """The tasks before it have been yielded."""
    with worker_pool("local", 1, None) as pool:
        through = results(pool, {1: "one"}.__getitem__, taken_from([1, 2]))
        assert next(through) == (1, "one")
        with pytest.raises(KeyError, match="2"):
            next(through)


def test_a_lost_worker_is_a_result():
    """Whether to try again is for the consumer to say."""
    lost = WorkerLostError("gone")

    def work(task):
        if task == "a":
            raise lost
        return task

    with worker_pool("local", 1, None) as pool:
        assert list(results(pool, work, taken_from("ab"))) == [("a", lost), ("b", "b")]


# ------------------------------------------------------------------ this process


def test_one_local_worker_is_this_very_process():
    """It takes what cannot be sent, and Ctrl-C cuts off what it does."""

    def interrupted():
        raise KeyboardInterrupt

    with worker_pool("local", 1, None) as pool:
        assert pool.is_here
        assert pool.submit(threading.current_thread).result() is threading.main_thread()
        with pytest.raises(KeyboardInterrupt):
            pool.submit(interrupted)


def test_its_threads_are_set_for_a_while():
    """None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    for threads, expected in ((3, 3), (None, before)):
        with worker_pool("local", 1, threads) as pool:
            assert pool.submit(torch_threads, None).result() == pool.threads == expected
        assert torch.get_num_threads() == before


def test_another_backend_is_an_error_that_names_those_there_are():
    """At once."""
    with pytest.raises(SettingError, match="backend must be one of local, ray, not 'dask'"):
        worker_pool("dask", 1, None)


# ------------------------------------------------------------------ processes


@pytest.fixture(scope="module")
def pair():
    """Two worker processes that tests share."""
    with worker_pool("local", 2, 1) as pool:
        yield pool


@end_to_end
def test_two_processes_work_at_once(pair, tmp_path):
    """Each waits for the other, neither is this one, and both are put to use again."""
    tasks = [(tmp_path, "a", "ab"), (tmp_path, "b", "ab"), (tmp_path, "c", "")]
    assert {name for _, name in results(pair, meet, taken_from(tasks))} == set("abc")
    a, b, c = pids(tmp_path, "a", "b", "c")
    assert c in {a, b}
    assert len({a, b, os.getpid()}) == 3
    assert not pair.is_here


@end_to_end
def test_an_error_comes_back_as_itself(pair):
    """One that cannot be sent as what it says; the workers go on."""
    with pytest.raises(DataError, match=r"^no images$"):
        list(results(pair, refuse, taken_from(["no images"])))
    with pytest.raises(RuntimeError, match=r"^OddError: odd: so$"):
        list(results(pair, fail_oddly, taken_from(["so"])))
    assert list(results(pair, double, taken_from([21]))) == [(21, 42)]


@end_to_end
def test_what_cannot_be_sent_is_an_error(pair):
    """It breaks nothing, neither as work nor as what becomes of it."""
    with pytest.raises(AttributeError, match="local object"):
        pair.submit(lambda: None)
    with pytest.raises(TypeError, match="cannot pickle"):
        pair.submit(threading.Lock).result()
    assert pair.submit(double, 1).result() == 2


@end_to_end
def test_an_error_brings_its_traceback(pair):
    """As its cause."""
    error = pair.submit(refuse, "no images").exception()
    assert "in refuse" in str(error.__cause__)


@end_to_end
def test_workers_have_their_number_of_threads(pair):
    """PyTorch's, whenever it was imported, and those of its libraries, which wait passively."""
    assert pair.submit(torch_threads, None).result() == 1
    assert pair.submit(told, "OMP_NUM_THREADS").result() == "1"
    assert pair.submit(told, "OMP_WAIT_POLICY").result() == "PASSIVE"


@end_to_end
def test_by_default_workers_share_the_processors(monkeypatch):
    """And are told what this process is, but for its run; here nothing changes."""
    monkeypatch.setattr(capacity, "cpus", lambda: 7)
    monkeypatch.setenv("MLFLOW_RUN_ID", "ours")
    monkeypatch.setenv("INITFLOW_DATA_DIR", "there")
    before = dict(os.environ)
    with worker_pool("local", 2, None) as pool:
        assert pool.submit(told, "OMP_NUM_THREADS").result() == "3"
        assert pool.submit(told, "MLFLOW_RUN_ID").result() is None
        assert pool.submit(told, "INITFLOW_DATA_DIR").result() == "there"
    assert dict(os.environ) == before


@end_to_end
def test_a_killed_process_costs_its_task(tmp_path):
    """It comes back as lost, at once; the others go on, and a new process takes its place."""
    tasks = [(tmp_path, name, ("dies", "lives")) for name in ("lives", "dies")]
    again = [(tmp_path, name, "ab") for name in "ab"]
    with worker_pool("local", 2, 1) as pool:
        outcomes = {task[1]: what for task, what in results(pool, die_after, taken_from(tasks))}
        assert outcomes["lives"] == "lives"
        assert isinstance(outcomes["dies"], WorkerLostError)
        assert str(outcomes["dies"]) == "a worker process ended with exit code -9"
        assert {name for _, name in results(pool, meet, taken_from(again))} == set("ab")
        last = pool.submit(arrive, tmp_path, "c", ())
    assert last.done()  # leaving in peace waits
    for pid in pids(tmp_path, "dies", "lives", "a", "b"):
        with pytest.raises(ProcessLookupError):  # nor is any left unburied
            os.kill(pid, 0)


@end_to_end
def test_the_last_process_started_may_die_too(tmp_path):
    """While the others are at work for long: its loss is told at once."""
    with worker_pool("local", 2, 1) as pool:
        lasts = pool.submit(arrive, tmp_path, "lasts", ("go",))
        pids(tmp_path, "lasts")
        dies = pool.submit(die_after, (tmp_path, "dies", ()))
        assert isinstance(dies.exception(PATIENCE_S), WorkerLostError)
        assert not lasts.done()
        (tmp_path / "go").touch()
        assert lasts.result(PATIENCE_S) == "lasts"


@end_to_end
def test_an_error_ends_the_processes(tmp_path):
    """Whatever they do: nobody waits for them."""

    def fail():
        with worker_pool("local", 2, 1) as pool:
            for name in "ab":
                pool.submit(arrive, tmp_path, name, ("never",))
            pids(tmp_path, "a", "b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for pid in pids(tmp_path, "a", "b"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


WAITS = """
import signal
import sys
from pathlib import Path
from initflow.core.workers import worker_pool, results
from tests.core.test_workers import meet, taken_from

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    folder = Path(sys.argv[1])
    tasks = [(folder, name, ("never",)) for name in "ab"]
    try:
        with worker_pool("local", 2, 1) as pool:
            list(results(pool, meet, taken_from(tasks)))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def waiting(tmp_path):
    """A program whose two workers wait for ever, in a terminal of its own so to say."""
    (tmp_path / "program.py").write_text(WAITS)
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        process.kill()


@end_to_end
def test_ctrl_c_is_heard_once(waiting, tmp_path):
    """By the parent, though the terminal tells all; the workers end without a word."""
    of_workers = pids(tmp_path, "a", "b")
    os.killpg(waiting.pid, signal.SIGINT)
    assert waiting.communicate(timeout=PATIENCE_S) == ("interrupted\n", "")
    assert waiting.returncode == 0
    assert not any(map(is_there, of_workers))


@end_to_end
def test_workers_hear_no_ctrl_c_while_they_start(waiting, tmp_path):
    """Before they can have said that they ignore it."""

    def started():
        command = ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(waiting.pid)]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn" in line]

    def have_arrived():
        for pid in started():
            os.kill(pid, signal.SIGINT)
        assert waiting.poll() is None, waiting.communicate()
        return all((tmp_path / name).exists() for name in "ab")

    until(have_arrived)


@end_to_end
def test_workers_end_with_their_parent(waiting, tmp_path):
    """Even where it could not say a word."""
    of_workers = pids(tmp_path, "a", "b")
    assert all(map(is_there, of_workers))
    waiting.kill()
    until(lambda: not any(map(is_there, of_workers)))


# ------------------------------------------------------------------ Ray


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    """It is an optional package."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(SettingError, match=r"needs the package ray: pip install 'initflow\[ray\]'"),
        worker_pool("ray", 2, None),
    ):
        pass


@with_ray
@pytest.mark.parametrize("noted", [False, True])
def test_a_cluster_that_is_not_there_is_an_error_of_one_line(monkeypatch, tmp_path, noted):
    """With the address that was tried, given or noted by a cluster that is gone; at once."""
    monkeypatch.setattr(workers._ray(), "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    if noted:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    expected = rf"^no Ray cluster at '{address}' \(.*refused\): start one with 'ray start --head'"
    with pytest.raises(SettingError, match=expected), worker_pool("ray", 2, None):
        pass


@with_ray
def test_a_malformed_address_is_an_error_of_one_line(monkeypatch):
    """Ray's own words, with ours."""
    monkeypatch.setattr(workers._ray(), "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with (
        pytest.raises(SettingError, match="'nonsense' \\(Invalid address format: nonsense\\): "),
        worker_pool("ray", 2, None),
    ):
        pass


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one processor each, for all tests of Ray."""
    workers._ray()
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        on_termination = signal.getsignal(signal.SIGTERM)
        nodes = Cluster()
        nodes.add_node(num_cpus=1)
        nodes.add_node(num_cpus=1)
        signal.signal(signal.SIGTERM, on_termination)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster):
    """A pool on it that is connected while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_RUN_ID", "ours")
        patch.setenv("MLFLOW_TRACKING_URI", "there")
        patch.setenv("INITFLOW_DATA_DIR", "here")
        patch.setenv("OTHER", "anything")
        with worker_pool("ray", 2, None) as pool:
            patch.undo()
            yield pool


@end_to_end
@with_ray
def test_two_nodes_work_at_once(nodes, tmp_path):
    """Each waits for the other; SIGTERM means here what it meant."""
    tasks = [(tmp_path, name, "ab") for name in "ab"]
    assert {name for _, name in results(nodes, arrive_on_node, taken_from(tasks))} == set("ab")
    first, second = ((tmp_path / f"node of {name}").read_text() for name in "ab")
    assert first != second
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@end_to_end
@with_ray
def test_an_error_comes_from_a_node_as_itself(nodes):
    """As from a process."""
    with pytest.raises(DataError, match=r"^no images$"):
        list(results(nodes, refuse, taken_from(["no images"])))
    with pytest.raises(RuntimeError, match=r"^OddError: odd: so$"):
        list(results(nodes, fail_oddly, taken_from(["so"])))


@end_to_end
@with_ray
def test_nodes_are_told_where_things_are(nodes):
    """MLflow's settings and ours, but not this process's run; a thread for each task."""
    names = ["MLFLOW_TRACKING_URI", "INITFLOW_DATA_DIR", "MLFLOW_RUN_ID", "OTHER"]
    assert dict(results(nodes, told, taken_from(names))) == {
        "MLFLOW_TRACKING_URI": "there",
        "INITFLOW_DATA_DIR": "here",
        "MLFLOW_RUN_ID": None,
        "OTHER": None,
    }
    assert nodes.submit(torch_threads, None).result() == 1


@end_to_end
@with_ray
def test_another_version_on_a_node_is_an_error(nodes, monkeypatch):
    """That names both, and the node."""
    there = initflow.__version__
    monkeypatch.setattr(initflow, "__version__", "9.9")
    with pytest.raises(SettingError, match=f"^the Ray node .* has initflow {there}, not 9.9 as he"):
        nodes.submit(double, 1).result()


@end_to_end
@with_ray
def test_more_threads_than_a_node_has_are_an_error(nodes):
    """Ray would wait for ever."""
    with pytest.raises(SettingError, match=r"^threads=2 is more than the 1 CPUs"):
        worker_pool("ray", 2, 2).__enter__()


@end_to_end
@with_ray
def test_a_killed_node_costs_its_tasks(cluster, nodes, tmp_path, capfd):
    """The others' results arrive, new tasks are carried out, and Ray is silent."""
    mortal = cluster.add_node(num_cpus=1)
    tasks = [(tmp_path, name, ("go",)) for name in "abc"]
    with worker_pool("ray", 3, None) as pool:
        through = results(pool, arrive_on_node, taken_from(tasks))
        with ThreadPoolExecutor(1) as aside:
            first = aside.submit(next, through)
            pids(tmp_path, *"abc")
            cluster.remove_node(mortal, allow_graceful=False)
            victim, lost = first.result(PATIENCE_S)
        assert isinstance(lost, WorkerLostError)
        assert "\n" not in str(lost)
        assert (tmp_path / f"node of {victim[1]}").read_text() == mortal.node_id
        (tmp_path / "go").touch()
        assert {task[1]: name for task, name in through} == {n: n for n in "abc" if n != victim[1]}
        assert dict(results(pool, double, taken_from([1, 2, 3]))) == {1: 2, 2: 4, 3: 6}
    assert capfd.readouterr() == ("", "")


@end_to_end
@with_ray
def test_a_killed_worker_of_a_node_costs_its_task(nodes, tmp_path, capfd):
    """And no other's."""
    tasks = [(tmp_path, name, ("dies", "lives")) for name in ("dies", "lives")]
    outcomes = {task[1]: outcome for task, outcome in results(nodes, die_after, taken_from(tasks))}
    assert isinstance(outcomes["dies"], WorkerLostError)
    assert outcomes["lives"] == "lives"
    assert capfd.readouterr() == ("", "")


@end_to_end
@with_ray
def test_an_error_ends_the_work_on_nodes(nodes, tmp_path):
    """The connection stays with who made it."""

    def fail():
        with worker_pool("ray", 2, None) as pool:
            for name in "abc":  # one of them waits for a free node
                pool.submit(arrive, tmp_path, name, ("never",))
            until(lambda: len(list(tmp_path.glob("[abc]"))) == 2)  # whose names are whole
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    at_work = [int(file.read_text()) for file in tmp_path.glob("[abc]")]
    until(lambda: not any(map(is_there, at_work)))
    assert nodes.submit(double, 1).result() == 2
