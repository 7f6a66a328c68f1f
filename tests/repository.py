"""The checkout as it is now, as a repository of its own in which nothing was ever installed."""

import shutil
import subprocess

from tests.conftest import ROOT


def git(folder, *arguments):
    """What git prints, as somebody whose name does not matter."""
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def committed(folder):
    """Make ``folder`` a repository with a branch ``main`` of one commit; its id."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "As it is")
    return git(folder, "rev-parse", "HEAD")
