"""`mlflow run URI -v VERSION` of a git repository, as MLflow's documentation begins."""

import re
from pathlib import Path

import pytest

from tests.repository import committed, git
from tests.test_end_to_end import artifacts, run, runs

pytestmark = pytest.mark.end_to_end

URI = "https://git.example.org/initflow.git"
SMALL = ("dataset=digits", "hidden=8", "epochs=1", "eval_every=15", "log_model=false")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A bare one on this machine that git is told to take for the address; its first commit.

    MLflow takes a file:// address of a folder that is there for the folder itself.
    """
    folder = tmp_path_factory.mktemp("repository")
    (folder / "work").mkdir()
    first = committed(folder / "work")
    git(folder / "work", "tag", "v1")
    (folder / "work" / "marker").write_text("")
    git(folder / "work", "checkout", "--quiet", "-b", "next")
    git(folder / "work", "add", "--all")
    git(folder / "work", "commit", "--quiet", "--message", "Next")
    git(folder, "clone", "--quiet", "--bare", "work", "bare.git")
    git(folder / "bare.git", "config", "uploadpack.allowAnySHA1InWant", "true")
    (folder / "gitconfig").write_text(
        f'[url "file://{folder}/bare.git"]\n\tinsteadOf = {URI}\n[safe]\n\tdirectory = *\n'
    )
    return folder, first


def run_uri(repository, user, version, entry_point, *parameters):
    """From an empty folder of a user's, in the environment that is at hand."""
    options = [option for parameter in parameters for option in ("-P", parameter)]
    command = ("mlflow", "run", URI, "-v", version, "-e", entry_point, "--env-manager", "local")
    config = str(repository[0] / "gitconfig")
    # Not this checkout's source, nor a process that has imported it.
    return run(user, *command, *options, GIT_CONFIG_GLOBAL=config, PYTHONPATH="")


def test_a_branch_keeps_what_is_the_users_beside_the_store(repository, tmp_path):
    """Studies, plugins, files by relative paths; the closing lines say so, and how to go on."""
    (tmp_path / "own.py").write_text("def ones(weight):\n    weight.fill_(0.1)\n")
    settings = ("trials=2", "seeds=1", "inits=he,own.py:ones", *SMALL)
    done = run_uri(repository, tmp_path, "next", "tune", *settings)
    assert done.returncode == 0, done.stderr
    (parent,) = (r for r in runs(tmp_path) if "mlflow.parentRunId" not in r.data.tags)
    study = parent.data.params["resolved.study"]
    assert (tmp_path / "studies" / f"{study}.journal").is_file()
    assert f"kept in {tmp_path}/studies/{study}.journal" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last == (
        f"This ran in a clone that MLflow made. Runs are kept in sqlite:///{tmp_path}/mlflow.db; "
        f"studies, plugins of your own and files by relative paths are in {tmp_path}."
    )
    commit = parent.data.tags["mlflow.source.git.commit"]
    report = (artifacts(parent) / "report.html").read_text()
    assert f"mlflow run {URI} -e tune -v {commit} --env-manager local" in report
    assert commit == git(repository[0] / "bare.git", "rev-parse", "next")


@pytest.mark.parametrize("by", ["tag", "commit"])
def test_a_version_is_a_tag_or_a_commit_too(repository, tmp_path, by):
    """The source is that of the version, and the next command is of the same."""
    _, first = repository
    done = run_uri(repository, tmp_path, {"tag": "v1", "commit": first}[by], "main", *SMALL)
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    assert logged.data.tags["mlflow.source.git.commit"] == first
    following = re.search(r"Next, hold it against: (.*)", done.stdout)[1]
    assert following.startswith(f"mlflow run {URI} -v {first} --env-manager local")
    assert not list(Path(tmp_path).glob("studies"))
