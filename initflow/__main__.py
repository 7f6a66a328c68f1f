"""``python -m initflow`` is the ``initflow`` command."""

from initflow.cli.cli import entry

if __name__ == "__main__":
    entry()
