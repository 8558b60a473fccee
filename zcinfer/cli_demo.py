"""Commands that show what zcinfer does, and how fast, on this machine: demo, bench."""

from __future__ import annotations

import json
import sys

import click

from .cli_shared import JSON, STORE

BENCHMARKS = (
    "load",
    "article",
    "talk",
    "throughput",
    "models",
    "overlap",
    "windows",
    "telemetry",
    "nodes",
    "gpu",
    "all",
)


@click.command()
@click.option("--quick", is_flag=True, help="Fewer passages: under 45 seconds.")
@click.option("--ask", multiple=True, metavar="TEXT", help="A question of yours; may be repeated.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core, two at least.")
@click.option("--out", type=click.Path(), help="Keep the embeddings in this zarr array. Default: thrown away.")
@STORE
@JSON
def demo(
    quick: bool, ask: tuple[str, ...], workers: int | None, out: str | None, store: str | None, as_json: bool
) -> None:
    """See it work: embed Python's own documentation with a real model, on several workers that share its weights."""
    from .demo import run_demo

    report = run_demo(quick=quick, questions=ask, workers=workers, out=out, store=store, quiet=as_json)
    if as_json:
        click.echo(json.dumps(report))
    if not report["passed"]:
        sys.exit(1)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS), metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Fewer rounds, to see that it works; all of them in under 10 minutes.")
@click.option("--out", type=click.Path(file_okay=False), default="benchmarks/results", show_default=True,
              help="Directory of the tables, the figures and the page.")  # fmt: skip
@click.option("--only", multiple=True, metavar="TEXT", help="Only models or systems whose names contain TEXT.")
@click.option("--again", is_flag=True, help="Measure nothing: show anew what an earlier run left in --out.")
@click.option("--docs", is_flag=True, help="Put whole runs into docs/benchmarks.md of the source; keep the ratios.")
@click.option("--check", is_flag=True, help="Fail where a ratio is a third worse than the one kept last by --docs.")
def bench(
    names: tuple[str, ...], quick: bool, out: str, only: tuple[str, ...], again: bool, docs: bool, check: bool
) -> None:
    """Measure zcinfer on this machine, beside what you would otherwise use.

    \b
    NAME is one of these; default: all that can run here.
      load        all ways to load a model, cold and warm, and the memory of each further reader
      article     "How to load models 300 times faster with Ray" (2021): its loads and calls, today
      talk        an MLP over many rows: loop, threads, processes, and zcinfer
      throughput  rows per second, beside other frameworks
      models      many models on demand: the largest rate of requests held
      overlap     a timeline of a worker that reads while it computes
      windows     memory that windows of time series take
      telemetry   what counting costs, and an open page
      nodes       how a model comes to 2, 4 and 8 nodes, on hosts made of namespaces (needs root)
      gpu         needs a GPU

    Results are compared before a time counts. Prints tables; writes JSON, CSV, Markdown and a page with plots
    that opens without a network. Needs: pip install 'zcinfer[bench]'.
    """
    from pathlib import Path

    from .benchmarks.benchmark import Options
    from .benchmarks.running import bench as run_benchmarks

    run_benchmarks(names, Options(quick, Path(out), only), docs=docs, again=again, check=check)
