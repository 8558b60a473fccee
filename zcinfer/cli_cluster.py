"""Commands that go on until Ctrl-C: cluster, node, dashboard."""

from __future__ import annotations

import sys
from typing import Any

import click

from .cli_shared import GPUS, JOBS_PER_GPU, STORE, see_here
from .errors import SettingsError


@click.command()
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core.")
@click.option("--memory-limit", default="auto", show_default=True, help="Private memory a worker may use.")
@GPUS
@JOBS_PER_GPU
@click.option("--port", type=click.IntRange(0), default=8786, show_default=True, help="Port of the scheduler.")
@STORE
def cluster(
    workers: int | None, memory_limit: str, gpus: str | None, jobs_per_gpu: int, port: int, store: str | None
) -> None:
    """Start a cluster on this machine and keep it until Ctrl-C; it listens on 127.0.0.1 alone.

    \b
    Use it from other programs:
      zcinfer run bert in.zarr out.zarr --scheduler tcp://127.0.0.1:8786
      client = dask.distributed.Client("tcp://127.0.0.1:8786")
    """
    import signal
    import threading

    from . import catalog
    from .cluster import LocalCluster
    from .mps import mps

    see_here()
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    if sys.stderr.isatty():
        click.echo("starting ...", err=True)
    options: dict[str, Any] = {"gpus": gpus, "jobs_per_gpu": jobs_per_gpu}
    with LocalCluster(n_workers=workers, memory_limit=memory_limit, scheduler_port=port, **options) as started:
        with started.get_client():
            chosen = catalog.connect(store)
        click.echo(f"scheduler {started.scheduler_address}")
        click.echo(f"store     {chosen.url}")
        if started.page_link is not None:
            click.echo(f"dashboard {started.page_link}")
        for line in started.gpus:
            click.echo(line)
        if started.gpus:
            click.echo(mps())
        click.echo("Ctrl-C ends it.")
        end.wait()
        catalog.disconnect()


@click.command()
@click.option("--head", is_flag=True, help="Be the machine that the others join.")
@click.option("--join", metavar="ADDRESS", help="Join the head whose scheduler is at ADDRESS, as it prints it.")
@click.option("--host", default="", metavar="ADDRESS",
              help="Listen on this address of this machine. Default: with --head 127.0.0.1, where no other machine can "
              "join; with --join the one from which it reaches the head.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8786, show_default=True,
              help="Port of the head's Dask scheduler.")  # fmt: skip
@click.option("--ray-port", type=click.IntRange(0, 65535), default=6379, show_default=True,
              help="Port of the head's Ray.")  # fmt: skip
@click.option("--token-file", metavar="FILE",
              help="Ray's token, a copy of the head's file (mode 0600). Default: this user's own.")  # fmt: skip
@click.option("--wait", type=click.FloatRange(0), default=0, show_default=True,
              help="Seconds that --join waits for a head which is not up yet.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), help="Worker processes here. Default: one per core.")
@click.option("--memory-limit", default="auto", show_default=True, help="Private memory a worker may use.")
@GPUS
@JOBS_PER_GPU
@click.pass_context
def node(
    ctx: click.Context,
    head: bool,
    join: str | None,
    host: str,
    port: int,
    ray_port: int,
    token_file: str | None,
    wait: float,
    workers: int | None,
    memory_limit: str,
    gpus: str | None,
    jobs_per_gpu: int,
) -> None:
    """Make this machine part of a cluster, until Ctrl-C: its shared memory and its workers.

    \b
    On one machine, and then on each of the others, as the first one prints it:
      zcinfer node --head --host 10.0.0.1
      zcinfer node --join tcp://10.0.0.1:8786 --token-file FILE
    """
    if head == (join is not None):
        raise SettingsError("give --head on one machine, and --join ADDRESS on all others")
    source = click.core.ParameterSource.DEFAULT
    if join is not None and any(ctx.get_parameter_source(name) is not source for name in ("port", "ray_port")):
        raise SettingsError("--port and --ray-port are the head's: the others find them by its address")

    import dask.config

    from .node import Head, Member, Workers, serve

    see_here()
    with dask.config.set({"zcinfer.ray.token-file": token_file} if token_file else {}):
        role = Head(host, port, ray_port) if join is None else Member(join, host, wait)
        serve(role, Workers(workers, memory_limit, gpus, jobs_per_gpu), click.echo)


@click.command()
@click.argument("scheduler", default="tcp://127.0.0.1:8786")
@click.option("--port", type=click.IntRange(0), default=8788, show_default=True, help="Port of the page; 0: any.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a password.")
@click.option("--password-file", type=click.Path(), help="A password, or a JSON object of names and passwords.")
@click.option("--oauth-file", type=click.Path(), help="Options of Panel's OAuth and the users that may look, as JSON.")
@click.option("--origin", "origins", multiple=True, metavar="HOST:PORT", help="How browsers call it, with --host.")
@click.option("--show", is_flag=True, help="Open it in a browser.")
def dashboard(
    scheduler: str,
    port: int,
    host: str,
    password_file: str | None,
    oauth_file: str | None,
    origins: tuple[str, ...],
    show: bool,
) -> None:
    """Serve a page that says how the work of SCHEDULER goes: its state, when it is done, and what it waits for.

    SCHEDULER is the address of any Dask scheduler in whose environment zcinfer is installed (default: that of `zcinfer
    cluster`). It need not be there yet, and may go and come back. LocalCluster, `zcinfer run` and `zcinfer demo` have
    such a page already, and say its link.
    """
    from .activation import check_installed

    check_installed()
    from .dashboard.access import Access, OAuth
    from .dashboard.server import serve

    passwords = Access.passwords_from(password_file) if password_file is not None else None
    oauth = OAuth.from_file(oauth_file) if oauth_file is not None else None
    access = Access(host, port, origins, passwords, oauth)

    def ready(link: str) -> None:
        click.echo(f"dashboard {link}\nCtrl-C ends it.")
        if show:
            click.launch(link)

    serve(scheduler, access, ready=ready)
