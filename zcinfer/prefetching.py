"""Bring a model to all machines of a cluster before a job needs it.

For: the first load on a machine, which waits for the network; and the machine that has the model at first, whose link
would be asked by all others at once. Not for loads themselves (`loading`): what is brought is in shared memory, and no
worker has built a module of it.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import SettingsError, StoreUnavailable
from .machines import workers_by_machine
from .progress import bytes_bar
from .store import ModelRef
from .stores import open_store

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client


def prefetch(model: str | ModelRef, client: Client | None = None, *, progress: bool | None = None) -> pd.DataFrame:
    """Have a model in shared memory on each machine of a Dask cluster.

    Parameters
    ----------
    model : str or ModelRef
    client : distributed.Client, optional
        Default: the current one; without any, this machine alone.
    progress : bool, optional
        Show a bar, where it takes more than a second. Default: on a terminal.

    Returns
    -------
    pandas.DataFrame
        One row a machine, in the order in which they had it: ``node`` (its address), ``workers`` (how many there will
        read it), ``bytes`` (that came from elsewhere for it; 0 where it was there) and ``seconds`` (from its turn on).

    Raises
    ------
    StoreUnavailable
        Machines did not get it; says which, and why. All others have it.
    SettingsError
        The cluster has no workers.

    Notes
    -----
    Each machine that has the model passes it on, and one that has it serves one other at a time: the number of those
    that have it doubles, and the first sends it about log2(machines) times. A machine is asked by one of its workers,
    also while all of them compute. Ray may drop what was brought and is not in use when its memory is short.

    Examples
    --------
    >>> import torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(2, 3), "doc-prefetch")
    >>> prefetch("doc-prefetch")["node"].tolist()
    ['localhost']
    """
    import pandas as pd

    ref = catalog.ready(model)
    client = client if client is not None else catalog.dask_client()
    if client is None:
        begin = perf_counter()
        rows = [("localhost", 1, open_store(ref.store).bring(ref.digest), perf_counter() - begin)]
    else:
        nodes = workers_by_machine(client)
        if not nodes:
            raise SettingsError(
                f"the cluster at {client.scheduler.address} has no workers that could read the model yet"
            )
        with bytes_bar(f"prefetch {ref}", ref.nbytes * len(nodes), progress) as advance:
            rows = client.sync(_spread, client, ref, nodes, lambda: advance(ref.nbytes))
    return pd.DataFrame(rows, columns=["node", "workers", "bytes", "seconds"])


async def _spread(
    client: Client, ref: ModelRef, nodes: dict[str, list[str]], advance: Any
) -> list[tuple[str, int, int, float]]:
    # A file server does not send less if others wait
    free = asyncio.Semaphore(1 if ref.store.startswith("ray:") else len(nodes))
    rows: list[tuple[str, int, int, float]] = []
    failures: list[str] = []

    async def bring(node: str, workers: list[str]) -> None:
        await free.acquire()
        begin = perf_counter()
        answers = await client.run(_bring, ref, workers=workers[:1], on_error="return")
        answer = next(iter(answers.values()), "its worker is gone")
        if isinstance(answer, int):
            rows.append((node, len(workers), answer, perf_counter() - begin))
            free.release()  # it serves the next one itself
        else:
            failures.append(f"{node}: {answer}")
        free.release()
        advance()

    await asyncio.gather(*(bring(node, workers) for node, workers in nodes.items()))
    if failures:
        raise StoreUnavailable(
            f"{ref} did not come to {len(failures)} of {len(nodes)} machines. {'; '.join(failures[:5])}. All others "
            "have it; call prefetch again when these are mended."
        )
    return rows


async def _bring(ref: ModelRef) -> int:
    """Runs in a worker, beside its tasks."""
    return await asyncio.to_thread(lambda: open_store(ref.store).bring(ref.digest))
