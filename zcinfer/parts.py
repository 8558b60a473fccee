"""A model taken apart, and put together again: skeleton, tensor table, storages.

``split`` pickles the live module with a pickler that takes every tensor out; the module itself is never touched.
``join`` is its exact inverse over any writable buffer that holds the storages. Not for files (`archive`) and not for
sharing (`store`): nothing here knows where the buffer lies.

Tensors are taken by storage, not by module: that keeps ties, views, strides and every dtype.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils.hooks import RemovableHandle

from .blame import blame, place_of
from .bytecode import by_name
from .canonical import Canonical, content_digest
from .description import ALIGNMENT, TAIL, Bytes, Description, StorageSpec, sha256_each
from .errors import ArchiveError, ModelCodeMissing, ModelError, SplitError
from .overlaps import refuse_overlaps
from .pickling import HOOKS, storage_bytes, storage_key
from .programs import lost_attributes, program_bytes
from .skeleton import dump, load
from .taken import Taken
from .views import view, view_fake

log = logging.getLogger("zcinfer")


@dataclass(frozen=True)
class Parts:
    """A model taken apart.

    Attributes
    ----------
    description : Description
    skeleton : bytes
        Pickle of the module without its tensors.
    sources : sequence of numpy.ndarray
        The bytes of each storage, uint8; views of the model's own memory where that is on the CPU.
    """

    description: Description
    skeleton: bytes
    sources: Sequence[Bytes] = field(repr=False)

    def pieces(self) -> Iterator[memoryview | bytes]:
        """The flat buffer from its first byte to its last, as storages and padding."""
        position = 0
        for spec, source in zip(self.description.storages, self.sources, strict=True):
            if spec.offset > position:
                yield bytes(spec.offset - position)
            yield source.data
            position = spec.offset + spec.nbytes
        if self.description.nbytes > position:
            yield bytes(self.description.nbytes - position)


def split(model: torch.nn.Module | ExportedProgram, advance: Callable[[int], object] = int) -> Parts:
    """Take a module apart into a skeleton, a table and the bytes of its storages.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        On any device; it is not changed. Gradients are left out, as pickle leaves them out. What pickle cannot carry
        (TorchScript, exported programs) is carried as torch's own bytes.
    advance : callable, optional
        Called with numbers of bytes as they are read; their sum is that of all storages.

    Returns
    -------
    Parts
        Its sources are views of the model's memory: do not train the model while they are in use.

    Raises
    ------
    SplitError
        Something in the model cannot be pickled, or two tensors share elements of which torch does not know that they
        are one; the message names the attribute.

    Examples
    --------
    >>> parts = split(torch.nn.Linear(2, 3))
    >>> [t.size for t in parts.description.tensors]
    [(3, 2), (3,)]
    """
    try:
        return _split(model, advance)
    except SplitError as error:
        with by_name():
            try:
                parts = _split(model, advance)
            except SplitError:
                raise error from None
        log.warning(
            "%s: its code is of a module that other processes may not find, and cannot travel with it: %s Make the "
            "module importable wherever it is loaded.",
            parts.description.class_name,
            error,
        )
        return parts


def _split(model: torch.nn.Module | ExportedProgram, advance: Callable[[int], object]) -> Parts:
    whole: Any = model
    if isinstance(model, ExportedProgram):
        model = whole.module()  # only looked at: the program is carried as it is
    if not isinstance(model, torch.nn.Module):
        raise SplitError(f"a model must be a torch.nn.Module, found {type(model).__name__!r}: pass the module itself")
    try:
        skeleton, taken = dump((whole, _last_hook(model)))
    except Exception as error:
        raise SplitError(blame(model, error, dump)) from error

    _refuse_torn_programs(taken, whole)
    sources = [storage_bytes(storage) for storage in taken.storages]
    refuse_overlaps(taken, sources, whole)
    digests = sha256_each(sources, advance)
    by_key = {storage_key(s): d for s, d in zip(taken.storages, digests, strict=True)}

    def storage_digest(storage: torch.UntypedStorage) -> bytes:
        return by_key.get(storage_key(storage)) or content_digest(storage)

    def known_bytes(program: Any) -> bytes:
        return taken.programs[id(program)][1] if id(program) in taken.programs else program_bytes(program)

    canonical = Canonical(storage_digest, known_bytes, taken.arrays_under_tensors)
    try:
        canonical.add(whole)
    except Exception as error:
        raise SplitError(blame(model, error, lambda part: Canonical(storage_digest).add(part))) from error

    names = _storage_names(model, taken)
    storages, position = [], 0
    for name, source, digest in zip(names, sources, digests, strict=True):
        storages.append(StorageSpec(position, source.nbytes, digest.hex(), name))
        position += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
    description = Description(
        digest=canonical.hexdigest(),
        class_name=f"{type(whole).__module__}.{type(whole).__qualname__}",
        tensors=taken.table(),
        storages=tuple(storages),
        nbytes=position + TAIL,
        skeleton_sha256=hashlib.sha256(skeleton).hexdigest(),
        skeleton_nbytes=len(skeleton),
        # An exported program has no modes.
        training=tuple(name for name, module in model.named_modules() if getattr(module, "training", False))
        if whole is model
        else (),
        dtype=_floating_dtype(model),
        requires={package: _version(package) for package in sorted(canonical.packages - sys.stdlib_module_names)},
        private=tuple((place_of(obj, whole), nbytes) for obj, nbytes in taken.private),
    )
    return Parts(description, skeleton, sources)


def join(
    skeleton: bytes, description: Description, buffer: Any, *, base: Any = None, copy_small: bool = False
) -> torch.nn.Module:
    """Put a module together over a buffer, without copying the weights.

    Parameters
    ----------
    skeleton : bytes
        From `split`. Unpickling runs code: it must come from a trusted place.
    description : Description
    buffer : writable buffer of bytes
        The storages at their offsets. The module's tensors are views of it and keep it alive. Who else sees
        writes to it is up to the buffer.
    base : writable buffer of bytes, optional
        The buffer of another model, where the description says that storages lie there.
    copy_small : bool
        Give the module copies of its own of buffers, and of tensors under a page: those that models do write. For
        a buffer whose pages are read-only.

    Returns
    -------
    torch.nn.Module
        In the same mode, with the same ties, strides, flags and names.

    Raises
    ------
    ModelCodeMissing
        A class of the model cannot be imported here; the message names the package.
    ModelError
        The model's own code refuses to be put together.
    ArchiveError
        The table reaches beyond the buffer.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 3)
    >>> parts = split(layer)
    >>> buffer = bytearray(b"".join(bytes(piece) for piece in parts.pieces()))
    >>> torch.equal(join(parts.skeleton, parts.description, buffer).weight, layer.weight)
    True
    """
    try:
        tensors, storages = view(buffer, description, copy_small, base)
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise ArchiveError(
            f"the table of {description.class_name} does not fit its weights: {error}. Publish the model again."
        ) from error
    return _joined(skeleton, description, tensors, storages)


def join_fake(skeleton: bytes, description: Description) -> torch.nn.Module:
    """Put a module together without weights; call under ``FakeTensorMode`` and throw the module away after use."""
    return _joined(skeleton, description, view_fake(description), None)


def warm_up() -> None:
    """Split and join a small module: what a process pays for its first load, and for no other, is paid here.

    Four milliseconds: torch's code that is not in the page tables yet; memory that is not there yet, or that a forked
    process has to copy first. A page costs microseconds at its first use, and a model of 200 tensors takes 300 pages.
    """
    parts = split(torch.nn.Sequential(*(torch.nn.LayerNorm(8) for _ in range(20))))
    join(parts.skeleton, parts.description, bytearray(b"".join(parts.pieces())))
    _ = [torch.empty(0, requires_grad=True) for _ in range(400)], [bytes(400) for _ in range(4000)]


# Models whose code is imported here.
_at_home: set[str] = set()
_importing = threading.RLock()


@contextmanager
def first_alone(description: Description) -> Iterator[None]:
    """Put a model together for the first time while no other thread does that with another.

    Threads that import modules of one package, which import each other, may each get a half of it: so Python solves
    what would be a deadlock.
    """
    if description.digest in _at_home:
        yield
        return
    with _importing:
        yield
        _at_home.add(description.digest)


def _joined(
    skeleton: bytes,
    description: Description,
    tensors: list[torch.Tensor],
    storages: list[torch.UntypedStorage | None] | None,
) -> torch.nn.Module:
    try:
        with first_alone(description):
            model, last_hook = load(skeleton, tensors, storages)
    except (ImportError, AttributeError) as error:
        raise ModelCodeMissing(_missing(description, error)) from error
    except NotImplementedError:
        raise  # of ours: no weights, no shape
    except Exception as error:
        raise ModelError(
            f"the code of {description.class_name} does not put the model together again: {type(error).__name__}: "
            f"{error}. Is it the same version as where the model was published?"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{description.class_name} comes back as a {type(model).__name__}: look at its __reduce__")
    if description.requires.get("torch") != torch.__version__:
        # Modules of this version may have attributes that those of the other had not.
        for module in torch.nn.Module.modules(model):
            if type(module).__setstate__ is torch.nn.Module.__setstate__:
                torch.nn.Module.__setstate__(module, {})  # type: ignore[no-untyped-call]
    # Torch counts hooks by process: the next one would take the place of a hook that came with the model.
    RemovableHandle.next_id = max(RemovableHandle.next_id, last_hook + 1)
    return model


def _missing(description: Description, error: Exception) -> str:
    package = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
    else:
        named = re.search(r"module '([\w.]+)'", str(error))
        package = named.group(1).partition(".")[0] if named else ""
    version = description.requires.get(package, "")
    remedy = (
        f"install {package}=={version}" if version else f"make the module {package or 'that defines it'!r} importable"
    )
    return (
        f"the model's class {description.class_name} needs code that this process does not have ({error}). "
        f"On every worker, {remedy} (same version as where the model was published)."
    )


def _refuse_torn_programs(taken: Taken, model: Any) -> None:
    """Refuse a program that has more to it than its bytes: tensors of the rest of the model, or attributes."""
    others = {storage_key(storage) for storage in taken.storages}
    for program, content in taken.programs.values():
        if not isinstance(program, torch.jit.ScriptModule):
            continue  # an exported program is a model of its own
        place = place_of(program, model)
        if any(storage_key(t.untyped_storage()) in others for t in program.state_dict().values()):
            raise SplitError(
                f"{place} is carried as torch's own bytes, and shares tensors with the rest of the model, which would "
                "be two afterwards: publish the module it was compiled from"
            )
        added = [name for name in lost_attributes(program, content) if not name.startswith("_")]
        if added:
            raise SplitError(
                f"{place} has the attribute {added[0]!r}, which torch.jit.save leaves out: remove it before "
                "publishing, or publish the module it was compiled from"
            )


def _last_hook(model: torch.nn.Module) -> int:
    modules = torch.nn.Module.modules(model)
    return max((key for module in modules for name in HOOKS for key in vars(module).get(name) or ()), default=-1)


def _storage_names(model: torch.nn.Module, taken: Taken) -> list[str]:
    # Torch's own methods: models override them, also with fewer arguments.
    parameters = torch.nn.Module.named_parameters(model, remove_duplicate=False)
    buffers = torch.nn.Module.named_buffers(model, remove_duplicate=False)
    named: dict[int, str] = {}
    for name, tensor in [*parameters, *buffers]:
        named.setdefault(id(tensor), name)
    names = [""] * len(taken.storages)
    for tensor, spec in zip(taken.tensors, taken.specs, strict=True):
        names[spec.storage] = names[spec.storage] or named.get(id(tensor), "")
    used = {"__metadata__"}  # a word of safetensors
    for number, name in enumerate(names):
        names[number] = name if name and name not in used else f"zcinfer.storage.{number}"
        used.add(names[number])
    return names


def _floating_dtype(model: torch.nn.Module) -> str:
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return ""


@lru_cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    distributions = _distributions().get(package)
    return metadata.version(distributions[0]) if distributions else ""


@lru_cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()  # a quarter of a second
