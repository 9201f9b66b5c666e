"""`python -m proxytune` is `proxytune`."""

from __future__ import annotations

from proxytune.cli import main

if __name__ == "__main__":
    main()
