"""What must not get in: hostile specs, metadata, files and studies end in a value or our error.

In bounded memory and time, and never in code run from data.
"""

import ast
import contextlib
import gc
import gzip
import http.server
import importlib.util
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torchvision import datasets as torchvision_sets

from initflow.core.configurations import TrainConfig, TuneConfig
from initflow.core.secrets import without_credentials
from initflow.errors import DataError, InitflowError, SettingError, StudyError
from initflow.experiments.tuning import running, sampler_state, searches, storages, studies
from initflow.initializers import finder, plugins, scheme
from initflow.initializers.finder import INITIALIZERS
from initflow.tracking.mlflow_page import plain
from initflow.training import datasets, idx
from tests import targets
from tests.conftest import ROOT, small_mnist, write_raw
from tests.serving import QuietServer

GROUP = INITIALIZERS.name

SPARE = 2**29  # bytes of address space beyond what the process has
EVERYWHERE = sorted((ROOT / "initflow").rglob("*.py"))


@pytest.fixture(autouse=True)
def _bounded(monkeypatch, tmp_path):
    """A test that takes more memory fails by a MemoryError; nothing reaches the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    storages.forget()
    with _memory(SPARE):
        yield
    storages.forget()


@contextlib.contextmanager
def _memory(spare):
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages, *_ = Path("/proc/self/statm").read_text().split()
    taken = int(pages) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_bound_on_memory_holds():
    """Or the tests here would show nothing."""
    with pytest.raises(MemoryError):
        bytearray(2 * SPARE)


PIECES = [
    b"\0", b"\xff" * 4, b"'", b"9" * 30, b":", b"=", b",", b"\n", b"[" * 99, b"{", b"..", b"~",
    b"/", b"\xe2\x80\xae", b"\x1b[31m", b"%00", b"null", b"-1", b"1e999", b"\xed\xa0\x80",
]  # fmt: skip


@st.composite
def changed(draw, seeds):
    """One of the ``seeds``, at a few places of which something else stands."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.integers(0, 12)))
        content[at:until] = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
    return bytes(content)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_whatever_the_bytes(name):
    """Each target ends in a value or in one of our errors."""
    target, seeds = targets.TARGETS[name]

    @given(st.binary(max_size=400) | changed(seeds()))
    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    def ends_well(content):
        targets.once(target, content)

    for seed in seeds():
        targets.once(target, seed)
    ends_well()


def test_make_fuzz_leaves_no_target_out():
    """The Makefile lists them, as atheris runs one target a process."""
    (named,) = re.findall(r"(?m)^TARGETS := (.*)$", (ROOT / "Makefile").read_text())
    assert named.split() == list(targets.TARGETS)


@pytest.mark.end_to_end
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed")
@pytest.mark.parametrize("name", ["setting"])
def test_some_seconds_of_atheris(name):
    """The harness of `make fuzz` works, and finds nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "-max_total_time=3"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"Done (\d+) runs", done.stderr)[0]) > 1_000


@given(st.sampled_from(sorted(TuneConfig.__dataclass_fields__)), st.data())
@settings(max_examples=300)
@example("inits", SimpleNamespace(draw=lambda _: [1]))
@example("lr", SimpleNamespace(draw=lambda _: 10**400))
@example("data_dir", SimpleNamespace(draw=lambda _: "a\0b"))
def test_a_setting_of_any_type(name, values):
    """From Python too: what is no such value is a SettingError."""
    some = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
        st.lists(st.integers() | st.text(max_size=3), max_size=3),
        st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    )  # fmt: skip
    with contextlib.suppress(SettingError):
        TuneConfig(**{name: values.draw(some)})


@pytest.mark.parametrize(
    "spec",
    [
        "x" * 300 + ".py:f",
        "x/" * 3_000 + "y.py:f",
        "a..b:f",
        "..a:f",
        "tests.no_such:f",
        "os:system",
        "os:system:command=true",
        "builtins:exec",
        "subprocess:run",
        "~nobody/x.py:f",
        ".py:f",
        "/dev/zero.py:f",
        "pathlib:Path",
        "sys:exit",
    ],
)
def test_a_function_by_a_hostile_place(spec):
    """What is no initializer is not called to find that out."""
    with pytest.raises(InitflowError):
        plugins.find(spec)


def test_a_spec_takes_time_in_proportion():
    """A million characters of any kind are taken apart at once."""
    for text in ("a" * 10**6, ":" * 10**6, "a:" + "b=1," * 250_000, "a.py" * 250_000 + ":f:"):
        with contextlib.suppress(InitflowError):
            scheme.parse(text, ["he"])


HEADERS = {
    "gigantic": (2**32 - 1, 2**32 - 1, 2**32 - 1),
    "product that is 0 in 64 bits": (2**31, 2**31, 4),
    "no images": (0, 28, 28),
    "no pixels": (200, 0, 28),
    "one more": (201, 28, 28),
    "one less": (199, 28, 28),
    "wide": (1, 1, 200 * 784),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_not_believed(tmp_path, monkeypatch, name):
    """Nothing more is read of it."""
    raw = write_raw(tmp_path, small_mnist())
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(struct.pack(">I3I", 0x803, *HEADERS[name]) + images.read_bytes()[16:])
    monkeypatch.setattr(idx, "_content", lambda *_: pytest.fail("it was read"))
    with pytest.raises(DataError, match=rf"^data file '{images}' is damaged: "):
        datasets.load(TrainConfig(data_dir=tmp_path))


@pytest.mark.parametrize("kind", [0x9, 0xB, 0xD, 0xE, 0x0, 0xFF])
def test_numbers_of_another_kind_are_refused(tmp_path, kind):
    """Of two, four or eight bytes each, signed or not."""
    raw = write_raw(tmp_path, small_mnist())
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(bytes([0, 0, kind, 1]) + labels.read_bytes()[4:])
    with pytest.raises(DataError, match="not an IDX file of the kind its name says"):
        datasets.load(TrainConfig(data_dir=tmp_path))


def _fifo(path):
    os.mkfifo(path)


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(2**40)


STRANGE = {
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "pipe": _fifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "sparse terabyte": _sparse,
    "out of reach": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    "file",
    [
        "MNIST/raw/train-images-idx3-ubyte",
        "MNIST/raw/t10k-labels-idx1-ubyte",
        "MNIST/raw/train-images-idx3-ubyte.gz",
        "MNIST/raw",
        ".MNIST.lock",
    ],
)
def test_a_strange_thing_where_a_data_file_should_be(tmp_path, kind, file):
    """It is refused, or does not matter; nothing is read without an end."""
    write_raw(tmp_path, small_mnist())
    place = tmp_path / file
    if file == "MNIST/raw":
        place.rename(tmp_path / "away")
    elif place.exists():
        place.unlink()
    if place.suffix == ".gz":
        place.with_suffix("").unlink()  # it is needed
    if place.suffix == ".lock":
        shutil.rmtree(tmp_path / "MNIST")  # it is to be downloaded
    STRANGE[kind](place)
    with pytest.raises(DataError) as caught:
        datasets.load(TrainConfig(data_dir=tmp_path))
    assert "\n" not in str(caught.value)


BOMBS = {  # what the header says, and how many bytes follow
    "more than it says": ((200, 28, 28), 2**26),
    "more than is ever read": ((2**21, 28, 28), 2**26),
    "more than there are labels": ((2**16, 28, 28), 2**16 * 28 * 28),
    "less than it says": ((200, 28, 28), 200),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_packed_bomb_is_not_unpacked(tmp_path, name):
    """Of 64 MB of zeros, 64 KB packed, no more is unpacked than there should be."""
    raw = write_raw(tmp_path, small_mnist(), packed=True)
    shape, size = BOMBS[name]
    with gzip.open(raw / "train-images-idx3-ubyte.gz", "wb") as bomb:
        bomb.write(struct.pack(">I3I", 0x803, *shape))
        for _ in range(0, size, 2**20):
            bomb.write(bytes(min(size, 2**20)))
    assert (raw / "train-images-idx3-ubyte.gz").stat().st_size < 2**20
    before = sorted(tmp_path.rglob("*"))
    with _memory(2**25), pytest.raises(DataError, match=r"train-.*-ubyte\.gz' (is|does)"):
        datasets.load(TrainConfig(data_dir=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nshort",
     b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", b"HTTP/1.1 " + b"2" * 10**5],
    ids=["nothing", "nonsense", "cut", "elsewhere", "endless line"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_server_that_answers_nonsense(tmp_path, monkeypatch, answer):
    """Is told in one line, and leaves nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(answer)

    with QuietServer(Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        mirrors = [f"http://127.0.0.1:{server.server_port}/"]
        monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", mirrors)
        try:
            with pytest.raises(DataError, match="cannot be downloaded") as caught:
                datasets.load(TrainConfig(data_dir=tmp_path / "new"))
        finally:
            server.shutdown()
            thread.join()
    gc.collect()  # torchvision leaves its connection open
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a." * 32_000 + "a = 1",
        "[" + "a." * 32_000 + "a]",
        "x = " + "[" * 30_000,
        "x = 1" + "0" * 60_000,
        f'[project]\nname = "x"\nversion = 0x{"f" * 9_000}\n[project.entry-points."{GROUP}"]',
        f'[project]\nname = "x"\n[project.entry-points."{GROUP}"]\na = 0x{"f" * 9_000}',
    ],
)
@pytest.mark.usefixtures("nothing_shipped")
def test_a_project_that_takes_for_ever_to_parse(tmp_path, text):
    """Is listed with its cause; so is one that is no file of a sane size."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "pyproject.toml").write_text(text)
    (plugin,) = finder.found(tmp_path).values()
    assert plugin.problem
    assert len(plugin.problem) < 1_000


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.usefixtures("nothing_shipped")
def test_a_strange_thing_among_the_plugins(tmp_path, kind):
    """It is passed over, or listed as broken."""
    (tmp_path / "one").mkdir()
    STRANGE[kind](tmp_path / "one" / "pyproject.toml")
    STRANGE[kind](tmp_path / "two")
    assert all(plugin.problem for plugin in finder.found(tmp_path).values())


STORAGES = [
    "sqlite://h:x/a.db",
    "sqlite:///" + "x" * 300,
    "sqlite:////dev/null/a.db",
    "postgresql://user:s3cret/db",
    "postgresql://[::1/db",
    "x" * 300 + "/a.journal",
    "/dev/null/a.journal",
    "redis://localhost",
    "file:///etc/passwd",
    "://",
]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_hostile_storage(storage, monkeypatch, tmp_path):
    """One line, without what may be a password."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storages, "PATIENCE_S", 0)
    storages.is_same_database(storage, "sqlite:///x.db")
    with pytest.raises(InitflowError) as caught, storages.locked(storage, "one"):
        storages.open_storage(storage)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_thing_where_a_journal_should_be(tmp_path, kind):
    """It is refused; nothing is read without an end."""
    STRANGE[kind](tmp_path / "a.journal")
    if kind == "dangling":
        return  # it is made where the link leads
    told = SettingError if kind == "folder" else StudyError
    with pytest.raises(told), storages.locked(str(tmp_path / "a.journal"), "one"):
        storages.open_storage(str(tmp_path / "a.journal"))


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def _study(storage, n):
    search = searches.Search(storage, "one", (0.1, 1.0), (0.5, 1.0), "cmaes", "none", 0, 10, 5)
    study = studies.Study(search, {}, (0.5, 0.9))
    for _ in range(n):
        (asked,) = study.ask(1)
        running.RunningTrials(search, [asked]).finished(asked.number, asked.lr)
    return study


def test_a_planted_pickle_is_not_run(tmp_path):
    """Of the state of a sampler, which Optuna itself would run."""
    file = tmp_path / "run"
    study = _study(str(tmp_path / "a.journal"), 3)
    trial = study._study.ask(searches.distributions(study.search))
    trial.storage.set_trial_system_attr(
        trial._trial_id, "cma:optimizer:0", pickle.dumps(Planted(file)).hex()
    )
    study._study.tell(trial, 0.5)
    with pytest.raises(StudyError, match=r"^what sampler=cmaes learned until trial 3 .* io\.open;"):
        study.ask(1)
    assert not file.exists()
    optuna.samplers.CmaEsSampler()._restore_optimizer(study._all()).close()
    assert file.exists()


def test_what_cma_es_learned_is_read_as_it_was_written(tmp_path):
    """The very numbers that Optuna's own way gives."""
    study = _study(str(tmp_path / "a.journal"), 8)
    kept = [t for t in study._all() if any("optimizer" in key for key in t.system_attrs)]
    assert kept
    theirs = optuna.samplers.CmaEsSampler()._restore_optimizer(kept)
    packed = "".join(v for k, v in kept[-1].system_attrs.items() if "optimizer" in k)
    ours = sampler_state.learned(bytes.fromhex(packed), targets.new_optimizer().__getstate__())
    assert theirs.generation == ours["_g"] == 1
    for name, value in theirs.__getstate__().items():
        assert np.array_equal(ours[name], value), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_n_max_resampling": 10**15}, "_n_max_resampling is 10000"),
        ({"_popsize": 0}, "_popsize is 0"),
        ({"_sigma": float("nan")}, "_sigma is nan"),
        ({"_g": -1}, "_g is -1"),
        ({"_g": 10**30}, "_g is 10000"),
        ({"_mean": np.zeros(10_000)}, "_mean is array"),
        ({"_mean": [0.5, 0.5]}, r"_mean is \[0.5"),
        ({"more": 1}, "another version"),
    ],
)
def test_a_state_that_no_optimizer_has(changes, reason):
    """Its constants are a new one's, its numbers of their kind and finite."""
    optimizer = targets.new_optimizer()
    new = optimizer.__getstate__()
    vars(optimizer).update(changes)
    with pytest.raises(ValueError, match=reason):
        sampler_state.learned(pickle.dumps(optimizer), new)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x80\x04" + b"r\xff\xff\xff\x7f",  # a memo of two thousand million
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",  # bytes of that length
        b"\x80\x04" + b"(" * 90_000,
        b"\x80\x04" + b")" + b"\x85" * 90_000 + b".",
        b"\x80\x04N.",
        b"x" * 200_000,
    ],
)
def test_a_pickle_that_is_a_bomb(packed):
    """Takes no memory, and is no state."""
    with pytest.raises(ValueError, match=r"."):
        sampler_state.learned(packed, targets.new_optimizer().__getstate__())


def _calls(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_is_unpickled_or_run_but_what_is_known():
    """A pickle of our own worker, CIFAR-10's of known checksums, a file that the user names.

    Weights are read by safetensors.
    """
    risky = re.compile(
        r"(.*\.)?(loads?|_?Unpickler|eval|exec|system|popen|\w+_load|read_pickle|__import__)$"
    )
    harmless = {"json.loads", "json.load", "tomllib.loads", "tomllib.load"}
    found = {
        (file.relative_to(ROOT / "initflow").as_posix(), name)
        for file in EVERYWHERE
        for name, _ in _calls(file)
        if risky.match(name) and name not in harmless
    }
    unpickled = {(module, name) for module, name in found if "pickle" in name}
    assert unpickled == {("core/workers.py", "pickle.loads"), ("training/cifar.py", "_Unpickler")}
    assert {(m, n) for m, n in found if n in ("exec", "eval")} == {("core/importing.py", "exec")}
    assert not {(m, n) for m, n in found if n.startswith(("yaml", "os.", "torch.load"))}


def test_servers_listen_on_this_machine_only():
    """The one that is started is told so; nothing else in the package listens."""
    listening = re.compile(r"(.*\.)?(listen|serve_forever|run_server|HTTPServer|start_server)$")
    assert not [name for file in EVERYWHERE for name, _ in _calls(file) if listening.match(name)]
    ui = (ROOT / "initflow" / "tracking" / "ui.py").read_text()
    assert 'HOST, PORT = "127.0.0.1"' in ui
    assert '"--host": HOST' in ui
    started = [
        file.stem for file in EVERYWHERE if re.search(r'"(server|ui|serve)"', file.read_text())
    ]
    assert started == ["ui"]


MARK = "QqSecretqQ"
SHAPES = [
    "http://{}@host:5000/x",
    "http://:{}@host",
    "https://user:{}@host/path?a=1",
    "postgresql+psycopg://user:{}@host:5432/db",
    "postgresql://user:{}@[::1]:5432/db",
    "mysql+pymysql://user:{}@host/db?charset=utf8",
    "postgresql://host/db?user=u&password={}&sslmode=require",
    "postgresql://host/db?PASSWORD={}",
    "postgresql://host/db?p%61ssword={}",
    "https://host/x?api_key={}",
    "https://host/x?access_token={}&x=1",
]
HARD = st.text("aZ0%@:/?#[]!$&'()*+,;=~^|\\\"<>{}-._", max_size=6)


@given(st.sampled_from(SHAPES), HARD, HARD)
@settings(max_examples=400)
@example("http://{}@host:5000/x", "", "/")
@example("http://{}@host:5000/x", "a@", "#?")
def test_no_secret_survives(shape, before, after):
    """Wherever it stands in an address, and whatever is beside it in it."""
    if "={}" in shape:  # there an & ends it
        before, after = before.replace("&", ""), after.replace("&", "")
    address = shape.format(f"{before}{MARK}{after}")
    assert MARK not in storages.shown(address)
    for line in (
        address,
        f"MLflow at '{address}' failed: ({address}), {address}",
        f"two at once: {address},{address} and <{address}>",
    ):
        assert MARK not in without_credentials(line)


@given(st.sampled_from(SHAPES[:6]), st.text(min_size=1, max_size=8))
@settings(max_examples=200)
def test_no_secret_of_any_letters_is_shown(shape, password):
    """In the text of a setting, which is logged as a parameter."""
    with contextlib.suppress(SettingError):
        settings_ = TuneConfig(storage=shape.format(f"{password}{MARK}{password}"))
        assert MARK not in str(settings_.as_text())
        assert MARK not in settings_.command("tune", ("storage",))


@pytest.mark.parametrize(
    "text",
    [
        "MLflow at 'sqlite:////home/me@work/mlflow.db' failed",
        "data file '/home/me@work/MNIST/raw/x' is damaged",
        "no server at http://127.0.0.1:5000/x?y=1",
        "no server at http://[::1]:5000",
        "init must be one of he, xavier, not 'hee'",
    ],
)
def test_what_is_no_secret_stays(text):
    """Paths with an @, addresses without a user."""
    assert without_credentials(text) == text


HOSTILE = [
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "<img src=x onerror=alert(1)>",
    "</script><svg onload=alert(1)>",
    "http://evil.example/x and www.evil.example",
    "# he\n- list\n> quoted\n1. one\n    code",
    "`code` **bold** _it_ ~~no~~ |a|b| @somebody &lt;b&gt; \\*",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_is_escaped(text):
    """Nothing of what marks up is left without a backslash, and no HTML or address."""
    escaped = plain(text)
    assert not re.search(r"[<>@]|://|(?<!\\)[`*\[\]~|]|www\.", escaped.replace("\\\\", ""))
    assert not re.search(r"^(\s*[#+=>-]| {4}|\d+[.)]\s)", escaped, re.MULTILINE)


@pytest.mark.parametrize(
    "text", ["he beats normal:std=0.05 by 4.9 ± 0.3 points", "leaky_relu, 784-100x20-10, 0.5 %"]
)
def test_what_marks_nothing_up_stays(text):
    """As it is read through MLflow's API too."""
    assert plain(text) == text


def test_the_linter_looks_for_what_is_unsafe():
    """All of its rules, S (bandit's) among them; each exception in the package has its reason."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert lint["select"] == ["ALL"]
    assert [rule for rule in lint["ignore"] if re.match(r"S\d", rule)] == ["S101"]
    for pattern, rules in lint["per-file-ignores"].items():
        unsafe = [rule for rule in rules if re.match(r"S(\d|$)", rule)]
        assert not unsafe or pattern.startswith(("tests", "bench")), pattern
    for file in EVERYWHERE:
        for line in file.read_text().splitlines():
            if re.search(r"noqa:.*\bS\d", line):
                assert re.search(r"noqa: [A-Z0-9, ]+ - \w", line), line
