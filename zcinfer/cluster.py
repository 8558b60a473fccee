"""A Dask cluster on this machine whose workers share models: processes that listen on the loopback address only.

Not for several machines (`node`). Not for the work itself: see `distributed.LocalCluster`, its base.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import os
import stat
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import dask.config
import distributed
from dask.system import cpu_count

from .activation import Activation, check_installed, is_installed
from .config import settings
from .dask_upkeep import bound_spans, upkeep_settings
from .device import ORDER, VISIBLE
from .errors import SettingsError
from .nanny import THREAD_VARIABLES, Nanny
from .notebook import facts, link
from .observer import Observer
from .pinning import Pinning
from .sizes import format_size, parse_size

LOOPBACK = "127.0.0.1"
# Seconds that workers have for their end where the program was interrupted
INTERRUPTED = 1.0
PRELOAD = "zcinfer.worker"
_REFUSED = {"host", "interface", "ip", "processes", "worker_class"}


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
    gpus : "all", int, str, or a sequence of int and str, optional
        Workers on GPUs, in place of ``n_workers``: each sees one GPU alone. Numbers as nvidia-smi counts them, UUIDs
        ("GPU-...", "MIG-...") or the beginning of one. "all": those that CUDA_VISIBLE_DEVICES does not hide. Default:
        every worker sees what this process does. Needs the extra ``gpu``.
    jobs_per_gpu : int
        Workers on each GPU.
    dashboard : bool, optional
        Whether there is a page to watch it on, `page_link`. Default: where the extra ``dashboard`` is installed, unless
        ``security`` keeps out others, who could read the page.
    **kwargs
        Passed to `distributed.LocalCluster`: ``dashboard_address`` (of Dask's own pages), ``scheduler_port``,
        ``local_directory``, ``env``, ``preload``, ``asynchronous`` and so on.

    Raises
    ------
    SettingsError
        An argument would open the cluster to other machines or run workers as threads; or a GPU is not there, is hidden
        by CUDA_VISIBLE_DEVICES or was given twice; or the script that makes the cluster has no
        ``if __name__ == "__main__":``, or its workers cannot start.

    Notes
    -----
    Scheduler, workers and dashboard listen on 127.0.0.1. Other users of the machine can connect there; pass
    ``security=True`` to keep them out (needs the package ``cryptography``).

    Each worker gets ``cores // n_workers`` threads for its tensor operations, at least one, by OMP_NUM_THREADS and
    its like, unless ``env`` says otherwise. Dask sets such variables in the script's own environment too. Workers added
    later by ``scale`` get as many as the first.

    A worker on a GPU is named after it and its job ("gpu0-job1", "gpu1-mig2-job0"), has ``1 / jobs_per_gpu`` of Dask's
    resource "GPU", and runs on the CPUs near its GPU where the driver names them. It is born with CUDA_VISIBLE_DEVICES,
    so that scripts may use CUDA at their top level; this process starts no CUDA. ``scale`` cannot go beyond the GPUs.

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
    _pinning: Pinning | None = None

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None and not issubclass(kind, Exception):
            # Ctrl-C: what the workers are at is given up, and nobody wants to wait for it.
            for nanny in self.workers.values():
                nanny.patience = INTERRUPTED
            for name in ("distributed.nanny", "distributed.scheduler"):  # that they are lost is no news
                logging.getLogger(name).setLevel(logging.CRITICAL)
        super().__exit__(kind, *error)

    async def _start(self) -> None:
        if self._pinning is not None:
            # In the place of the numbered ones that the base class would start
            self.worker_spec = {name: self._pinned(options) for name, options in self._pinning.workers().items()}
        with dask.config.set(upkeep_settings({})):  # of this process, as a scheduler reads them when it starts
            await super()._start()
        bound_spans(self.scheduler)
        await self.scheduler.register_scheduler_plugin(Observer(), name=Observer.name, idempotent=True)
        if self._dashboard:
            self._activation = Activation(self.scheduler_address, self.security)

    async def _close(self) -> None:
        if self._activation is not None:
            await self._activation.close()
        await super()._close()

    def _pinned(self, options: dict[str, Any]) -> dict[str, Any]:
        common = self.new_spec["options"]
        resources = {**(common.get("resources") or {}), **options["resources"]}
        mine = {**common, **options, "env": {**common["env"], **options["env"]}, "resources": resources}
        return {"cls": self.new_spec["cls"], "options": mine}

    def new_worker_spec(self) -> dict[Any, Any]:
        """Name and specification of the next worker; on GPUs, of the first that is missing."""
        if self._pinning is None:
            found: dict[Any, Any] = super().new_worker_spec()
            return found
        for name, options in self._pinning.workers().items():
            if name not in self.worker_spec:
                return {name: self._pinned(options)}
        raise SettingsError(
            f"the {len(self._pinning)} workers that gpus= and jobs_per_gpu={self._pinning.jobs} give places to are "
            "there: make a cluster with more jobs_per_gpu"
        )

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """Let the number of workers follow the work: as `distributed.LocalCluster`; on GPUs, up to their places."""
        if self._pinning is not None:
            kwargs["maximum"] = min(kwargs.get("maximum", len(self._pinning)), len(self._pinning))
        return super().adapt(*args, **kwargs)

    @property
    def gpus(self) -> list[str]:
        """A line for each GPU that workers are on: what it is, how many jobs, near which CPUs."""
        return self._pinning.told() if self._pinning is not None else []

    @property
    def page_link(self) -> str | None:
        """URL of the page that says how the work goes; None where there is none. Dask's own is ``dashboard_link``."""
        return self._activation.link if self._activation is not None else None

    def _repr_html_(self, cluster_status: Any = None) -> str:
        theirs = str(super()._repr_html_(cluster_status))
        if self.status is not distributed.Status.running:
            return theirs
        workers = self.scheduler.workers.values()
        told = self.scheduler.plugins[Observer.name].told()
        models = {loads["model"]: max(loads["shared"], loads["private"]) for loads in told["models"]}
        found = {
            "page": link(self.page_link) if self.page_link is not None else "none",
            "workers": f"{len(workers)}, with {sum(worker.nthreads for worker in workers)} threads",
            "models loaded": ", ".join(f"{name} ({format_size(size)})" for name, size in models.items()) or "none yet",
        }
        return facts("zcinfer.LocalCluster", found) + theirs

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        threads_per_worker: int = 2,
        memory_limit: str | float | None = "auto",
        gpus: str | int | Sequence[int | str] | None = None,
        jobs_per_gpu: int = 1,
        dashboard: bool | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_reimport()
        _refuse_exposure(kwargs)
        _refuse_unknown(kwargs)
        if dashboard:
            check_installed()
        self._dashboard = dashboard if dashboard is not None else is_installed() and not kwargs.get("security")
        if threads_per_worker < 1 or (n_workers is not None and n_workers < 0):
            raise SettingsError(
                f"LocalCluster(n_workers={n_workers}, threads_per_worker={threads_per_worker}): a worker has at "
                "least one thread, and there cannot be fewer than no workers."
            )
        self._pinning = Pinning.of(gpus, jobs_per_gpu)
        if self._pinning is not None:
            check_unpinned(n_workers, kwargs.get("env"))
            n_workers = len(self._pinning)
        n_workers = cpu_count() if n_workers is None else n_workers
        if memory_limit != "auto":
            if isinstance(memory_limit, str):
                parse_size(memory_limit, "memory_limit")  # Dask's own error names no setting
            # Dask divides the machine's memory by the workers only where it is not told "auto".
            kwargs["memory_limit"] = memory_limit
        names = ("env", "config", "preload", "local_directory")
        options = worker_options(
            n_workers,
            jobs_per_gpu=jobs_per_gpu if self._pinning is not None else None,
            **{name: kwargs.pop(name, None) for name in names},
        )
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
    jobs_per_gpu: int | None = None,
) -> dict[str, Any]:
    """Arguments of the `Nanny` of each of ``n_workers`` on this machine, for workers that share models.

    What is given goes before what would be chosen. ``jobs_per_gpu``: for workers on GPUs, those that share one.
    """
    cores = cpu_count()
    # A cluster that starts without workers grows later, to nobody knows how many.
    threads = max(1, cores // (n_workers or cores))
    # All our settings, since the workers take these in the place of what they have.
    ours = {"zcinfer": {**settings(), "jobs": jobs_per_gpu or n_workers or cores, "computing": 1}}
    return {
        "env": dict.fromkeys(THREAD_VARIABLES, str(threads)) | (env or {}),
        "config": dask.config.merge(upkeep_settings(config or {}), ours, config or {}),
        "preload": _preloads(preload),
        "local_directory": str(local_directory or scratch_directory()),
    }


def check_unpinned(n_workers: int | None, env: dict[str, Any] | None) -> None:
    """Refuse to be told also by other arguments how many workers there are on GPUs, and which they see."""
    if n_workers is not None:
        raise SettingsError(
            f"{n_workers} workers (n_workers=, --workers) and GPUs: the GPUs say how many there are. Leave it out, and "
            "give jobs_per_gpu= (--jobs-per-gpu) for several on each"
        )
    given = {VISIBLE, ORDER} & (env or {}).keys()
    if given:
        raise SettingsError(f"env= may not have {', '.join(sorted(given))} where gpus= says which GPU a worker sees")


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
    scheduler = kwargs.get("scheduler_kwargs") or {}
    for name in {"host", "interface", "contact_address", "dashboard_address", "protocol"} & scheduler.keys():
        raise SettingsError(f"scheduler_kwargs may not have {name}: the scheduler listens on {LOOPBACK} only")
    for name in _REFUSED & kwargs.keys():
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


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse what neither Dask's cluster nor its workers take: those would only say that they could not start."""
    takers = (LocalCluster, distributed.LocalCluster, distributed.Nanny, distributed.Worker, distributed.core.Server)
    known = {
        name
        for taker in takers
        for name, found in inspect.signature(taker.__init__).parameters.items()
        if found.kind not in (found.VAR_POSITIONAL, found.VAR_KEYWORD)
    } - {"self"}
    for name in sorted(kwargs.keys() - known):
        close = " or ".join(get_close_matches(name, sorted(known - _REFUSED), cutoff=0.7))
        raise SettingsError(
            f"LocalCluster takes no argument {name!r}: "
            + (f"did you mean {close}?" if close else "see help(zcinfer.LocalCluster)")
        )


def _preloads(asked: str | list[str] | None) -> list[str]:
    """Modules that each worker imports at its start: ours, then those of the argument or of Dask's configuration."""
    if asked is None:
        asked = dask.config.get("distributed.worker.preload")
    return [PRELOAD, *(name for name in ([asked] if isinstance(asked, str) else asked) if name != PRELOAD)]


def scratch_directory() -> Path:
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
