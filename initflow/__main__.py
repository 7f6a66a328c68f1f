"""``python -m initflow`` is the ``initflow`` command."""

from initflow.cli.process import entry

if __name__ == "__main__":
    entry()
