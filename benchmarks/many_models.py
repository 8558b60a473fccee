"""Many models on demand: how many requests a second do six workers hold, if each asks for one of twelve models?

Users arrive at random (Poisson, whether or not others have been served), choose a model (the n-th with a weight of
1/n), and give up after five seconds. Each request is a sentence of 32 tokens for a small BERT (4 layers of 256, 45
MB); there are twelve of them, with random weights. *Held* is the largest rate tried with under 1 % of users who gave
up, and at its end no queue that is longer than half a second of them; latencies are counted from a user's arrival.
Systems, on the same machine with one thread each: all models in every one of six Dask workers (by `torch.load`, and
by `from_pretrained`, which maps files), `from_pretrained` in every request, Ray actors that keep one model each, of
which as many run as fit into the memory of zcinfer's workers and store (started on demand, the least recently used
ended for it; and a kinder form, where the least recently used loads the other model), and zcinfer:
`client.submit(predictor, x)`. Every answer is compared with plain torch. *Memory* is what all processes hold more
than before, those shared counted by share (PSS), once every worker has read every byte of every model; without what a
worker takes to connect to a store.

Not shown: users on a network, batches of several users' rows (which a model server makes, and this does not), and GPUs.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import dask
import numpy as np
import psutil
import ray
import torch
import transformers
from distributed import Client

import zcinfer as zc
from zcinfer import catalog, loading, stores

from .benchmark import Benchmark, Options, bar, say
from .figures import bars
from .measure import summary
from .models import mini_bert
from .tables import Table

# Models, and workers; of a quick run, nearly all of which goes into processes that start
MODELS, WORKERS = 12, 6
QUICK_MODELS, QUICK_WORKERS = 4, 2
# Users who wait while it is seen what a system can do at most; requests that may be left when the last user has come.
WAITING, UNANSWERED = 18, 12
TIMEOUT, GIVEN_UP, LEFT = 5.0, 0.01, 0.5  # seconds; part of the users; seconds of them
TOKENS = np.arange(1, 33)[None]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT = ONE_THREAD | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
OURS, RESIDENT, MAPPED = "zcinfer", "all resident, torch.load", "all resident, from_pretrained"
EACH = "from_pretrained in every request"
ACTORS, SWAPPED = "actors, started on demand", "actors, models loaded on demand"
TIMES_ACTORS, OF_RESIDENT, MEMORY = 3, 0.9, 0.25


class System:
    """What answers requests; held in Dask workers or in actors."""

    name = ""

    async def start(self) -> None:
        """Make all workers ready, each model used once by each."""

    async def ask(self, number: int) -> Any:
        """The last hidden state of `TOKENS`, by a model."""
        raise NotImplementedError


class Ours(System):
    name = OURS

    def __init__(self, client: Client, models: int):
        self.client = client
        self.predictors = [zc.Predictor(f"bert-{n}", output="last_hidden_state") for n in range(models)]

    async def start(self) -> None:
        for predictor in self.predictors:
            await self.client.run(used, predictor)

    async def ask(self, number: int) -> Any:
        return await whole(self.client.submit(self.predictors[number], TOKENS, pure=False))


class InWorkers(System):
    """A function of a directory and a number, in Dask workers that keep models or do not."""

    def __init__(self, client: Client, directory: Path, name: str, models: int):
        self.client, self.directory, self.name, self.models = client, directory, name, models

    async def start(self) -> None:
        for number in range(self.models):
            await self.client.run(answer, self.name, str(self.directory), number)

    async def ask(self, number: int) -> Any:
        return await whole(self.client.submit(answer, self.name, str(self.directory), number, pure=False))


async def whole(future: Any) -> Any:
    """The result; a user who gives up does not end others' waiting, though Dask's client fetches results together."""
    return await asyncio.shield(future.result())


class Pool:
    """Ray actors that keep a model each, and who waits for which."""

    def __init__(self, directory: Path, most: int):
        self.directory, self.most = directory, most
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.waiting: Counter[int] = Counter()
        self.idle = asyncio.Condition()

    def new(self, number: int) -> Any:
        """An actor, which keeps that model from now on."""
        self.kept[number] = actor_class().remote(str(self.directory))
        return self.kept[number]

    def stop(self) -> None:
        """End all of them."""
        for actor in self.kept.values():
            ray.kill(actor)
        self.kept.clear()


class Actors(System):
    """Actors of a pool; where it is full, the least recently used that is idle makes room: ends, or loads the model."""

    def __init__(self, pool: Pool, name: str):
        self.pool, self.name = pool, name

    async def start(self) -> None:
        await asyncio.gather(*(self.ask(number) for number in range(self.pool.most)))

    async def ask(self, number: int) -> Any:
        pool = self.pool
        async with pool.idle:
            while number not in pool.kept and not self._room(number):
                await pool.idle.wait()
            actor = pool.kept.get(number) or pool.new(number)
            pool.kept.move_to_end(number)
            pool.waiting[number] += 1
        try:
            return await actor.answer.remote(number, TOKENS)
        finally:
            async with pool.idle:
                pool.waiting[number] -= 1
                pool.idle.notify_all()

    def _room(self, number: int) -> bool:
        """Whether there is room for another, which is made where there can be."""
        pool = self.pool
        if len(pool.kept) < pool.most:
            return True
        unused = next((other for other in pool.kept if not pool.waiting[other]), None)
        if unused is None:
            return False
        actor = pool.kept.pop(unused)
        if self.name == ACTORS:
            ray.kill(actor)
        else:
            pool.kept[number] = actor
        return True


def actor_class() -> Any:
    """An actor that keeps the model that it was last asked for."""

    class Keeper:  # in a function, to travel by value: Ray's workers do not know this file
        def __init__(self, directory: str):
            self.directory, self.number, self.model = directory, -1, None

        def answer(self, number: int, tokens: Any) -> Any:
            import torch
            import transformers

            transformers.utils.logging.disable_progress_bar()
            torch.set_num_threads(1)
            if number != self.number:
                self.model = transformers.BertModel.from_pretrained(f"{self.directory}/{number}").eval()
                self.number = number
            with torch.inference_mode():
                return self.model(torch.from_numpy(tokens.copy()))[0].numpy()  # type: ignore[misc]

    return ray.remote(Keeper).options(num_cpus=0, max_concurrency=1, runtime_env={"env_vars": ENVIRONMENT})


_kept: dict[tuple[str, int], Any] = {}


def answer(name: str, directory: str, number: int) -> Any:
    """In a Dask worker: by a model that it keeps, or loads for this."""
    model = _kept.get((name, number))
    if model is None:
        transformers.utils.logging.disable_progress_bar()
        if name == RESIDENT:
            model = torch.load(f"{directory}/{number}.pt", weights_only=False)
        else:
            model = transformers.BertModel.from_pretrained(f"{directory}/{number}").eval()
        if name != EACH:
            read(model)
            _kept[name, number] = model
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS))[0].numpy()


def used(predictor: zc.Predictor) -> None:
    """In a Dask worker: the predictor's model is there, has been used, and all of its bytes have been read."""
    predictor(TOKENS)
    with loading.residents.lend(predictor.ref, "cpu", predictor.training) as model:
        read(model)


def read(model: torch.nn.Module) -> None:
    """Read every byte of the weights, so that all of them count as this process's memory, or its share."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1).view(torch.uint8).max()


def connected(store: str) -> None:
    """In a Dask worker: it has been in the store."""
    stores.open_store(store)


def measure(options: Options) -> dict[str, Any]:
    """Publish the models, start the workers, and look for the rate that each system holds."""
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="zcinfer-bench-") as directory,
        dask.config.set({
            "zcinfer.registry": f"{directory}/registry",
            "zcinfer.ray.object-store-memory": "3 GB",
            "distributed.admin.system-monitor.gil.enabled": False,
        }),
    ):  # fmt: skip
        models, workers = (QUICK_MODELS, QUICK_WORKERS) if options.quick else (MODELS, WORKERS)
        say(f"{models} models: publishing")
        answers = [publish(number, Path(directory)) for number in range(models)]
        say(f"{workers} workers: starting")
        try:
            zc.connect("ray")
            ray_alone = pss()  # which the actors need too
            with zc.LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=None, env=ENVIRONMENT
            ) as cluster:
                results = asyncio.run(compared(cluster.scheduler_address, Path(directory), answers, ray_alone, options))
        finally:
            catalog.disconnect()
    results |= {"workers": workers, "bars": compare(results)}
    return results


def publish(number: int, directory: Path) -> Any:
    """One model in all forms; its answer."""
    model: Any = mini_bert(number)
    model.save_pretrained(directory / str(number))
    torch.save(model, directory / f"{number}.pt")
    zc.put(model, f"bert-{number}")
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS))[0].numpy()


async def compared(
    address: str, directory: Path, answers: Sequence[Any], ray_alone: int, options: Options
) -> dict[str, Any]:
    """Start all systems, one after the other, for their memory; then look for their rates in turn."""
    rounds, seconds, step, most = (1, 3.0, 1.5, 2) if options.quick else (3, 20.0, 1.1, 8)
    memory: dict[str, int] = {}
    models, systems = len(answers), list[System]()
    async with Client(address, asynchronous=True) as client:
        await client.run(answer, EACH, str(directory), 0)  # imports
        imported = pss()
        await client.run(connected, zc.Predictor("bert-0").ref.store)
        before = pss()
        connection = before - imported

        async def add(system: System) -> None:
            nonlocal before
            say(f"{system.name}: starting")
            await system.start()
            now = pss()
            memory[system.name], before = now - before, now
            if options.wants(system.name):
                systems.append(system)

        await add(Ours(client, models))
        budget = before - ray_alone  # workers, and the store
        for name in (RESIDENT,) if options.quick else (RESIDENT, MAPPED, EACH):
            await add(InWorkers(client, directory, name, models))
        say(f"{ACTORS}: starting one, for what it takes")
        pool = Pool(directory, 1)
        swapped, killed = Actors(pool, SWAPPED), Actors(pool, ACTORS)
        await swapped.start()
        one = pss() - before
        pool.most = max(1, min(models - 1, budget // one))
        say(f"{ACTORS}: starting {pool.most}")
        await swapped.start()
        memory[SWAPPED] = memory[ACTORS] = pss() - before
        systems += [system for system in (swapped, killed) if options.wants(system.name)]
        found: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
        guess: dict[str, float] = {}
        for number in range(rounds):
            for system in systems:
                say(f"round {number + 1} of {rounds}: {system.name}")
                if system.name not in guess:
                    guess[system.name] = 0.8 * await capacity(system, answers, seconds / 2)
                held = await largest(system, answers, guess[system.name], seconds, step, most)
                guess[system.name] = max(held["rate"], 1.0)
                found[system.name].append(held)
        pool.stop()
    return {
        "models": models,
        "rounds": rounds,
        "trial": seconds,
        "step": step,
        "connection": connection,
        "fit": pool.most,
        "actor": one,
        "budget": budget,
        "memory": memory,
        "systems": {
            name: {
                "rate": summary([one["rate"] for one in all_held]),
                **{key: summary([one[key] for one in all_held]) for key in ("p50", "p95", "p99")},
                "given up": max(one["given up"] for one in all_held),
            }
            for name, all_held in found.items()
        },
    }


def pss() -> int:
    """Bytes of all processes below this one, those shared counted by share."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


async def one_request(system: System, number: int, expected: Any, arrived: float) -> float | None:
    """Seconds from the arrival of a user to the answer; None where he gave up."""
    try:
        async with asyncio.timeout(arrived + TIMEOUT - perf_counter()):
            found = await system.ask(number)
    except TimeoutError:
        return None
    if not np.array_equal(found, expected):
        raise SystemExit(f"{system.name}: model {number} gives another answer")
    return perf_counter() - arrived


def chosen(users: int, seed: int, models: int) -> list[int]:
    """The models that users ask for: the n-th with a weight of 1/n."""
    weights = 1 / np.arange(1, models + 1)
    drawn = np.random.default_rng(seed).choice(models, users, p=weights / weights.sum())
    return [int(number) for number in drawn]


async def capacity(system: System, answers: Sequence[Any], seconds: float) -> float:
    """Requests a second while there are always some waiting: where to begin to look."""
    numbers, done = chosen(10_000, 1, len(answers)), 0
    begin = perf_counter()

    async def user() -> None:
        nonlocal done
        while perf_counter() - begin < seconds:
            number = numbers[done % len(numbers)]
            done += 1
            await one_request(system, number, answers[number], perf_counter())

    await asyncio.gather(*(user() for _ in range(WAITING)))
    return done / (perf_counter() - begin)


async def trial(system: System, answers: Sequence[Any], rate: float, seconds: float) -> dict[str, Any]:
    """Let users arrive for some seconds; ended early where too many have given up."""
    drawn = np.random.default_rng(0)
    arrivals = np.cumsum(drawn.exponential(1 / rate, max(10, int(rate * seconds))))
    numbers = chosen(len(arrivals), 2, len(answers))
    tasks: list[asyncio.Task[float | None]] = []
    begin, gave_up = perf_counter(), 0

    def ended(task: asyncio.Task[float | None]) -> None:
        nonlocal gave_up
        gave_up += not task.cancelled() and task.exception() is None and task.result() is None

    for arrival, number in zip(arrivals, numbers, strict=True):
        await asyncio.sleep(begin + float(arrival) - perf_counter())
        task = asyncio.create_task(one_request(system, number, answers[number], begin + float(arrival)))
        task.add_done_callback(ended)
        tasks.append(task)
        if gave_up > GIVEN_UP * len(arrivals):
            break
    left = sum(not task.done() for task in tasks)
    found = await asyncio.gather(*tasks)
    latencies = [one for one in found if one is not None]
    part = 1 - len(latencies) / len(found)
    quantiles = np.quantile(latencies or [TIMEOUT], (0.5, 0.95, 0.99))
    return {
        "rate": rate,
        "held": part < GIVEN_UP and left <= max(UNANSWERED, LEFT * rate),
        "given up": part,
        **{name: float(value) for name, value in zip(("p50", "p95", "p99"), quantiles, strict=True)},
    }


async def largest(
    system: System, answers: Sequence[Any], guess: float, seconds: float, step: float, most: int
) -> dict[str, Any]:
    """The largest rate held, by steps up from a guess or down from it."""
    best: dict[str, Any] | None = None
    rate = guess
    for _ in range(most):
        found = await trial(system, answers, rate, seconds)
        say(f"  {rate:,.1f} requests/s: {'held' if found['held'] else 'not held'}, p99 {found['p99'] * 1e3:,.0f} ms")
        if found["held"]:
            best = found
            if rate < guess:
                break
            rate *= step
        elif best is not None:
            break
        else:
            rate /= step
    return best or found | {"rate": 0.0}


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """The bars, for the systems that ran."""
    rate = {name: one["rate"]["median"] for name, one in results["systems"].items()}
    memory = results["memory"]
    found = {}
    if OURS not in rate:
        return {}
    for name in (ACTORS, SWAPPED):
        if rate.get(name):
            found[f"rate, by that of: {name}"] = bar(TIMES_ACTORS, rate[OURS] / rate[name])
        elif name in rate:
            found[f"rate, where none was held by: {name}"] = bar(1, rate[OURS], unit="requests/s")
    if rate.get(RESIDENT):
        found[f"rate, by that of: {RESIDENT}"] = bar(OF_RESIDENT, rate[OURS] / rate[RESIDENT])
    found[f"memory, by that of: {RESIDENT}"] = bar(MEMORY, memory[OURS] / memory[RESIDENT], most=True)
    return found


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of all systems."""
    systems, memory = results["systems"], results["memory"]
    base = systems[OURS]["rate"]["median"] if OURS in systems else None
    rows = [
        [name, one["rate"]["median"] / base if base else None, memory[name] / memory[OURS], one["rate"], one["p50"],
         one["p95"], one["p99"], memory[name]]
        for name, one in systems.items()
    ]  # fmt: skip
    columns = {"system": "", "rate, by zcinfer's": "x", "memory, by zcinfer's": "x", "rate held": "requests/s",
               "p50": "ms", "p95": "ms", "p99": "ms", "memory": "MB"}  # fmt: skip
    note = (
        f"{results['rounds']} round(s) of trials of {results['trial']:g} s, rates in steps of {results['step']:g}; "
        f"latencies at the rate held. {results['fit']} actors of {results['actor'] / 1e6:,.0f} MB each fit into the "
        f"{results['budget'] / 1e6:,.0f} MB of zcinfer's workers and store; actors' memory is that of their "
        "processes, that of the others what they hold more for the models. The workers' connections to the "
        f"store take {results['connection'] / 1e6:,.0f} MB in all, which are not in it."
    )
    return [
        Table(
            f"{results['models']} small BERTs, {results['workers']} workers, one sentence a request",
            columns,
            rows,
            note,
        )
    ]


def figures(results: Mapping[str, Any]) -> list[Any]:
    """Rates, and memory."""
    systems = results["systems"]
    return [
        bars("requests per second held", "requests/s", {n: s["rate"] for n, s in systems.items()}, most=True),
        bars("memory for the models", "MB", {n: results["memory"][n] for n in systems}),
    ]


BENCHMARK = Benchmark("models", "Many models on demand", __doc__, measure, tables, figures)
