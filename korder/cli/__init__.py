"""The `korder` command. Importing this is quick: typer and everything behind it load when `main` is called."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the console script."""
    try:
        from korder.cli.app import app

        app()
    except KeyboardInterrupt:  # while the modules load; later the commands see it
        print("interrupted", file=sys.stderr)
        sys.exit(130)
