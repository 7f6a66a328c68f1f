"""What a run's numbers depend on: all of it, cheaply, and without a secret."""

import contextlib
import hashlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import initflow
from initflow.core import environment, machine, repository, secrets
from initflow.core.environment import VARIABLES, Change, Environment
from tests.conftest import ROOT

PASSWORD = "hunter2-planted"  # noqa: S105 - it opens nothing
CACHED = (
    *(environment._cpu, environment._cpuinfo, environment._packages, environment.source_sha256),
    repository._of,
)
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def forget():
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def afresh():
    """Nothing is known from before, nor to what comes after."""
    forget()
    yield
    forget()


def git(*arguments):
    who = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch, afresh):
    """A working folder with one commit, that nobody's configuration reaches."""
    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    git("init")
    (folder / "code.py").write_text("one\n")
    git("add", ".")
    git("commit", "--message", "first")
    return folder


def facts(device="cpu"):
    return environment.current(device).facts


def git_facts():
    """As a new process would find them."""
    repository._of.cache_clear()
    found = facts()
    return found["git_commit"], found["git_tree"]


def test_facts_are_what_torch_and_python_say():
    """In the order in which a difference is worth naming."""
    with machine.threads(2):
        found = facts()
    assert all(isinstance(value, str) and value for value in found.values())
    assert list(found)[:3] == ["initflow", "source_sha256", "torch"]
    assert list(found)[-2:] == ["git_commit", "git_tree"]
    expected = {
        "initflow": initflow.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": "2",
        "interop_threads": str(torch.get_num_interop_threads()),
        "python": platform.python_version(),
    }
    assert expected.items() <= found.items()
    assert torch.version.git_version in found["torch_build"]
    assert found["cpu"].startswith(environment.processor())
    assert "gpu" not in found


def test_libraries_are_read_from_what_torch_says_of_its_build(monkeypatch):
    """With MKL, without it, and without a word of either."""
    show = torch.__config__.show
    build = environment._build.__wrapped__
    told = (
        "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605 for\n"
        "  - Intel(R) MKL-DNN v3.7.1 (Git Hash 8d26)\n"
        "  - CPU capability usage: AVX512\n  - Build settings: BLAS_INFO=mkl, LAPACK_INFO=mkl, \n"
    )
    cases = {
        told: ("MKL 2024.2-Product", "mkl", "3.7.1"),
        "  - Build settings: BLAS_INFO=open, LAPACK_INFO=open, \n": ("open", "open", "none"),
        "": ("unknown", "unknown", "none"),
    }
    builds = set()
    for text, expected in cases.items():
        monkeypatch.setattr(torch.__config__, "show", lambda text=text: text)
        found = build()
        assert (found["blas"], found["lapack"], found["onednn"]) == expected
        builds.add(found["torch_build"])
    assert len(builds) == len(cases)
    monkeypatch.setattr(torch.__config__, "show", lambda: told.replace("AVX512", "AVX2"))
    assert build()["torch_build"] in builds  # the same build, on another machine
    monkeypatch.setattr(torch.__config__, "show", show)
    assert build() == environment._build()


on, off = True, False
CHANGES = {
    "threads": lambda: machine.threads(torch.get_num_threads() + 1),
    "default_dtype": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, on, off),
    "flush_denormal": lambda: changed(torch.set_flush_denormal, on, off),
    "onednn_enabled": lambda: changed(torch._C._set_mkldnn_enabled, off, on),
    "onednn_float32": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
}


@contextlib.contextmanager
def changed(setter, value, back):
    setter(value)
    try:
        yield
    finally:
        setter(back)


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_bits_changes_its_fact_and_no_other(name):
    """At once, and back again."""
    before = facts()
    with CHANGES[name]():
        during = facts()
    assert {key for key in before if before[key] != during[key]} == {name}
    assert facts() == before


def test_deterministic_algorithms_may_only_warn():
    """Which changes bits where there is no deterministic one."""
    with changed(torch.use_deterministic_algorithms, on, off):
        assert facts()["deterministic"] == "on"
        torch.use_deterministic_algorithms(on, warn_only=True)
        assert facts()["deterministic"] == "warn only"
    assert facts()["deterministic"] == "off"


@pytest.mark.needs("torch>=2.9")
def test_old_and_new_settings_of_precision_may_be_mixed():
    """After which PyTorch raises when it is asked the old way."""
    before = facts()
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert facts()["onednn_float32"] == "matmul tf32, conv ieee"
        assert environment._settings("cuda:0")["cuda_float32"].startswith("matmul tf32")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert facts() == before


def test_cuda_settings_are_told_of_a_cuda_device():
    """They change nothing on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True):
        found = environment._settings("cuda:0")
    assert found.keys() - environment._settings("cpu").keys() == {
        "cuda_float32",
        "cudnn_enabled",
        "cudnn_deterministic",
        "cudnn_benchmark",
    }
    assert found["cudnn_benchmark"] == found["cudnn_deterministic"] == "true"
    assert environment._settings("cuda:0")["cudnn_benchmark"] == "false"


def test_a_gpu_is_described_by_what_its_kernels_depend_on(monkeypatch):
    """And by its driver, where Linux tells of it."""

    class Properties:
        name, major, minor, multi_processor_count = "H100", 9, 0, 132

    told = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar\nGCC version: 12\n"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  610.43  Release Build\n"
    described = "H100, compute capability 9.0, 132 multiprocessors"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)
    for text, driver in ((told, "550.54.15"), (opened, "610.43"), ("", "unknown")):
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        found = environment._gpu.__wrapped__("cuda:1")
        assert found == {"gpu": described, "gpu_driver": driver, "cudnn": "92600"}


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_driver():
    """And with cuDNN's version."""
    found = facts("cuda:0")
    assert found["gpu"].startswith(torch.cuda.get_device_name(0))
    assert found["cudnn"] == str(torch.backends.cudnn.version())
    assert found["gpu_driver"][0].isdigit()


def test_a_later_look_takes_less_than_a_millisecond():
    """It is taken for every network of a comparison."""
    environment.current("cpu")
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        environment.current("cpu")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.001


def test_the_processor_has_a_name_on_other_systems_too(monkeypatch, afresh):
    """Where there is no /proc, or it names none."""

    def absent(_):
        raise FileNotFoundError

    expected = platform.processor() or platform.machine()
    for read in (absent, lambda _: "CPU implementer\t: 0x41\nFeatures : fp asimd sve2\n\nx : y\n"):
        forget()
        monkeypatch.setattr(Path, "read_text", read)
        assert environment.processor() == expected
    arm = {"cpu": f"{expected}, CPU implementer 0x41", "cpu_instructions": "asimd sve2"}
    assert environment._cpu() == arm


def test_source_is_told_apart_by_any_change_of_any_module(
    tmp_path, monkeypatch, nothing_shipped, afresh
):
    """Of its text, its name, or where one ends and the next begins."""
    digests = []

    def look():
        environment.source_sha256.cache_clear()
        digests.append(environment.source_sha256())

    monkeypatch.setattr(initflow, "__file__", str(tmp_path / "__init__.py"))
    one, two = tmp_path / "a.py", tmp_path / "room" / "b.py"
    two.parent.mkdir()
    one.write_text("x = 1\ny = 2\n")
    two.write_text("z = 3\n")
    look()
    by_hand = b"a.py 12\nx = 1\ny = 2\nroom/b.py 6\nz = 3\n"
    assert digests == [hashlib.sha256(by_hand).hexdigest()]
    two.write_text("z = 4\n")
    look()
    two.rename(tmp_path / "c.py")
    look()
    one.write_text("x = 1\n")
    (tmp_path / "c.py").write_text("y = 2\nz = 4\n")
    look()
    assert len(set(digests)) == 4
    (tmp_path / "notes.txt").write_text("no code")
    look()
    assert digests[-1] == digests[-2]
    one.unlink()
    one.symlink_to(tmp_path / "nothing.py")
    look()
    assert digests[-1] == "unknown"


def test_source_is_that_of_this_package(afresh):
    """All of its modules, in whatever room, and those of the plugins that come with it."""
    digest = hashlib.sha256()
    there = {
        os.path.relpath(Path(folder, name), ROOT / "initflow"): Path(folder, name)
        for folder, _, names in os.walk(ROOT / "initflow")
        for name in names
        if name.endswith(".py")
    }
    for name in ("critical", "looks_linear", "lsuv"):
        file = f"initflow-{name.replace('_', '-')}/src/initflow_{name}.py"
        there[f"shipped/plugins/{file}"] = ROOT / "plugins" / file
    for name, path in sorted(there.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    assert facts()["source_sha256"] == digest.hexdigest()


def test_packages_are_all_that_are_installed(afresh):
    """By their normalized names, as Python's own reader of metadata finds them."""
    found = environment.current("cpu").packages
    assert list(found) == sorted(found)
    for name in ("torch", "numpy", "mlflow", "scikit-learn"):
        assert found[name] == metadata.version(name)
    named = {
        d.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        for d in metadata.distributions()
    }
    assert set(found) == named


def test_odd_packages_are_read_or_passed_over(tmp_path, monkeypatch, afresh):
    """The first on the path counts, as it does for an import; where it came from is not read."""

    def install(place, folder, head):
        info = tmp_path / place / folder
        info.mkdir(parents=True)
        file = "PKG-INFO" if folder.endswith(".egg-info") else "METADATA"
        (info / file).write_bytes(head)
        url = f"https://user:{PASSWORD}@host/x.whl"
        (info / "direct_url.json").write_text(json.dumps({"url": url}))

    long = b"Name: Odd_one.x\nVersion: 1.0\n\nVersion: 9\n"
    install("first", "odd_one-1.0.dist-info", long)
    install("second", "odd_one-2.0.dist-info", b"Name: odd-one-x\nVersion: 2.0\n")
    install("second", "old.egg-info", b"Metadata-Version: 1.0\r\nName: old\r\nVersion: 3\r\n")
    install("second", "empty-1.dist-info", b"")
    install("second", "latin-1.dist-info", b"Name: latin\nAuthor: \xe9\nVersion: 1\n")
    install("second", "none-1.dist-info", b"Name: none\n")
    monkeypatch.setattr("sys.path", [str(tmp_path / "first"), str(tmp_path / "second")])
    found = environment.current("cpu")
    assert found.packages == {"none": "unknown", "odd-one-x": "1.0", "old": "3"}
    assert PASSWORD not in json.dumps(found.as_json())


def test_only_listed_variables_are_recorded(monkeypatch):
    """Where they are set; their values are cut at what may be a credential, and kept short."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert environment.current("cpu").variables == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("MKL_CBWR", f"https://user:{PASSWORD}@host")
    monkeypatch.setenv("GLIBC_TUNABLES", f"//user:{PASSWORD}{'x' * 100_000}@host")
    monkeypatch.setenv("OMP_DYNAMIC", "\x1b[31mtrue")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    found = environment.current("cpu").variables
    assert set(found) <= set(VARIABLES)
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found["GLIBC_TUNABLES"] == "(too long)"
    assert found["OMP_DYNAMIC"].isprintable()
    assert PASSWORD not in str(found)


@needs_git
def test_a_dirty_tree_is_told_from_a_clean_one_and_from_another_dirty_one(checkout):
    """From any folder below; commit and diff are git's own."""
    commit = git("rev-parse", "HEAD")
    assert git_facts() == (commit, "clean")
    assert repository.current().diff == ""
    (checkout / "untracked.txt").write_text("new")
    assert git_facts() == (commit, "clean")
    trees = set()
    for text in ("two\n", "three\n"):
        (checkout / "code.py").write_text(text)
        assert git_facts()[0] == commit
        trees.add(git_facts()[1])
        assert repository.current().diff.splitlines()[-2:] == ["-one", f"+{text.strip()}"]
    assert len(trees) == 2
    diff = git("diff", "HEAD", "--full-index") + "\n"
    assert repository.current().diff == diff
    assert git_facts()[1] == f"dirty {hashlib.sha256(diff.encode()).hexdigest()}"
    (checkout / "below").mkdir()
    git("config", "diff.relative", "true")
    os.chdir(checkout / "below")
    assert git_facts()[1].startswith("dirty ")
    assert repository.current().diff == diff
    git("commit", "--all", "--message", "second")
    assert git_facts() == (git("rev-parse", "HEAD"), "clean")


@needs_git
def test_git_is_asked_once_a_process_and_folder(checkout, monkeypatch):
    """The code that runs is what was there at the start."""
    before = facts()
    (checkout / "code.py").write_text("two\n")
    monkeypatch.setattr(repository, "_git", None)
    assert facts() == before
    assert repository.current().diff == ""


@needs_git
def test_binary_files_are_told_apart_too(checkout):
    """By the hashes that git shows of them; their bytes are not kept."""
    file = checkout / "weights.bin"
    file.write_bytes(b"\0first")
    git("add", ".")
    git("commit", "--message", "binary")
    trees = []
    for content in (b"\0second", b"\0third"):
        file.write_bytes(content)
        trees.append(git_facts()[1])
        assert "Binary files" in repository.current().diff
    assert trees[0] != trees[1]


@needs_git
def test_no_program_of_the_repository_is_run(checkout):
    """Neither its external diff nor its text filters nor its monitor; colours are left off."""
    trap, sprung = checkout / "trap", checkout / "sprung"
    trap.write_text(f"#!/bin/sh\ntouch '{sprung}'\necho trapped\n")
    trap.chmod(0o755)
    (checkout / ".gitattributes").write_text("*.py diff=trap\n")
    for name in ("diff.external", "diff.trap.textconv", "diff.trap.command", "core.fsmonitor"):
        git("config", name, str(trap))
    for name, value in {"color.ui": "always", "diff.noprefix": "true", "core.pager": "x"}.items():
        git("config", name, value)
    sprung.unlink(missing_ok=True)
    (checkout / "code.py").write_text("two\n")
    assert git_facts()[1].startswith("dirty ")
    assert repository.current().diff.startswith("diff --git a/code.py b/code.py\nindex ")
    assert not sprung.exists()
    git("diff", "HEAD")
    assert sprung.exists()  # the trap works


NOWHERE = ("none", "none")


@needs_git
def test_where_git_cannot_say_there_is_nothing(checkout, tmp_path, monkeypatch):
    """No repository, no commit yet, no git, no folder any more."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("outside", "begun", "gone"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "begun":
            git("init")
        elif name == "gone":
            (tmp_path / name).rmdir()
        assert git_facts() == NOWHERE
        assert repository.current().diff == ""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts() == NOWHERE


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch, afresh):
    """Nor one that hangs only at the diff: then the tree is unknown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repository, "GIT_PATIENCE_S", 0.2)
    program = tmp_path / "git"
    hang = f"exec {shutil.which('sleep')} 60"
    monkeypatch.setenv("PATH", str(tmp_path))
    for script, expected in (
        (hang, NOWHERE),
        (f'case "$*" in *rev-parse*) echo abc;; *) echo part; {hang};; esac', ("abc", "unknown")),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        started = time.perf_counter()
        assert git_facts() == expected
        assert time.perf_counter() - started < 30
        assert repository.current().diff == ""


@needs_git
def test_credentials_are_cut_out_of_the_diff_and_of_nothing_else(checkout):
    """Also those with a slash or an @ of their own; the rest of the diff is left as it is."""
    kept = ["@functools.cache", "y = a@b + c[0:2]@d", "mail = 'me@here.org'", 'x = {"a": 1}  # ü']
    cut = {
        f"https://user:{PASSWORD}@host/path": "https://host/path",
        f"url = 'postgresql+psycopg://user:a/{PASSWORD}@@host:5432/db'":
            "url = 'postgresql+psycopg://host:5432/db'",
        f"git+https://{PASSWORD}@host/x.git": "git+https://host/x.git",
        f"https://host/x?user=me&access_token={PASSWORD}&n=1#a":
            "https://host/x?user=me&access_token=***&n=1#a",
        f"https://bucket/x?X-Amz-Signature={PASSWORD}": "https://bucket/x?X-Amz-Signature=***",
        f"user:{PASSWORD}@host.org:8080": "host.org:8080",
        f'proxy="me:{PASSWORD}@host"': 'proxy="host"',
    }  # fmt: skip
    git("remote", "add", "origin", f"https://user:{PASSWORD}@host/x.git")
    (checkout / "code.py").write_text("\n".join([*kept, *cut]) + "\n")
    found = repository.current().diff
    assert [line[1:] for line in found.splitlines()][-len(kept) - len(cut) :] == [
        *kept,
        *cut.values(),
    ]
    assert "\n@@ -1 +1,11 @@\n" in found
    recorded = json.dumps(environment.current("cpu").as_json()) + str(environment.tags())
    assert PASSWORD not in found + recorded


@needs_git
def test_a_large_diff_is_cut_at_a_line(checkout, monkeypatch):
    """As half an address would show its password; the hash is that of all."""
    lines = [f"{n:04} https://user:{PASSWORD}@host" for n in range(2000)]
    (checkout / "code.py").write_text("\n".join(lines) + "\n")
    whole = repository.current().diff
    tree = git_facts()[1]
    size = len(git("diff", "HEAD", "--full-index")) + 1
    for limit in range(40_000, 40_040):  # wherever the limit falls in a line
        monkeypatch.setattr(repository, "DIFF_LIMIT", limit)
        assert git_facts()[1] == tree
        found = repository.current().diff
        *most, last = found.splitlines(keepends=True)
        assert last == f"… cut: {size:,} bytes in all\n"
        assert whole.startswith("".join(most))
        assert len(found) <= limit
        assert "hunter" not in found


@pytest.mark.parametrize("word", ["x", "://", "a:b", "?", "?token=", "//@", "@", ":", "é"])
def test_long_words_take_no_long_time(word):
    """A megabyte without a space: nothing is quadratic."""
    for text in (word * (1_000_000 // len(word)), f"https://{word * (1_000_000 // len(word))}"):
        started = time.perf_counter()
        secrets.without_secrets(text)
        assert time.perf_counter() - started < 10


def test_an_environment_is_a_value():
    """It goes to other processes, and through JSON, as it is."""
    now = environment.current("cpu")
    assert pickle.loads(pickle.dumps(now)) == now  # noqa: S301 - of this process
    read = json.loads(json.dumps(now.as_json()))
    assert Environment(**read) == now
    assert environment.differences(read, now) == []


NOW = Environment(
    {"torch": "2", "device": "cpu", "blas": "MKL 1"}, {"a": "1", "b": "2"}, {"OMP_NUM_THREADS": "2"}
)


def test_differences_are_named_in_order_with_both_sides():
    """Facts, then variables, then packages; what one side lacks is said."""
    then = {
        "facts": {"blas": "MKL 0", "torch": "1", "device": "cpu", "newer": "x"},
        "variables": {"MKL_CBWR": "COMPATIBLE"},
        "packages": {"b": "2", "c": "3"},
    }
    assert environment.differences(then, NOW) == [
        Change("torch", "1", "2"),
        Change("blas", "MKL 0", "MKL 1"),
        Change("newer", "x", "unknown"),
        Change("variable OMP_NUM_THREADS", "not set", "2"),
        Change("variable MKL_CBWR", "COMPATIBLE", "not set"),
        Change("package a", "not installed", "1"),
        Change("package c", "3", "not installed"),
    ]


@pytest.mark.parametrize(
    ("then", "found"),
    [
        (None, 6),
        ([], 6),
        ({}, 6),
        ({"facts": None, "packages": ["a"], "variables": "x"}, 6),
        (NOW.as_json() | {"facts": {"torch": 2, "device": ["cpu"], "blas": None}}, 3),
        (NOW.as_json() | {"facts": {**NOW.facts, 3: "x"}}, 0),
        (NOW.as_json() | {"facts": {**NOW.facts, "\x1b[2J\n": "\ud800" * 10_000}}, 1),
    ],
)
def test_somebodys_record_is_never_trusted(then, found):
    """Whatever it is, it ends in lines that can be printed."""
    differences = environment.differences(then, NOW)
    assert len(differences) == found
    for text in (part for difference in differences for part in difference):
        assert text.isprintable()
        assert len(text) < 600
        text.encode()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["facts", "packages", "a", "torch"]), inner, max_size=4)
    ),
)


@given(anything)
def test_no_record_raises(then):
    """And none but the same is without a difference."""
    differences = environment.differences(then, NOW)
    assert differences
    assert all(text.isprintable() for difference in differences for text in difference)


def test_tags_are_few_short_and_say_what_the_facts_say(monkeypatch, afresh):
    """No program is started for them, and no package or processor is looked up."""
    monkeypatch.setattr(repository, "_git", None)
    for name in ("_packages", "_cpuinfo"):
        monkeypatch.setattr(environment, name, None)
    tags = environment.tags()
    monkeypatch.undo()
    found = facts()
    assert tags.pop("initflow.version") == found["initflow"]
    assert tags == {f"initflow.env.{name}": found[name] for name in environment.TAGGED}
    assert {"torch", "blas", "threads", "deterministic"} <= set(environment.TAGGED)
    assert all(len(value) <= 64 for value in tags.values())


def test_what_is_shown_names_what_a_result_depends_on():
    """Versions as they are installed, the device with its name, the threads that are set."""
    with machine.threads(2):
        found = environment.shown("cpu")
    assert found["initflow"] == initflow.__version__
    for name in ("torch", "mlflow", "numpy", "scipy"):
        assert found[name] == metadata.version(name)
    assert found["Python"] == platform.python_version()
    assert found["threads"] == "2"
    assert found["device"] == f"cpu ({environment.processor()})"
    assert all(isinstance(value, str) and value for value in found.values())
