"""What commands have in common: options, modules of the current directory, texts of unknown origin on a terminal."""

from __future__ import annotations

import os
import sys

import click

STORE = click.option("--store", help="'ray' (default), 'ray:HOST:PORT', 'file' or 'file:DIR'.")
GPUS = click.option("--gpus", metavar="GPUS",
                    help="Workers on GPUs, of which each sees one: 'all', or numbers as nvidia-smi counts them and "
                    "UUIDs, with commas ('0,1', 'MIG-...').")  # fmt: skip
JOBS_PER_GPU = click.option("--jobs-per-gpu", type=click.IntRange(1), default=1, show_default=True,
                            help="Workers on each GPU.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def see_here() -> None:
    """Let models be defined by modules in the current directory; last, so that none there replaces a package."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def printable(text: object) -> str:
    """A text of unknown origin, for a terminal, which obeys some characters."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in str(text))
