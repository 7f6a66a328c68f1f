"""Commands where no checkout is in sight: neither make's nor Python's variables point to one."""

import os
import subprocess


def run(folder, *command, **shell):
    """What ``command`` prints in ``folder``, where it is to end well."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=outer | shell,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stdout
