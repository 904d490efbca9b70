"""The `korder` command. Importing this is quick: typer and everything behind it load when `main` is called."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the console script."""
    from korder.cli.app import app

    app()
