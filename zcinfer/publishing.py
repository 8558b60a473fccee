"""Models in and out: put, load, save. What of the catalog needs torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from . import catalog, config
from .archive import Archive, copy_archive, write_archive
from .description import Description
from .errors import ModelNotFound, OutputError, SettingsError, ZcinferError
from .loading import load_ref
from .machines import machines_without
from .names import Version, check_name
from .parts import join, split
from .progress import bytes_bar
from .sizes import format_size
from .store import ModelRef

log = logging.getLogger("zcinfer")


def put(
    model: torch.nn.Module | ExportedProgram | str | Path,
    name: str | None = None,
    *,
    base: str | ModelRef | None = None,
    trust: bool = False,
    progress: bool | None = None,
) -> ModelRef:
    """Publish a model.

    Parameters
    ----------
    model : torch.nn.Module, torch.export.ExportedProgram, path or URL
        A module (it is not changed), a program (what is loaded is its module), the directory of an archive that
        `save` wrote, or the copy that another machine's `put` has left at ``zcinfer.remote``: ``URL/<digest>``.
    name : str, optional
        Default: the class's name in lower case, or the archive directory's. A copy needs one.
    base : str or ModelRef, optional
        A published model of which this one is a variant, as a fine-tuned one is: tensors that are equal, bit for bit,
        are one memory, and the variant's own hold only the others. The base's memory stays as long as the variant;
        the archive is whole.
    trust : bool
        Open an archive that this user has not written. A skeleton is a pickle: opening one runs code from it.
    progress : bool, optional
        Show progress on standard error where it takes more than a second. Default: on a terminal.

    Returns
    -------
    ModelRef
        The same content under the same name gives the same ref, from any process.

    Raises
    ------
    SplitError
        The model cannot be taken apart; the message names the attribute.
    ArchiveError
        The archive is truncated, altered, or not known to this user and not trusted.
    StoreFull
        It does not fit into the shared memory of the connected store.
    RemoteUnavailable
        It is published, but its copy cannot be written to ``zcinfer.remote``.

    Examples
    --------
    >>> ref = put(torch.nn.Linear(2, 3).eval(), "doc-linear")
    >>> ref.nbytes > 24, ref == put(load("doc-linear"), "doc-linear")
    (True, True)
    """
    registry = catalog.registry()
    base = catalog.resolve(base) if base is not None else None
    if isinstance(model, str) and "://" in model:
        if name is None:
            raise SettingsError(
                f"{config.shown(model)} is a copy without a name: say under which to publish it (name=, --name)"
            )
        check_name(name)
        with registry.copied(model, trust) as fetched:
            if fetched in registry.seals:
                return _publish(fetched.description, name, base, partial(registry.take, fetched, name))
            return put(_another(fetched), name, base=base, progress=progress)
    if isinstance(model, str | Path):
        path = Path(model)
        if not os.path.isdir(path):  # Path.is_dir raises where a name is too long, or may not be asked for
            raise ModelNotFound(f"no archive at {path}: pass a module, or the directory of an archive that save wrote")
        opened = registry.seals.open(path, trust)
        name = name or path.name
        check_name(name)
        if opened in registry.seals:
            _make_room(opened.description)
            return _publish(opened.description, name, base, partial(registry.adopt, opened, name))
        model = _another(opened)
    name = name or type(model).__name__.lower()
    check_name(name)
    # Read for the digest, and written, here and to where copies are kept.
    times = 3 if config.get("remote") else 2
    with bytes_bar(f"put {name}", times * _weight_bytes(model), progress) as advance:
        parts = split(model, advance)
        _make_room(parts.description)
        add = partial(registry.add, parts, name, advance=advance)
        return _publish(parts.description, name, base, add, advance)


def _another(archive: Archive) -> torch.nn.Module:
    """The model of another user's archive, whose digest may say anything, and is found anew."""
    return join(archive.skeleton(), archive.description, archive.weights())


def _make_room(described: Description) -> None:
    """Refuse what the disk has no room for before anything is written, so that nothing has to be taken back."""
    catalog.registry().make_room(described.digest, described.nbytes + described.skeleton_nbytes)


def _publish(
    described: Description,
    name: str,
    base: ModelRef | None,
    add: Callable[[str | None], Version],
    advance: Callable[[int], object] = int,
) -> ModelRef:
    store = catalog.current()
    _warn_of_private(name, described)
    own, shared_with = _shared_with(name, described, base)
    if store is not None:
        if shared_with is not None:
            store.publish(shared_with)  # not there yet, perhaps; then it needs room first
        store.make_room(described.digest, own)
    version = add(shared_with)
    if store is not None:
        store.publish(version.digest)
    _copy(version, advance)
    _warn_of_one_machine(version)
    return catalog.ref_of(version)


def _copy(version: Version, advance: Callable[[int], object]) -> None:
    """Have a copy of the archive at the URL of the settings, if there is one."""
    url, registry = config.get("remote"), catalog.registry()
    if url:
        from .remote import Remote  # and fsspec, for those who use it

        try:
            Remote(str(url)).upload(registry.local(version.digest), str(version), advance)
        except ZcinferError as error:
            raise type(error)(
                f"{version} is published in {registry.directory}, and other machines have no copy of it: {error} Then "
                "put it again."
            ) from error


def _shared_place() -> Path | None:
    """Directory that holds archives, or the copies of them; None: copies are where no machine of ours is lost."""
    url = config.get("remote")
    if not url:
        return catalog.registry().directory / "archives"
    from .places import Place

    return Place.of(str(url)).directory


# Registries of which it was said, or need not be, that one machine alone has them.
_looked_at: set[tuple[str, Path]] = set()


def _warn_of_one_machine(version: Version) -> None:
    """On a cluster of several machines, say where the archive is on this one alone: it would be lost with it."""
    client, directory = catalog.dask_client(), _shared_place()
    if client is None or directory is None or client.asynchronous or (client.id, directory) in _looked_at:
        return
    without = machines_without(client, str(directory / version.digest))
    if without is None:
        return
    _looked_at.add((client.id, directory))
    if without:
        listed = ", ".join(without[:5]) + (" ..." if len(without) > 5 else "")
        log.warning(
            "%s: its archive is in %s on %s, and these machines of the cluster do not see it: %s. If this machine is "
            "lost, what is loaded stays so, and nobody can load it again. Keep a copy of each archive where all can "
            "read it (zcinfer.remote, or DASK_ZCINFER__REMOTE: any URL that fsspec knows, as s3://bucket/models), or "
            "the registry in a directory that all machines have (zcinfer.registry, DASK_ZCINFER__REGISTRY).",
            version,
            directory,
            gethostname(),
            listed,
        )


def _warn_of_private(name: str, described: Description) -> None:
    """Say what each process will hold for itself, and why."""
    if described.private:
        listed = "; ".join(f"{what}: {format_size(nbytes)}" for what, nbytes in described.private[:5])
        log.warning(
            "%s: %s are shared, but every process that loads it holds %s for itself, which are no tensors and no plain "
            "arrays: %s%s",
            name,
            format_size(described.nbytes),
            format_size(described.private_nbytes),
            listed,
            "; ..." if len(described.private) > 5 else "",
        )


def _shared_with(name: str, described: Description, base: ModelRef | None) -> tuple[int, str | None]:
    """Bytes that the model needs of its own, and the digest of the model that it shares the others with."""
    if base is None:
        return described.nbytes, None
    registry = catalog.registry()
    root = registry.base(base.digest) or registry.archive(base.digest)  # the base of a base: there are no chains
    if root.description.digest == described.digest:
        return described.nbytes, None
    over = described.over(root.description)
    if over.in_base:
        return over.nbytes, root.description.digest
    log.warning("%s has no tensor in common with its base %s", name, base)
    return described.nbytes, None


def _weight_bytes(model: Any) -> int:
    """Roughly: what the bar shows its share of."""
    if not isinstance(model, torch.nn.Module):
        return 0  # split refuses it
    tensors = [*torch.nn.Module.parameters(model), *torch.nn.Module.buffers(model)]
    return sum(tensor.nbytes for tensor in tensors if tensor.layout is torch.strided and not is_lazy(tensor))


def load(model: str | ModelRef, device: str | torch.device | None = None) -> torch.nn.Module:
    """Build a fresh module from the current store.

    Parameters
    ----------
    model : str or ModelRef
        A name means its newest version.
    device : str or torch.device, optional
        Moved there; default: left in shared host memory.

    Returns
    -------
    torch.nn.Module
        In the mode it was published in. Its weights are views of shared memory; writes stay in this process.

    Raises
    ------
    ModelNotFound, ModelCodeMissing, StoreUnavailable
    SettingsError
        There is no such device, or no room on it.

    Examples
    --------
    >>> import zcinfer as zc
    >>> layer = torch.nn.Linear(2, 3)
    >>> _ = zc.connect("file"), put(layer, "doc-load")
    >>> torch.equal(load("doc-load").weight, layer.weight)
    True
    """
    ref = catalog.ready(model)
    try:
        return load_ref(ref, device)
    except (AssertionError, RuntimeError) as error:  # torch's, of a device that is not there or full
        raise SettingsError(
            f"{ref} cannot be moved to {device}: {error}. Without a device it stays on the CPU."
        ) from error


def save(model: torch.nn.Module | ExportedProgram | str | ModelRef, path: str | Path) -> Path:
    """Write an archive of a model anywhere, without registering it.

    Parameters
    ----------
    model : torch.nn.Module, torch.export.ExportedProgram, str or ModelRef
    path : path
        A new directory.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    SettingsError, OutputError
        There is something at ``path`` already, or it cannot be written.

    Examples
    --------
    >>> import tempfile, zcinfer as zc
    >>> _ = zc.connect("file")
    >>> path = save(torch.nn.Linear(2, 3), tempfile.mkdtemp() + "/linear")
    >>> put(path).name
    'linear'
    """
    registry = catalog.registry()
    write: Callable[[Path], Archive]
    if isinstance(model, torch.nn.Module | ExportedProgram):
        write = partial(write_archive, split(model))
    else:
        write = partial(copy_archive, registry.whole(catalog.resolve(model).digest)[0])
    try:
        return registry.save(write, Path(path).expanduser().absolute()).directory
    except OSError as error:
        raise OutputError(f"no archive can be written to {path}: {error}") from error
