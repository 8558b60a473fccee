"""The machines of a Dask cluster: which workers each has, and which of them cannot see a directory.

Not for what is on them (`prefetching`).
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from distributed import Client

# Seconds for an answer of all machines; who publishes is not kept longer
PATIENCE = 3.0


def workers_by_machine(client: Client) -> dict[str, list[str]]:
    """Addresses of workers, by the address of their machine."""
    machines: defaultdict[str, list[str]] = defaultdict(list)
    for address in client.scheduler_info(n_workers=-1)["workers"]:
        machines[urlsplit(address).hostname or address].append(address)
    return dict(machines)


def machines_without(client: Client, path: str) -> list[str] | None:
    """Addresses of the machines that do not see a path; None where there is one machine only, or some do not answer."""
    try:
        machines = workers_by_machine(client)
    except (OSError, TimeoutError):
        return None
    if len(machines) < 2:
        return None
    first = {workers[0]: machine for machine, workers in machines.items()}

    async def ask() -> dict[str, bool]:
        asked = client.run(_sees, path, workers=[*first], on_error="return")
        answers: dict[str, bool] = await asyncio.wait_for(asked, PATIENCE)
        return answers

    try:
        answers = client.sync(ask)
    except (OSError, TimeoutError):
        return None
    if any(not isinstance(answer, bool) for answer in answers.values()):
        return None
    return sorted(first[worker] for worker, sees in answers.items() if not sees)


async def _sees(path: str) -> bool:
    # Runs in a worker, beside its tasks: a file server may take its time
    return await asyncio.to_thread(os.path.exists, path)
