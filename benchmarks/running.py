"""Run benchmarks by name: what each needs, one or all of them, and everything written and printed.

``zcinfer bench`` and the make targets call `bench`, and nothing else does.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from zcinfer.errors import SettingsError

from . import guard
from .benchmark import Benchmark, Options, all_tables, say


@dataclass(frozen=True)
class Entry:
    """A benchmark that can be asked for: its module beside this one, the packages that it imports, and a GPU."""

    module: str
    needs: tuple[str, ...]
    gpu: bool = False


# Seconds that a benchmark has for its end
PATIENCE = 30
# Plots of each that the docs show; a page has all of them
PICTURED = 2
SHOWN = ("bokeh", "rich")
PEERS = ("transformers", "safetensors", "ray_zerocopy")
ENTRIES = {
    "load": Entry("load", (*SHOWN, *PEERS)),
    "article": Entry("article", (*SHOWN, *PEERS)),
    "talk": Entry("talk", SHOWN),
    "throughput": Entry("throughput", (*SHOWN, "transformers", "pyarrow")),
    "models": Entry("many_models", (*SHOWN, "transformers")),
    "overlap": Entry("overlap", (*SHOWN, "aiohttp")),
    "windows": Entry("windows", SHOWN),
    "telemetry": Entry("telemetry", (*SHOWN, "panel")),
    "nodes": Entry("nodes", SHOWN),
    "gpu": Entry("gpu", SHOWN, gpu=True),
}


def bench(
    names: Sequence[str], options: Options, *, docs: bool = False, again: bool = False, check: bool = False
) -> None:
    """Run benchmarks, and show and write what was found.

    Parameters
    ----------
    names : sequence of str
        Of `ENTRIES`; "all" or nothing: every one that can run here, each in a process of its own.
    options : Options
    docs : bool
        Also put the tables of whole runs and a picture of their first plots into ``docs`` of the checkout, and the
        ratios where ``check`` finds them.
    again : bool
        Measure nothing: show and write anew what an earlier run left in ``options.out``.

    check : bool
        Fail where a ratio is a third worse than in the run that was committed last.

    Raises
    ------
    SettingsError
        One cannot run here, or no picture can be made; says why, and what to install. Or a ratio has fallen.
    """
    with _ended_by_sigterm():
        if len(names) == 1 and names[0] != "all":
            one(names[0], options, docs=docs, again=again, check=check)
        else:
            asked = list(ENTRIES) if not names or "all" in names else list(dict.fromkeys(names))
            switches = ["--docs"] * docs + ["--again"] * again + ["--check"] * check
            several(asked, options, switches)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what was started, and removes gigabytes of temporary files, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def why_not(name: str) -> str:
    """Why a benchmark cannot run here; "" if it can."""
    entry = ENTRIES[name]
    if entry.gpu:
        import torch

        if not torch.cuda.is_available():
            return f"it needs a GPU, and torch {torch.__version__} finds none"
    lacking = [package for package in entry.needs if importlib.util.find_spec(package) is None]
    if lacking:
        return f"it needs packages that are not installed: {', '.join(lacking)}. pip install 'zcinfer[bench]'"
    if importlib.util.find_spec(f"{__package__}.{entry.module}") is None:
        return "it is not part of this version"
    return ""


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of that name; imports what it needs."""
    found = importlib.import_module(f".{ENTRIES[name].module}", __package__).BENCHMARK
    assert isinstance(found, Benchmark)
    return found


def one(name: str, options: Options, *, docs: bool, again: bool, check: bool) -> None:
    """Run one benchmark in this process."""
    reason = why_not(name)
    if reason:
        raise SettingsError(f"the benchmark {name!r} cannot run here: {reason}")
    from rich.console import Console

    from . import pictures
    from .machine import ROOT, machine
    from .pages import facts, into_docs, write

    if docs and not options.quick and pictures.why_not():
        raise SettingsError(f"the benchmark {name!r} cannot go into the docs from here: {pictures.why_not()}")

    benchmark = benchmark_of(name)
    path = options.out / f"{name}.json"
    if not again:
        begin = perf_counter()
        results = {"on": machine(), "quick": options.quick} | benchmark.measure(options)
        results["took"] = perf_counter() - begin
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
    elif not path.exists():
        raise SettingsError(f"{path} is not there: run it without --again first")
    results = json.loads(path.read_text())
    write(options.out, benchmark, results)
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(f"\n[bold]{benchmark.title}[/]\n{facts(results)}\n", highlight=False)
    for table in all_tables(benchmark, results):
        console.print(table.rich(), "", highlight=False)
    say(f"took {results['took']:.0f} s; written: {path.with_suffix('')}.json, .csv, .md and .html")
    if docs:
        if not results["quick"]:  # whose figures say little
            picture = f"images/benchmark-{name}.png"
            pictures.write_picture(ROOT / "docs" / picture, benchmark.figures(results)[:PICTURED])
            into_docs(ROOT / "docs" / "benchmarks.md", benchmark, results, picture)
        guard.keep(ROOT / "benchmarks" / guard.FILE, name, results)
    if check:
        said = guard.fallen(Path(__file__).parent / guard.FILE, name, results)
        if said:
            raise SettingsError("worse by a third than the committed run: " + "; ".join(said))


def several(names: Sequence[str], options: Options, switches: Sequence[str]) -> None:
    """Run benchmarks in a process each, since each forks, connects and measures memory; then one page of them all."""
    able = [name for name in names if not why_not(name)]
    if not able:
        raise SettingsError("; ".join(f"{name}: {why_not(name)}" for name in names))
    begin, failed = perf_counter(), []
    for name in able:
        say(f"== {name}")
        command = [sys.executable, "-m", "zcinfer", "bench", name, "--out", str(options.out)]
        command += [*["--quick"] * options.quick, *switches]
        command += [word for text in options.only for word in ("--only", text)]
        if _called(command) != 0:
            failed.append(name)
    from .pages import page

    good = [name for name in able if name not in failed]
    runs = [(benchmark_of(name), json.loads((options.out / f"{name}.json").read_text())) for name in good]
    if runs:
        (options.out / "all.html").write_text(page("zcinfer: benchmarks", runs))
    for name in names:
        if name not in able:
            say(f"{name}: did not run, since {why_not(name)}")
    say(f"{len(good)} benchmarks in {perf_counter() - begin:.0f} s; all of them: {options.out / 'all.html'}")
    if failed:
        raise SettingsError(f"failed, with the reason above: {', '.join(failed)}")


def _called(command: Sequence[str]) -> int:
    """Exit status of a command, which is asked to end where this process is, and has time for it."""
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": _path()}) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _path() -> str:
    """Where this zcinfer is imported from comes first, whatever the current directory."""
    package = Path(__file__).absolute().parents[1]  # not resolved: benchmarks is a link in a checkout
    return os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
