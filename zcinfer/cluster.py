"""A Dask cluster on this machine whose workers share models: processes that listen on the loopback address only.

Not for several machines (`node`). Not for the work itself: see `distributed.LocalCluster`, its base.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import dask.config
import distributed
from dask.system import cpu_count

from .activation import Activation, check_installed, is_installed
from .config import settings
from .errors import SettingsError
from .observer import Observer
from .sizes import parse_size

LOOPBACK = "127.0.0.1"
# Seconds that workers have for their end where the program was interrupted
INTERRUPTED = 1.0
PRELOAD = "zcinfer.worker"

# Read by the thread pools of torch, MKL and OpenBLAS when they are loaded, and never again
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Nanny(distributed.Nanny):  # type: ignore[misc]
    """Nanny that sets the thread variables of ``env`` before its worker starts.

    Dask's ``env`` alone is too late: the new process first imports the user's script, and torch with it.
    """

    def __init__(self, *args: Any, env: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, env=env, **kwargs)
        self.pre_spawn_env.update({name: str(env[name]) for name in THREAD_VARIABLES})
        self.patience = float("inf")

    async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
        """End the worker, which has ``timeout`` seconds for what it is at, and no more than our patience."""
        await super().kill(min(timeout, self.patience), reason)
        if self.patience < timeout:
            shutil.rmtree(self.worker_dir, ignore_errors=True)  # which it had perhaps no time for


class LocalCluster(distributed.LocalCluster):  # type: ignore[misc]
    """Dask scheduler and worker processes on this machine, ready to read shared models.

    Parameters
    ----------
    n_workers : int, optional
        Worker processes. Default: as many as the cores this process may use (its affinity mask and the CPU quota
        of its container).
    threads_per_worker : int
        Tasks that each worker runs at a time: one of them computes, the others read and write meanwhile.
    memory_limit : str, int, float or None
        Private memory of one worker ("4 GiB", bytes, or a fraction of the machine's); models in shared memory do
        not count. "auto": the machine's memory, divided by the workers. None: no limit.
    dashboard : bool, optional
        Whether there is a page to watch it on, `page_link`. Default: where the extra ``dashboard`` is installed, unless
        ``security`` keeps out others, who could read the page.
    **kwargs
        Passed to `distributed.LocalCluster`: ``dashboard_address`` (of Dask's own pages), ``scheduler_port``,
        ``local_directory``, ``env``, ``preload``, ``asynchronous`` and so on.

    Raises
    ------
    SettingsError
        An argument would open the cluster to other machines or run workers as threads; or the script that makes
        the cluster has no ``if __name__ == "__main__":``, or its workers cannot start.

    Notes
    -----
    Scheduler, workers and dashboard listen on 127.0.0.1. Other users of the machine can connect there; pass
    ``security=True`` to keep them out (needs the package ``cryptography``).

    Each worker gets ``cores // n_workers`` threads for its tensor operations, at least one, by OMP_NUM_THREADS and
    its like, unless ``env`` says otherwise. Dask sets such variables in the script's own environment too. Workers added
    later by ``scale`` get as many as the first.

    The page's program is started when somebody first opens the page; until then it costs nothing.

    Workers end when the script does, however it ends. What a killed worker had spilled to disk is removed when
    the next worker starts; it lies in a directory only this user can enter.

    Examples
    --------
    >>> with LocalCluster(n_workers=1) as cluster, cluster.get_client() as client:
    ...     client.submit(sum, [1, 2, 3]).result()
    6
    """

    _activation: Activation | None = None
    _dashboard = False

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None and not issubclass(kind, Exception):
            # Ctrl-C: what the workers are at is given up, and nobody wants to wait for it.
            for nanny in self.workers.values():
                nanny.patience = INTERRUPTED
            for name in ("distributed.nanny", "distributed.scheduler"):  # that they are lost is no news
                logging.getLogger(name).setLevel(logging.CRITICAL)
        super().__exit__(kind, *error)

    async def _start(self) -> None:
        await super()._start()
        await self.scheduler.register_scheduler_plugin(Observer(), name=Observer.name, idempotent=True)
        if self._dashboard:
            self._activation = Activation(self.scheduler_address, self.security)

    async def _close(self) -> None:
        if self._activation is not None:
            await self._activation.close()
        await super()._close()

    @property
    def page_link(self) -> str | None:
        """URL of the page that says how the work goes; None where there is none. Dask's own is ``dashboard_link``."""
        return self._activation.link if self._activation is not None else None

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        threads_per_worker: int = 2,
        memory_limit: str | float | None = "auto",
        dashboard: bool | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_reimport()
        _refuse_exposure(kwargs)
        if dashboard:
            check_installed()
        self._dashboard = dashboard if dashboard is not None else is_installed() and not kwargs.get("security")
        if threads_per_worker < 1 or (n_workers is not None and n_workers < 0):
            raise SettingsError(
                f"LocalCluster(n_workers={n_workers}, threads_per_worker={threads_per_worker}): a worker has at "
                "least one thread, and there cannot be fewer than no workers."
            )
        n_workers = cpu_count() if n_workers is None else n_workers
        if memory_limit != "auto":
            if isinstance(memory_limit, str):
                parse_size(memory_limit, "memory_limit")  # Dask's own error names no setting
            # Dask divides the machine's memory by the workers only where it is not told "auto".
            kwargs["memory_limit"] = memory_limit
        names = ("env", "config", "preload", "local_directory")
        options = worker_options(n_workers, **{name: kwargs.pop(name, None) for name in names})
        try:
            super().__init__(
                n_workers=n_workers,
                threads_per_worker=threads_per_worker,
                host=LOOPBACK,
                worker_class=Nanny,
                scheduler_kwargs={"local_directory": options["local_directory"]} | kwargs.pop("scheduler_kwargs", {}),
                dashboard_address=kwargs.pop("dashboard_address", f"{LOOPBACK}:0"),
                **options,
                **kwargs,
            )
        except RuntimeError as error:
            causes = [str(cause) for cause in (error.__cause__, error.__context__) if cause is not None]
            if any("in use" in cause for cause in causes):
                raise SettingsError(f"The cluster did not start: {causes[0]}. Choose another port.") from error
            raise SettingsError(
                f"The cluster did not start: {error} The processes that failed say why in the lines above. Does the "
                'script make its LocalCluster under if __name__ == "__main__":?'
            ) from error


def worker_options(
    n_workers: int,
    env: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    preload: str | list[str] | None = None,
    local_directory: str | Path | None = None,
) -> dict[str, Any]:
    """Arguments of the `Nanny` of each of ``n_workers`` on this machine, for workers that share models.

    What is given goes before what would be chosen.
    """
    cores = cpu_count()
    # A cluster that starts without workers grows later, to nobody knows how many.
    threads = max(1, cores // (n_workers or cores))
    # All our settings, since the workers take these in the place of what they have.
    ours = {"zcinfer": {**settings(), "jobs": n_workers or cores, "computing": 1}}
    return {
        "env": dict.fromkeys(THREAD_VARIABLES, str(threads)) | (env or {}),
        "config": dask.config.merge(ours, config or {}),
        "preload": _preloads(preload),
        "local_directory": str(local_directory or _scratch_directory()),
    }


def _refuse_reimport() -> None:
    """Refuse to make a cluster in a worker that is importing the script which makes the cluster."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError(
            "LocalCluster was called while a worker process imports this script: every worker runs the script's top "
            "level once, to know its functions and classes, and would start a cluster of its own. Make the cluster "
            'under if __name__ == "__main__": or in a function called from there.'
        )


def _refuse_exposure(kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `distributed.LocalCluster` that open ports to the network or run workers as threads."""
    if kwargs.pop("gpus", None) is not None or kwargs.pop("jobs_per_gpu", 1) != 1:
        raise SettingsError("workers pinned to GPUs are not there yet: leave out gpus= and jobs_per_gpu=")
    scheduler = kwargs.get("scheduler_kwargs") or {}
    for name in {"host", "interface", "contact_address", "dashboard_address", "protocol"} & scheduler.keys():
        raise SettingsError(f"scheduler_kwargs may not have {name}: the scheduler listens on {LOOPBACK} only")
    for name in {"host", "interface", "ip", "processes", "worker_class"} & kwargs.keys():
        raise SettingsError(
            f"zcinfer.LocalCluster runs processes that listen on {LOOPBACK} only and does not take {name}=. For "
            f"several machines: zcinfer node, or workers started with dask worker --preload {PRELOAD} SCHEDULER"
        )
    for name in {"dashboard_address", "worker_dashboard_address"} & kwargs.keys():
        address = kwargs[name]
        if address is not None and not str(address).startswith((f"{LOOPBACK}:", "localhost:")):
            raise SettingsError(
                f"{name}={address!r} would listen on all addresses of this machine. Give it as '{LOOPBACK}:PORT'."
            )


def _preloads(asked: str | list[str] | None) -> list[str]:
    """Modules that each worker imports at its start: ours, then those of the argument or of Dask's configuration."""
    if asked is None:
        asked = dask.config.get("distributed.worker.preload")
    return [PRELOAD, *(name for name in ([asked] if isinstance(asked, str) else asked) if name != PRELOAD)]


def _scratch_directory() -> Path:
    """Directory for what workers spill, the same at every start.

    Dask locks what it uses in there and removes what no living process has locked; and it puts the directory on
    ``sys.path``, so that nobody else may write to it.
    """
    parent = dask.config.get("temporary-directory") or tempfile.gettempdir()
    path = Path(parent) / f"zcinfer-{os.geteuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SettingsError(
            f"{path} is not a directory of this user (it belongs to uid {found.st_uid}), so spilled data is not safe "
            "there. Give LocalCluster(local_directory=...) or set DASK_TEMPORARY_DIRECTORY."
        )
    path.chmod(0o700)
    return path
