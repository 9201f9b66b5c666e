"""`python -m proxytune` is `proxytune`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line on the arguments of this process; an interrupt while it is imported ends it quietly too."""
    try:
        from proxytune.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
