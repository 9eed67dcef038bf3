"""``fusewright`` and ``python -m fusewright``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from fusewright.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"fusewright: {error.name} is not installed: pip install {error.name}", file=sys.stderr
        )
        raise SystemExit(2) from None
    app(prog_name="fusewright")


if __name__ == "__main__":
    main()
