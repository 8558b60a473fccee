"""The command that runs a model over an array: run."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import click

from .cli_shared import GPUS, JOBS_PER_GPU, JSON, STORE, see_here
from .errors import SettingsError


@click.command()
@click.argument("model")
@click.argument("paths", nargs=-1, required=True, metavar="[SOURCE] TARGET")
@click.option("--input", "inputs", multiple=True, metavar="NAME=URL", help="An input by name, instead of SOURCE.")
@click.option("--output", help="Which output: a name or a position, where the model gives several.")
@click.option("--method", default="forward", show_default=True, help="Method of the model to call.")
@click.option("--batch-size", default="auto", show_default=True, help="Rows that one forward gets, or 'auto'.")
@click.option("--block-rows", type=click.IntRange(1), help="Rows of a block. Default: the source's chunks.")
@click.option(
    "--chunk-rows", type=click.IntRange(1), help="Rows of a chunk of TARGET; a block is then a shard of them."
)
@click.option("--on-error", type=click.Choice(["raise", "nan", "quarantine"]), default="raise", show_default=True,
              help="Rows that fail: stop; write NaN and do the others; keep their inputs too.")  # fmt: skip
@click.option("--max-errors", type=click.IntRange(1), default=100, show_default=True,
              help="Failures that the whole job may have.")  # fmt: skip
@click.option("--check-finite", is_flag=True, help="Count NaN and infinite values of inputs and outputs.")
@click.option("--training", type=click.Choice(["refuse", "eval", "keep"]), default="refuse", show_default=True,
              help="What to do with a model in train mode.")  # fmt: skip
@click.option("--device", help="Default: cuda where there is one, else cpu.")
@click.option("--engine", type=click.Choice(["eager", "graph", "compile"]), default="eager", show_default=True,
              help="What runs the operators: torch, CUDA graphs (on a GPU), or torch.compile.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core.")
@GPUS
@JOBS_PER_GPU
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of workers started here.")
@click.option("--start-over", is_flag=True, help="Throw away what an earlier run of ours left in TARGET.")
@click.option("--report", type=click.Path(), metavar="FILE.html",
              help="Write the dashboard's page of this run, as one file, and its samples as FILE.jsonl.")  # fmt: skip
@STORE
@JSON
def run(
    model: str,
    paths: tuple[str, ...],
    inputs: tuple[str, ...],
    output: str | None,
    method: str,
    batch_size: str,
    block_rows: int | None,
    chunk_rows: int | None,
    on_error: str,
    max_errors: int,
    check_finite: bool,
    training: str,
    device: str | None,
    engine: str,
    workers: int | None,
    gpus: str | None,
    jobs_per_gpu: int,
    scheduler: str | None,
    start_over: bool,
    report: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Run MODEL over the rows of SOURCE and write the zarr array TARGET.

    SOURCE is a zarr array's path or URL, a .npy file, or FILE.h5::/DATASET. Rows lie along axis 0. Stopped at any
    moment, the same command goes on where it was; TARGET appears under its name when it is complete. With several
    inputs:

    \b
      zcinfer run bert out.zarr --input input_ids=ids.zarr --input attention_mask=mask.zarr
    """
    named = dict(_named(text) for text in inputs)
    *source, target = paths
    for name, given in ("workers", workers), ("gpus", gpus):
        if scheduler is not None and given is not None:
            raise SettingsError(f"--{name} is for workers started here; those of --scheduler are what they are")
    if len(source) != (0 if named else 1):
        raise SettingsError("give SOURCE and TARGET; or TARGET alone, and one --input NAME=URL or more")
    rows: int | str = int(batch_size) if batch_size.isdigit() else batch_size
    which: int | str | None = int(output) if output is not None and output.lstrip("-").isdigit() else output

    from . import catalog, config
    from .guarded import Guard
    from .jobs import Job
    from .reporting import check_path
    from .reporting import report as reported

    see_here()
    if report is not None:
        check_path(report)
    if gpus is not None or jobs_per_gpu > 1:
        from .cluster import check_unpinned
        from .pinning import Pinning

        Pinning.of(gpus, jobs_per_gpu)
        check_unpinned(workers, None)
    elif scheduler is None and engine == "graph":
        _refuse_graphs_without_gpus(device)
    if store is None and catalog.current() is None:
        store = str(config.get("store"))
    ray = store is not None and store.partition(":")[0] == "ray"
    # All that can be refused is refused before workers and Ray are started; for that the registry is enough.
    catalog.connect("file" if ray else store)
    job = Job(
        model,
        named or source[0],
        target,
        resume=not start_over,
        batch_size=rows,
        output=which,
        method=method,
        training=training,
        device=device,
        engine=engine,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        guard=Guard(on_error, max_errors, check_finite),
    )
    if sys.stderr.isatty():  # seconds without a sign of life are for logs
        click.echo("starting ..." if scheduler is None else f"connecting to {scheduler} ...", err=True)
    if ray and store != "ray":
        catalog.connect(store)  # it may not answer
    with _cluster(workers, scheduler, gpus, jobs_per_gpu):
        catalog.connect(store)
        click.get_current_context().meta["kept"] = "; what is finished is kept, the same command goes on from there"
        page = None
        try:
            with reported(report) if report is not None else nullcontext() as page:
                done = job.run()
        finally:
            if page is not None:
                click.echo(f"report {page}", err=True)
    if as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        was = done.blocks - done.computed
        click.echo(
            f"{done.target}: {done.rows:,} rows in {done.blocks:,} blocks, {done.computed:,} computed now"
            + (f", {was:,} by an earlier run" if was else "")
        )
        for said in done.findings():
            click.secho(said, fg="yellow")


def _refuse_graphs_without_gpus(device: str | None) -> None:
    """Refuse them where our own workers would."""
    import torch

    from .engines import check

    check("graph", device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cluster(workers: int | None, scheduler: str | None, gpus: str | None, jobs_per_gpu: int) -> Any:
    """Context with a current Dask client."""
    import logging
    from contextlib import ExitStack

    from distributed import Client

    stack = ExitStack()
    if scheduler is not None:
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # that it is lost we say ourselves
        try:
            stack.enter_context(Client(scheduler, timeout="10s"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error
    else:
        from .cluster import LocalCluster

        started = stack.enter_context(LocalCluster(n_workers=workers, gpus=gpus, jobs_per_gpu=jobs_per_gpu))
        for line in started.gpus:
            click.echo(line, err=True)
        if started.page_link is not None and sys.stderr.isatty():
            click.echo(f"dashboard {started.page_link}", err=True)
        stack.enter_context(started.get_client())
    return stack


def _named(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise SettingsError(f"--input {text!r}: write NAME=URL, as in --input input_ids=ids.zarr")
    return name, url
