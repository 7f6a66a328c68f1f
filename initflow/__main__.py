"""``python -m initflow`` is the ``initflow`` command."""

from initflow.cli import main

if __name__ == "__main__":
    main()
