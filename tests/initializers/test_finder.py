"""Finding plugins: fake distributions on the path, folders, conflicts, damage; nothing imported."""

import json
import subprocess
import sys

import pytest

import initflow
from initflow.core import paths
from initflow.core.configurations import SCHEME_NAMES
from initflow.errors import SettingError
from initflow.initializers import finder
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.finder import INITIALIZERS, found
from tests.conftest import ROOT

SHIPPED = paths.SHIPPED_PLUGINS


def install(site, name, points, version="1.0"):
    """A distribution as pip leaves it, but for its modules."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = (
        points if isinstance(points, str) else "".join(f"{k} = {v}\n" for k, v in points.items())
    )
    (info / "entry_points.txt").write_text(
        f"[{INITIALIZERS.name}]\n{lines}\n[console_scripts]\nx = y:z\n"
    )
    return info


def project(plugins, folder, points, name=None, version="1.0"):
    """A folder that is a distribution, but for its modules."""
    home = plugins / folder
    home.mkdir(parents=True)
    table = "".join(f'"{key}" = "{value}"\n' for key, value in points.items())
    (home / "pyproject.toml").write_text(
        f'[project]\nname = "{name or folder}"\nversion = "{version}"\n'
        f'[project.entry-points."{INITIALIZERS.name}"]\n{table}'
    )
    return home


@pytest.fixture
def site(tmp_path, monkeypatch, nothing_shipped):
    """A folder on the path where distributions are installed, and no plugins elsewhere."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_built_in_names_are_the_built_in_schemes():
    """Known without importing torch."""
    assert tuple(BUILT_IN) == SCHEME_NAMES


def test_nothing_is_there_by_default(site):
    """No folder `plugins`, nothing installed: no error."""
    assert found() == {}


def test_installed_distributions_are_found_by_their_entry_points(site):
    """With version and place, sorted by name; of the modules nothing is imported or even there."""
    install(site, "two-more", {"zeta": "no.such.module:fill", "alpha": "nowhere:fill"}, "2.1")
    install(site, "another", {"mid": "gone:a.b"})
    plugins = found()
    assert list(plugins) == ["alpha", "mid", "zeta"]
    assert (plugins["zeta"].function, plugins["zeta"].provider) == (
        "no.such.module:fill",
        "two-more 2.1",
    )
    assert plugins["mid"].folder is None
    assert not any(plugin.problem for plugin in plugins.values())
    assert not {"no", "nowhere", "gone"} & set(sys.modules)


def test_the_first_of_a_name_on_the_path_is_the_one(site, tmp_path, monkeypatch):
    """As Python imports it: an older copy farther down is no second distribution."""
    install(site, "mine", {"own": "mine:fill"}, "1.0")
    nearer = tmp_path / "nearer"
    install(nearer, "Mine", {"own": "mine:fill"}, "2.0")
    monkeypatch.syspath_prepend(str(nearer))
    assert found()["own"].provider == "Mine 2.0"


@pytest.mark.parametrize("way", ["default", "variable", "given"])
def test_folders_are_found_where_one_says(site, tmp_path, monkeypatch, way):
    """`plugins` in the current folder, INITFLOW_PLUGINS_DIR, or the setting, which wins."""
    for name in ("plugins", "by-variable", "by-setting"):
        project(tmp_path / name, "mine", {name: "mine:fill"}, version="0.3")
    given = None
    if way != "default":
        monkeypatch.setenv("INITFLOW_PLUGINS_DIR", str(tmp_path / "by-variable"))
    if way == "given":
        given = tmp_path / "by-setting"
    (name,) = found(given)
    assert name == {"default": "plugins", "variable": "by-variable", "given": "by-setting"}[way]
    assert found(given)[name].provider == "mine 0.3"
    assert found(given)[name].folder.name == "mine"


def test_a_plugins_folder_that_was_named_must_be_there(site, tmp_path, monkeypatch):
    """By the setting or by the variable."""
    with pytest.raises(SettingError, match=r"plugins_dir must be a folder, not '.*none'"):
        found(tmp_path / "none")
    monkeypatch.setenv("INITFLOW_PLUGINS_DIR", "~nobody-here/none")
    with pytest.raises(SettingError, match=r"plugins_dir must be a folder, not '~nobody-here/none"):
        found()


def test_a_folder_that_cannot_be_read_is_told(site, tmp_path):
    """A name that is too long, as one line."""
    with pytest.raises(SettingError, match="cannot be read: File name too long"):
        found(tmp_path / ("x" * 300))


def test_modules_lie_in_src_or_beside(site, tmp_path):
    """By where the function's is: a `src` may hold something else."""
    home = project(tmp_path / "plugins", "both", {"inner": "inner:f", "outer": "outer:f"})
    (home / "src").mkdir()
    (home / "src" / "inner.py").write_text("")
    assert found()["inner"].source == home.relative_to(tmp_path) / "src"
    assert found()["outer"].source == home.relative_to(tmp_path)


@pytest.mark.parametrize("names", [("my-init", "my-init"), ("my-init", "My_Init")])
def test_installing_a_folder_too_is_no_conflict(site, tmp_path, names):
    """However the name is written: the folder, which is never stale, is the one to use."""
    install(site, names[1], {"own": "my_init:fill"}, "1.0")
    project(tmp_path / "plugins", "any", {"own": "my_init:fill"}, name=names[0], version="1.1")
    plugin = found()["own"]
    assert (plugin.provider, plugin.installed_too, plugin.problem) == (
        f"{names[0]} 1.1",
        True,
        None,
    )


def test_an_installed_one_is_no_more_where_its_folder_is(site, tmp_path):
    """Not even schemes that the folder has no longer; a damaged folder hides none."""
    install(site, "renamed", {"old": "m:f"})
    project(tmp_path / "plugins", "any", {"new": "m:f"}, name="renamed")
    install(site, "hurt", {"fine": "m:f"})
    (tmp_path / "plugins" / "hurt").mkdir()
    (tmp_path / "plugins" / "hurt" / "pyproject.toml").write_text("[")
    assert {name: bool(plugin.problem) for name, plugin in found().items()} == {
        "fine": False,
        "hurt": True,
        "new": False,
    }


def test_what_comes_with_the_package_gives_way(site, tmp_path, monkeypatch):
    """To a scheme of its name, whose ever, and to its distribution, unless that is damaged."""
    monkeypatch.setattr(paths, "SHIPPED_PLUGINS", SHIPPED)
    assert {name: plugin.shipped for name, plugin in found().items()} == dict.fromkeys(
        ("critical", "looks-linear", "lsuv"), True
    )
    install(site, "other", {"critical": "other:f"})
    install(site, "Initflow_LSUV", {"lsuv-2": "initflow_lsuv:f"}, "0.2")
    hurt = tmp_path / "plugins" / "initflow-looks-linear"
    hurt.mkdir(parents=True)
    (hurt / "pyproject.toml").write_text("[")
    assert {name: plugin.origin for name, plugin in found().items() if not plugin.problem} == {
        "critical": "other 1.0 (installed)",
        "looks-linear": (
            f"initflow-looks-linear 0.1.0 (shipped with initflow {initflow.__version__})"
        ),
        "lsuv-2": "Initflow_LSUV 0.2 (installed)",
    }


def test_two_distributions_with_one_name_are_told_apart(site, tmp_path):
    """The error names both, and troubles no other."""
    install(site, "first", {"own": "first:fill", "fine": "first:other"})
    install(site, "second", {"own": "second:fill"}, "2.0")
    assert found()["own"].problem in {
        "two distributions offer 'own': first 1.0 (installed) and second 2.0 (installed)",
        "two distributions offer 'own': second 2.0 (installed) and first 1.0 (installed)",
    }
    assert found()["fine"].problem is None
    project(tmp_path / "plugins", "third", {"fine": "third:fill"})
    assert found()["fine"].problem == (
        "two distributions offer 'fine': third 1.0 (plugins/third) and first 1.0 (installed)"
    )


def test_a_copied_folder_is_a_second_distribution(site, tmp_path):
    """Also under the same project name: which of them is meant cannot be known."""
    project(tmp_path / "plugins", "one", {"own": "m:f"}, name="same")
    project(tmp_path / "plugins", "one-copy", {"own": "m:f"}, name="same")
    assert found()["own"].problem == (
        "two distributions offer 'own': same 1.0 (plugins/one) and same 1.0 (plugins/one-copy)"
    )


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_no_plugin_takes_a_built_in_name(site, name):
    """It is listed, with the cause."""
    install(site, "greedy", {name: "greedy:fill", "other": "greedy:fill"})
    assert found()[name].problem == (
        f"'{name}' is the name of a built-in scheme, which no plugin may take"
    )
    assert found()["other"].problem is None


@pytest.mark.parametrize("name", ["a:b", "a b", "a,b", "a=b", "-a", "a/b"])
def test_names_that_no_spec_could_say_are_refused(site, tmp_path, name):
    """What stands between names and arguments cannot be in a name."""
    project(tmp_path / "plugins", "odd", {name: "odd:fill"})
    assert found()[name].problem == (
        f"'{name}' is no name for a scheme: letters, digits, '_', '-' and '.' are"
    )


DAMAGED = {
    "too deep": (b"x=" + b"[" * 5_000, "maximum recursion depth exceeded"),
    "project is a number": (b"project = 3", "it lacks [project] with a name"),
    "no toml": (b"[project", "Expected ']'"),
    "no unicode": (b"\xff\xfe", "utf-8"),
    "empty": (b"", "it lacks [project] with a name"),
    "no name": (
        f'[project.entry-points."{INITIALIZERS.name}"]\na="b:c"'.encode(),
        "it lacks [project] with a",
    ),
    "no group": (b'[project]\nname = "x"', f'or [project.entry-points."{INITIALIZERS.name}"]'),
    "misspelt": (
        b'[project]\nname = "x"\n[project.entry-points."initflow.initializer"]\na="b:c"',
        f'or [project.entry-points."{INITIALIZERS.name}"]',
    ),
    "project is text": (b'project = "x"', ""),
    "points are text": (
        f'[project]\nname = "x"\n[project.entry-points]\n"{INITIALIZERS.name}" = "x"'.encode(),
        "",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_listed_with_its_cause(site, tmp_path, damage):
    """Under the folder's name; the others are found all the same."""
    content, cause = DAMAGED[damage]
    project(tmp_path / "plugins", "whole", {"own": "whole:fill"})
    (tmp_path / "plugins" / "hurt").mkdir()
    (tmp_path / "plugins" / "hurt" / "pyproject.toml").write_bytes(content)
    plugins = found()
    assert list(plugins) == ["hurt", "own"]
    assert plugins["hurt"].problem.startswith("plugins/hurt/pyproject.toml: ")
    assert cause in plugins["hurt"].problem
    assert "\n" not in plugins["hurt"].problem
    assert plugins["own"].problem is None


def test_damaged_metadata_is_listed_with_its_cause(site):
    """A line without a value, a distribution without a name: the others are found."""
    install(site, "hurt", "no equals sign here")
    info = install(site, "nameless", {"lost": "m:f"})
    (info / "METADATA").unlink()
    install(site, "whole", {"own": "whole:fill"})
    unreadable = install(site, "unreadable", {"a": "m:f"}) / "entry_points.txt"
    unreadable.write_bytes(b"\xff\xfe" + unreadable.read_bytes())
    plugins = found()
    assert list(plugins) == ["hurt-1.0", "nameless-1.0", "own"]
    assert plugins["own"].problem is None
    assert plugins["hurt-1.0"].problem.startswith("its metadata are damaged: ")
    assert plugins["nameless-1.0"].problem.startswith("its metadata are damaged: ")


def test_what_is_no_distribution_is_passed_over(site, tmp_path):
    """Files, folders without a pyproject.toml."""
    (tmp_path / "plugins" / "notes").mkdir(parents=True)
    (tmp_path / "plugins" / "README.md").write_text("hello")
    assert found() == {}


def test_functions_of_the_running_script_are_found(site, monkeypatch):
    """Those marked, defined there, by their name there; not those it imported."""
    main = sys.modules["__main__"]

    @initflow.initializer
    def own(weight):
        weight.zero_()

    @initflow.initializer
    def imported(weight):
        weight.zero_()

    own.__module__ = "__main__"
    monkeypatch.setattr(main, "own", own, raising=False)
    monkeypatch.setattr(main, "imported", imported, raising=False)
    assert list(found()) == ["own"]
    assert found()["own"].origin == "the running script or notebook"
    install(site, "rival", {"own": "rival:fill"})
    assert found()["own"].problem == (
        "two distributions offer 'own': the running script or notebook and rival 1.0 (installed)"
    )


def test_two_hundred_plugins_are_listed_and_none_is_imported(tmp_path):
    """By the command, which loads neither torch nor any of them."""
    for n in range(200):
        info = install(tmp_path / "site", f"plugin-{n}", {f"scheme-{n}": f"plugin_{n}:fill"})
        (info.parent / f"plugin_{n}.py").write_text("raise SystemExit('imported')\n")
    program = (
        "import sys, initflow.cli.process\n"
        "code = initflow.cli.process.main(['plugins', 'list', '--json'])\n"
        "heavy = {m for m in sys.modules if m.startswith(('plugin_', 'torch', 'mlflow'))}\n"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}/site:{ROOT}", "PATH": "/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    listed = json.loads(done.stdout)["plugins"]
    names = [plugin["name"] for plugin in listed if not plugin["shipped"]]
    assert names == sorted(f"scheme-{n}" for n in range(200))
    assert done.stderr == "0 []\n"


def test_the_group_is_the_documented_one():
    """What plugins write into their metadata cannot change."""
    assert finder.INITIALIZERS.name == "initflow.initializers"
    assert finder.MODELS.name == "initflow.models"
