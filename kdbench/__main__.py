"""The command, also by `python -m kdbench`."""

import sys


def main() -> None:
    """An interrupt ends it without a traceback, also while it is being imported."""
    try:
        from kdbench.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
