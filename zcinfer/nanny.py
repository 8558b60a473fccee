"""What starts a worker, and starts it anew: with the variables that must be there before anything is imported.

Not for what a worker does once it runs (`worker`).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from typing import Any

import distributed

from .dask_upkeep import tick_seldom
from .device import ORDER, VISIBLE, gone
from .pinning import starting_with

log = logging.getLogger("zcinfer")

# Read by the thread pools of torch, MKL and OpenBLAS when they are loaded, and never again
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Held while a worker is born: the environment that it gets is, for that moment, the one of this process
_birth = threading.Lock()


class Nanny(distributed.Nanny):  # type: ignore[misc]
    """Nanny that sets the variables of ``env`` for threads and GPUs before its worker starts.

    Dask's ``env`` alone is too late: the new process first imports the user's script, and torch with it. A script that
    asks for CUDA at its top level would then have all GPUs, and every worker compute on the first.
    """

    def __init__(self, *args: Any, env: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, env=env, **kwargs)
        tick_seldom(self)
        self.pre_spawn_env.update({name: str(env[name]) for name in THREAD_VARIABLES})
        self.born_with = {name: str(env[name]) for name in (VISIBLE, ORDER) if name in env}
        self.patience = float("inf")
        self._begun = False

    async def instantiate(self) -> Any:
        """Start the worker."""
        if not self.born_with:
            return await super().instantiate()
        lost = gone(self.born_with) if self._begun else ""
        self._begun = True
        if lost:
            # It would find no GPU, and compute on the CPU.
            log.error("%s is not started again, and the others go on: %s", self.name, lost)
            await self.close(reason="zcinfer-gpu-lost")
            return self.status
        # Not waited for in a thread: one that is given up would take the lock, and keep it.
        while not _birth.acquire(blocking=False):
            await asyncio.sleep(0.002)
        try:
            starting = asyncio.ensure_future(super().instantiate())
            try:
                with starting_with(self.born_with):
                    while self.pid is None and not starting.done():
                        await asyncio.sleep(0.001)
            except BaseException:
                starting.cancel()
                raise
        finally:
            _birth.release()
        return await starting

    async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
        """End the worker, which has ``timeout`` seconds for what it is at, and no more than our patience."""
        await super().kill(min(timeout, self.patience), reason)
        if self.patience < timeout:
            shutil.rmtree(self.worker_dir, ignore_errors=True)  # which it had perhaps no time for
