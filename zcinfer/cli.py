"""The command line: the library's verbs, as ``zcinfer VERB`` and ``dask zcinfer VERB``.

Imports click alone; torch, ray and the rest are imported by the commands that need them. Errors of zcinfer are
printed as one message, without a traceback (``ZCINFER_DEBUG=1`` shows it).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import click

from . import __version__
from .errors import SettingsError, ZcinferError
from .sizes import format_size


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZcinferError as error:
            if os.environ.get("ZCINFER_DEBUG"):
                raise
            click.secho(f"error: {_printable(error)}", fg="red", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.secho(f"interrupted{ctx.meta.get('kept', '')}", err=True)
            ctx.exit(130)


def _see_here() -> None:
    """Let models be defined by modules in the current directory; last, so that none there replaces a package."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


_STORE = click.option("--store", help="'ray' (default), 'ray:HOST:PORT', 'file' or 'file:DIR'.")
_GPUS = click.option("--gpus", metavar="GPUS",
                     help="Workers on GPUs, of which each sees one: 'all', or numbers as nvidia-smi counts them and "
                     "UUIDs, with commas ('0,1', 'MIG-...').")  # fmt: skip
_JOBS_PER_GPU = click.option("--jobs-per-gpu", type=click.IntRange(1), default=1, show_default=True,
                             help="Workers on each GPU.")  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


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


@main.command()
@click.argument("model")
@click.option("--name", help="Name to publish under. Default: that of OBJECT, or of the directory.")
@click.option("--base", help="A published model that this is a variant of: equal tensors are one memory.")
@click.option("--trust", is_flag=True, help="Open an archive that you have not written: this runs code from it.")
@_JSON
def put(model: str, name: str | None, base: str | None, trust: bool, as_json: bool) -> None:
    """Publish MODEL: an archive's directory, MODULE:OBJECT, or URL/DIGEST of a copy (setting zcinfer.remote).

    OBJECT is an nn.Module, or a function that returns one; MODULE is importable from here or from the installed
    packages ("mymodels:build" for build() in ./mymodels.py). Publishing the same content again changes nothing.
    """
    from . import catalog, publishing

    _see_here()
    published: Any = model
    if not os.path.isdir(model) and "://" not in model:
        published = _import_object(model)
        name = name or model.partition(":")[2].lower()
    ref = publishing.put(published, name, base=base, trust=trust)
    if as_json:
        click.echo(json.dumps(asdict(ref)))
    else:
        private = catalog.archive(ref).description.private_nbytes
        click.echo(f"{ref}  {format_size(ref.nbytes)} shared, {format_size(private)} private  {ref.digest[:12]}")


@main.command()
@click.option("--store", help="A running Ray, 'ray:HOST:PORT', to tell what it holds. Default: the registry alone.")
@_JSON
def ls(store: str | None, as_json: bool) -> None:
    """List the published models, and how full the registry's disk and a store are.

    With --store a model is "in use" where a process of this machine has it mapped, and "held" where nobody has.
    """
    from . import catalog
    from .model_table import in_words

    if store is not None:
        catalog.connect(store)
    table = catalog.models()
    budgets = catalog.budgets()
    for budget in budgets[1:]:
        held = {digest: "in use" if digest in budget.in_use else "held" for digest in budget.models}
        table["memory"] = table["digest"].map(held).fillna("")
    if as_json:
        click.echo(table.to_json(orient="records"))
        return
    if table.empty:
        click.echo("No models yet. Publish one: zcinfer put MODULE:OBJECT --name NAME")
    else:
        click.echo(in_words(table).to_string(index=False))
    for budget in budgets:
        click.echo(_printable(budget))


@main.command()
@click.argument("model")
@click.option("--verify", is_flag=True, help="Compare all contents with their digests.")
@_JSON
def info(model: str, verify: bool, as_json: bool) -> None:
    """Show what is known of MODEL: NAME, NAME@VERSION, or an archive's directory, also one that is not trusted.

    No code of an archive is run.
    """
    from pathlib import Path

    from . import catalog, config
    from .archive import Archive

    try:
        ref = catalog.resolve(model)
    except ZcinferError:
        if not os.path.isdir(model):
            raise
        name, archive = model, Archive(Path(model), ours=False)
    else:
        name, archive = str(ref), catalog.archive(ref)
    if verify:
        archive.verify()
    description, known = archive.description, archive in catalog.registry().seals
    facts = {
        "model": name,
        "class": description.class_name,
        "digest": description.digest,
        "shared bytes": description.nbytes,
        "private bytes": description.private_nbytes,
        "private": [f"{what}, {nbytes:,} bytes" for what, nbytes in description.private],
        "tensors": len(description.tensors),
        "storages": len(description.storages),
        "dtype": description.dtype,
        "submodules in train mode": len(description.training),
        "needs": description.requires,
        "directory": str(archive.directory),
        "trusted": known,
        "verified": verify,
    }
    if url := config.get("remote"):
        from .remote import Remote

        copies = Remote(str(url))
        whole = any(copies.is_whole(description.digest, upload) for upload in copies.uploads(description.digest))
        facts["copy"] = f"{copies.url}/{description.digest}" if whole else f"none at {copies.url}: put it again"
    if as_json:
        click.echo(json.dumps(facts))
    else:
        facts["trusted"] = "yes, this user wrote it" if known else "no: zcinfer put opens it with --trust alone"
        facts["verified"] = "contents agree with their digests" if verify else "not compared (--verify)"
        held = (f"{what}, {nbytes:,} bytes" for what, nbytes in description.private)
        facts["private"] = "; ".join(held) or "the skeleton alone"
        facts["needs"] = ", ".join(f"{name} {version}".strip() for name, version in description.requires.items())
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            click.echo(f"{name:>25}  {_printable(text)}")


@main.command()
@click.argument("models", nargs=-1, required=True)
def rm(models: tuple[str, ...]) -> None:
    """Forget MODELS (NAME: all its versions; NAME@VERSION: that one)."""
    from . import catalog

    for model in models:
        catalog.delete(model)
        click.echo(f"{model} is forgotten")


@main.command()
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
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core.")
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of workers started here.")
@click.option("--start-over", is_flag=True, help="Throw away what an earlier run of ours left in TARGET.")
@click.option("--report", type=click.Path(), metavar="FILE.html",
              help="Write the dashboard's page of this run, as one file, and its samples as FILE.jsonl.")  # fmt: skip
@_STORE
@_JSON
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
    workers: int | None,
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
    if scheduler is not None and workers is not None:
        raise SettingsError("--workers is for workers started here; those of --scheduler are what they are")
    if len(source) != (0 if named else 1):
        raise SettingsError("give SOURCE and TARGET; or TARGET alone, and one --input NAME=URL or more")
    rows: int | str = int(batch_size) if batch_size.isdigit() else batch_size
    which: int | str | None = int(output) if output is not None and output.lstrip("-").isdigit() else output

    from . import catalog, config
    from .guarded import Guard
    from .jobs import Job
    from .reporting import check_path
    from .reporting import report as reported

    _see_here()
    if report is not None:
        check_path(report)
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
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        guard=Guard(on_error, max_errors, check_finite),
    )
    if sys.stderr.isatty():  # seconds without a sign of life are for logs
        click.echo("starting ..." if scheduler is None else f"connecting to {scheduler} ...", err=True)
    if ray and store != "ray":
        catalog.connect(store)  # it may not answer
    with _cluster(workers, scheduler):
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


@main.command()
@click.option("--quick", is_flag=True, help="Fewer passages: under 45 seconds.")
@click.option("--ask", multiple=True, metavar="TEXT", help="A question of yours; may be repeated.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core, two at least.")
@click.option("--out", type=click.Path(), help="Keep the embeddings in this zarr array. Default: thrown away.")
@_STORE
@_JSON
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


@main.command()
@click.option("--workers", type=click.IntRange(1), help="Worker processes. Default: one per core.")
@click.option("--memory-limit", default="auto", show_default=True, help="Private memory a worker may use.")
@_GPUS
@_JOBS_PER_GPU
@click.option("--port", type=click.IntRange(0), default=8786, show_default=True, help="Port of the scheduler.")
@_STORE
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

    _see_here()
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


_BENCHMARKS = (
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


@main.command()
@click.argument("names", nargs=-1, type=click.Choice(_BENCHMARKS), metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Fewer rounds, to see that it works; all of them in under 10 minutes.")
@click.option("--out", type=click.Path(file_okay=False), default="benchmarks/results", show_default=True,
              help="Directory of the tables, the figures and the page.")  # fmt: skip
@click.option("--only", multiple=True, metavar="TEXT", help="Only models or systems whose names contain TEXT.")
@click.option("--again", is_flag=True, help="Measure nothing: show anew what an earlier run left in --out.")
@click.option("--docs", is_flag=True, help="Put the tables into docs/benchmarks.md of the source, and keep the ratios.")
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


@main.command()
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
@_GPUS
@_JOBS_PER_GPU
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

    
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

    _see_here()
    with dask.config.set({"zcinfer.ray.token-file": token_file} if token_file else {}):
        role = Head(host, port, ray_port) if join is None else Member(join, host, wait)
        serve(role, Workers(workers, memory_limit, gpus, jobs_per_gpu), click.echo)


@main.command()
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


def _cluster(workers: int | None, scheduler: str | None) -> Any:
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

        started = stack.enter_context(LocalCluster(n_workers=workers))
        if started.page_link is not None and sys.stderr.isatty():
            click.echo(f"dashboard {started.page_link}", err=True)
        stack.enter_context(started.get_client())
    return stack


def _import_object(text: str) -> Any:
    import importlib

    import torch

    module_name, _, path = text.partition(":")
    if not path or not module_name or module_name.startswith("."):
        raise SettingsError(f"{text!r} is neither an archive's directory nor MODULE:OBJECT, as in mymodels:build")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"no module {error.name!r}, looked for here ({os.getcwd()}) and among the packages"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"the module {module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = found()
    return found


def _printable(text: object) -> str:
    """A text of unknown origin, for a terminal, which obeys some characters."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in str(text))


def _named(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise SettingsError(f"--input {text!r}: write NAME=URL, as in --input input_ids=ids.zarr")
    return name, url
