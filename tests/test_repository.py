"""What hosts, registries and tools read of the repository says the same as the code."""

import fnmatch
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import initflow
from initflow.cli.commands import cli
from tests.commands import SETTINGS, read
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
RECIPE = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
IN_A_CONTAINER = (ROOT / "docs" / "docker.md").read_text()
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
JOBS = {
    f"{name}/{job}": what for name, flow in WORKFLOWS.items() for job, what in flow["jobs"].items()
}
RUN = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
FORMS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    if path.stem != "config"
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ON_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # by other names there
LOWEST_PYTHON = PROJECT["requires-python"].removeprefix(">=")


def test_the_version_is_one():
    """In what is cited, in the recipe, and at the head of the changelog once it is released."""
    assert CITATION["version"] == initflow.__version__
    assert RECIPE["context"]["version"] == initflow.__version__
    head, *_ = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert head in {"Unreleased", initflow.__version__}


def test_the_citation_is_of_this_package():
    assert CITATION["title"].startswith(f"{PROJECT['name']}: ")
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["keywords"] == PROJECT["keywords"]


def test_workflows_make_what_can_be_made():
    """Each `make` has its target."""
    made = {name for line in RUN for name in re.findall(r"^make ([a-z-]+)", line, re.MULTILINE)}
    assert {"test", "lint", "run"} < made
    assert made <= TARGETS


def test_workflows_give_commands_that_there_are():
    """With every option and value."""
    given = [shlex.split(line)[1:] for line in RUN if line.startswith("initflow ")]
    assert {name for name, *_ in given} > {"train", "compare", "diagnose"}
    for name, *words in given:
        if name in SETTINGS and words:
            read(name, shlex.join(words))
        else:
            assert name in {*cli.commands, "--version"}


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if "strategy" in job])
def test_tests_run_on_every_python(name):
    """From the lowest that the package takes."""
    pythons = JOBS[name]["strategy"]["matrix"]["python"]
    assert pythons[0] == LOWEST_PYTHON
    assert len(pythons) == 3


def test_only_what_publishes_may_write():
    """All else reads; a release takes a token of the moment, and no password."""
    writing = {
        name: job["permissions"] for name, job in JOBS.items() if job.get("permissions") is not None
    }
    assert writing == {
        "docs/publish": {"pages": "write", "id-token": "write"},
        "release/publish": {"id-token": "write"},
    }
    assert all(flow["permissions"] == {"contents": "read"} for flow in WORKFLOWS.values())
    assert all("secrets." not in str(flow) for flow in WORKFLOWS.values())


@pytest.mark.parametrize(("tag", "code"), [(f"v{initflow.__version__}", 0), ("v99.0.0", 1)])
def test_a_tag_that_is_not_the_version_is_not_released(tag, code):
    """As the workflow's own lines say, which need nothing but the checkout."""
    (check,) = (line for line in RUN if "GITHUB_REF_NAME" in line)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", check],
        cwd=ROOT,
        env={"PATH": path, "GITHUB_REF_NAME": tag},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == code
    assert (tag in done.stderr) == bool(code)


def test_forms_ask_for_what_there_is():
    """For the output of commands and options that exist; for each answer once."""
    assert set(FORMS) == {"bug", "initializer"}
    for form in FORMS.values():
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(set(ids)) == len(ids)
    text = str(FORMS)
    asked = set(re.findall(r"initflow (?:--debug )?([a-z]+)", text))
    assert asked == {"doctor", "verify", "diagnose"}
    assert asked <= cli.commands.keys()
    assert "--debug" in {option for one in cli.params for option in one.opts}


def test_hooks_are_the_tools_of_make():
    """Of the environment, as CI has them, and of no other version."""
    local, hygiene = HOOKS["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    for entry in entries:
        assert f"\t{entry.removesuffix(' --force-exclude')}" in makefile
    assert all(hook["language"] == "system" for hook in local["hooks"])
    assert hygiene["repo"] == "https://github.com/pre-commit/pre-commit-hooks"


def test_the_recipe_asks_for_what_the_package_needs():
    """By conda's names, with the same bounds, from the same Python, with the same command."""
    needed = {}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        needed[ON_CONDA.get(requirement.name, requirement.name)] = str(requirement.specifier)
    python, *rest = RECIPE["requirements"]["run"]
    assert python == "python >=${{ python_min }}"
    assert RECIPE["context"]["python_min"] == LOWEST_PYTHON
    assert dict(one.split(" ") for one in rest) == needed
    built_by = [one.replace(" ", "") for one in RECIPE["requirements"]["host"]]
    assert set(PYPROJECT["build-system"]["requires"]) <= set(built_by)
    commands = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert RECIPE["build"]["python"]["entry_points"] == commands
    assert RECIPE["about"]["license"] == PROJECT["license"]


def ignored(name):
    """By the last line of .dockerignore that speaks of ``name``."""
    answer = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("#") and fnmatch.fnmatch(name, line.removeprefix("!")):
            answer = not line.startswith("!")
    return answer


def test_what_the_image_is_built_of_is_there():
    """Each file that it copies is in the checkout and sent along; nothing else is sent."""
    copied = [
        name
        for words in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for name in words.split()[:-1]
    ]
    assert {"requirements.lock", "pyproject.toml", "initflow"} < set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert sorted(copied) == sorted(one.name for one in ROOT.iterdir() if not ignored(one.name))
    assert "grep '^uv==' requirements-dev.lock" in DOCKERFILE
    assert (ROOT / "requirements-dev.lock").read_text().count("\nuv==") == 1


def test_the_command_for_the_image_is_valid():
    """It runs the package's command where all is kept, with options that there are."""
    build, run = re.findall(r"^\$ docker (.*)$", IN_A_CONTAINER, re.MULTILINE)
    assert shlex.split(build) == ["build", "-t", "initflow", "."]
    options, name, words = run.partition(" initflow train ")
    assert name
    settings, _ = read("train", words)
    assert settings.dataset == "digits"
    assert '--volume "$PWD:/work"' in options
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)
    assert entry in PROJECT["scripts"]
    assert "\nWORKDIR /work\n" in DOCKERFILE
    assert "\nUSER 1000:1000\n" in DOCKERFILE
    for argument in re.findall(r"--build-arg (\w+)=", IN_A_CONTAINER):
        assert f"\nARG {argument}=" in DOCKERFILE
