"""The command line: the library's verbs, as ``zcinfer VERB`` and ``dask zcinfer VERB``.

This module and those with the commands import click alone; torch, ray and the rest are imported by the commands that
need them. Errors of zcinfer are printed as one message, without a traceback (``ZCINFER_DEBUG=1`` shows it).
"""

from __future__ import annotations

import os
from typing import Any

import click

from . import __version__
from .cli_cluster import cluster, dashboard, node
from .cli_demo import bench, demo
from .cli_models import info, ls, put, rm
from .cli_run import run
from .cli_shared import printable
from .errors import ZcinferError


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZcinferError as error:
            if os.environ.get("ZCINFER_DEBUG"):
                raise
            click.secho(f"error: {printable(error)}", fg="red", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.secho(f"interrupted{ctx.meta.get('kept', '')}", err=True)
            ctx.exit(130)


@click.group("zcinfer", cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="zcinfer")
def main() -> None:
    """Run PyTorch models over big arrays.

    Models are published once (put) and shared by all workers of a machine; arrays are zarr. A first session:

    \b
      zcinfer demo --quick                       see it work
      zcinfer put mymodels:build --name bert     publish what build() in mymodels.py returns
      zcinfer ls
      zcinfer run bert in.zarr out.zarr          rows of in.zarr through the model, restartable
    """


for command in (put, ls, info, rm, run, demo, bench, cluster, node, dashboard):
    main.add_command(command)
