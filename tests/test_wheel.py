"""The distributions: built of what git tracks, and a wheel that holds all that it needs to run."""

import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import initflow
from initflow.checkup import versions
from initflow.core import environment, paths
from tests.conftest import ROOT
from tests.outside import run
from tests.repository import committed

pytestmark = pytest.mark.end_to_end
SHIPPED = "initflow/shipped/"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both: the wheel is built of the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "source").mkdir()
    committed(folder / "source")
    uv = Path(sys.executable).with_name("uv")
    run(folder, uv, "build", "--offline", "--no-build-isolation", "--out-dir", folder, "source")
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def site(built, wheel):
    """A folder of packages that holds the wheel alone."""
    for name, content in wheel.items():
        file = built / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return built / "site"


def test_the_wheel_is_the_package_with_copies_of_what_lies_beside_it(wheel):
    """Nothing else, each the same to the byte; tests stay out."""
    tracked = committed_files("initflow")
    own = {name for name in wheel if ".dist-info/" not in name and not name.startswith(SHIPPED)}
    assert own == tracked
    copies = {name.removeprefix(SHIPPED) for name in wheel if name.startswith(SHIPPED)}
    plugins = {
        name for home in paths.SHIPPED_PLUGINS for name in committed_files(f"plugins/{home}")
    }
    others = {"MLproject", "conda.yaml", "pyproject.toml", "requirements.lock"}
    assert copies == others | {name for name in plugins if "/tests/" not in name}
    for name in own | {SHIPPED + copy for copy in copies}:
        assert wheel[name] == (ROOT / name.removeprefix(SHIPPED)).read_bytes(), name


def committed_files(folder):
    """The files below ``folder`` that git tracks or would."""
    options = ("--cached", "--others", "--exclude-standard")
    listed = run(ROOT, "git", "ls-files", "-z", *options, folder)
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def test_the_source_distribution_holds_what_the_wheel_is_built_of(built):
    """And neither tests nor pictures of the documentation."""
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "bench"))]


def test_it_runs_without_the_checkout(site, tmp_path):
    """With its schemes, and as the same source: a run can be verified by either."""
    code = (
        "import json, initflow; from initflow.core import environment;"
        "from initflow.checkup import versions; from initflow.initializers import plugins;"
        "found = [(p.name, p.origin, s.provider) for p, s in plugins.load_all() if p.shipped];"
        "print(json.dumps([initflow.__file__, environment.source_sha256(), found,"
        " versions.look()]))"
    )
    where, source, found, checked = json.loads(
        run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(site))
    )
    assert Path(where) == site / "initflow" / "__init__.py"
    assert source == environment.source_sha256()
    assert found == [
        [
            name,
            f"initflow-{name} 0.1.0 (shipped with initflow {initflow.__version__})",
            f"initflow-{name} 0.1.0",
        ]
        for name in ("critical", "looks-linear", "lsuv")
    ]
    assert checked == json.loads(json.dumps(versions.look()))


def test_a_project_of_ones_own_runs_anywhere(site, tmp_path):
    """Its entry points run the installed package, and find the plugin in it."""
    program = Path(sys.executable).parent
    shell = {
        "PYTHONPATH": str(site),
        "PATH": f"{program}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    run(tmp_path, sys.executable, "-m", "initflow", "project", "my-project", **shell)
    conda = yaml.safe_load((tmp_path / "my-project" / "conda.yaml").read_text())
    assert conda["dependencies"][-1] == {
        "pip": ["-r requirements.lock", f"initflow=={initflow.__version__}"]
    }
    said = run(
        tmp_path,
        *(program / "mlflow", "run", "my-project", "--env-manager", "local"),
        *("--experiment-name", "initflow", "-P", "init=template", "-P", "dataset=digits"),
        **shell,
    )
    assert re.search(r"template .* \d\d\.\d\d% ", said)
    assert f"mlflow run {tmp_path / 'my-project'} --env-manager local" in said


def test_pip_installs_the_checkout(built, tmp_path):
    """`pip install .`, and the command is there."""
    pip = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index")
    pip = (*pip, "--ignore-installed")  # or it would uninstall the checkout's own
    run(built / "source", sys.executable, *pip, "--prefix", tmp_path / "there", ".")
    (site,) = (tmp_path / "there").rglob("site-packages")
    command = tmp_path / "there" / "bin" / "initflow"
    said = run(tmp_path, command, "--version", PYTHONPATH=str(site))
    assert said == f"initflow {initflow.__version__}\n"
    assert (site / "initflow" / "shipped" / "plugins").is_dir()
