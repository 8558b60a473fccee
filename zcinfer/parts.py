"""A model taken apart, and put together again: skeleton, tensor table, storages.

``split`` pickles the live module with a pickler that takes every tensor out; the module itself is never touched.
``join`` is its exact inverse over any writable buffer that holds the storages. Not for files (`archive`) and not for
sharing (`store`): nothing here knows where the buffer lies.

Tensors are taken by storage, not by module: that keeps ties, views, strides and every dtype.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from .canonical import HOOKS, Canonical, is_plain, reduce_refused, storage_key
from .description import ALIGNMENT, BUFFER_DTYPES, TAIL, Bytes, Description, StorageSpec, TensorSpec, sha256_each
from .errors import ModelCodeMissing, ModelError, SplitError

try:  # Classes of __main__, lambdas and closures travel by value where cloudpickle is installed.
    from cloudpickle import Pickler as _BasePickler
except ImportError:
    from pickle import Pickler as _BasePickler

_PAGE = 4096


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


def split(model: torch.nn.Module) -> Parts:
    """Take a module apart into a skeleton, a table and the bytes of its storages.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; it is not changed. Gradients are left out, as pickle leaves them out.

    Returns
    -------
    Parts
        Its sources are views of the model's memory: do not train the model while they are in use.

    Raises
    ------
    SplitError
        Something in the model cannot be pickled; the message names the attribute.

    Examples
    --------
    >>> parts = split(torch.nn.Linear(2, 3))
    >>> [t.size for t in parts.description.tensors]
    [(3, 2), (3,)]
    """
    if not isinstance(model, torch.nn.Module):
        raise SplitError(f"a model must be a torch.nn.Module, found {type(model).__name__!r}: pass the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise SplitError(
            f"{type(model).__name__} is compiled TorchScript, which pickle cannot carry: publish the module it was "
            "compiled from"
        )
    taken = _Taken()
    try:
        skeleton = _skeleton((model, _last_hook(model)), taken)
    except Exception as error:
        raise SplitError(_blame(model, error, lambda part: _skeleton(part, _Taken()))) from error

    sources = [storage_bytes(storage) for storage in taken.storages]
    digests = sha256_each(sources)
    by_key = {storage_key(s): d for s, d in zip(taken.storages, digests, strict=True)}

    def storage_digest(storage: torch.UntypedStorage) -> bytes:
        return by_key.get(storage_key(storage)) or sha256_each([storage_bytes(storage)])[0]

    canonical = Canonical(storage_digest)
    try:
        canonical.add(model)
    except Exception as error:
        raise SplitError(_blame(model, error, lambda part: Canonical(storage_digest).add(part))) from error

    names = _storage_names(model, taken)
    storages, position = [], 0
    for name, source, digest in zip(names, sources, digests, strict=True):
        storages.append(StorageSpec(position, source.nbytes, digest.hex(), name))
        position += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
    description = Description(
        digest=canonical.hexdigest(),
        class_name=f"{type(model).__module__}.{type(model).__qualname__}",
        tensors=taken.table(),
        storages=tuple(storages),
        nbytes=position + TAIL,
        skeleton_sha256=hashlib.sha256(skeleton).hexdigest(),
        skeleton_nbytes=len(skeleton),
        training=tuple(name for name, module in model.named_modules() if module.training),
        dtype=_floating_dtype(model),
        requires={package: _version(package) for package in sorted(canonical.packages - sys.stdlib_module_names)},
    )
    return Parts(description, skeleton, sources)


def join(skeleton: bytes, description: Description, buffer: Any, *, copy_small: bool = False) -> torch.nn.Module:
    """Put a module together over a buffer, without copying the weights.

    Parameters
    ----------
    skeleton : bytes
        From `split`. Unpickling runs code: it must come from a trusted place.
    description : Description
    buffer : writable buffer of bytes
        The storages at their offsets. The module's tensors are views of it and keep it alive. Who else sees
        writes to it is up to the buffer.
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

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 3)
    >>> parts = split(layer)
    >>> buffer = bytearray(b"".join(bytes(piece) for piece in parts.pieces()))
    >>> torch.equal(join(parts.skeleton, parts.description, buffer).weight, layer.weight)
    True
    """
    tensors, storages = _view(buffer, description, copy_small)
    return _unpickle(skeleton, description, tensors, storages)


def join_fake(skeleton: bytes, description: Description) -> torch.nn.Module:
    """Put a module together without weights; call under ``FakeTensorMode`` and throw the module away after use."""
    tensors = []
    for spec in description.tensors:
        tensor = torch.empty_strided(spec.size, spec.stride, dtype=getattr(torch, spec.dtype))
        tensors.append(torch.nn.Parameter(tensor, spec.requires_grad) if spec.parameter else tensor)
    return _unpickle(skeleton, description, tensors, None)


class _Taken:
    """Tensors and storages met by the pickler, each once."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.tensors: list[torch.Tensor] = []  # keeps ids valid
        self.storages: list[torch.UntypedStorage] = []
        self.uses: list[int] = []  # of each storage: tensors and bare storages that refer to it
        self._tensor_index: dict[int, int] = {}
        self._storage_index: dict[tuple[Any, ...], int] = {}

    def tensor(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._tensor_index:
            self._tensor_index[id(tensor)] = len(self.specs)
            self.tensors.append(tensor)
            self.specs.append(
                TensorSpec(
                    self.storage(tensor.untyped_storage()),
                    str(tensor.dtype).removeprefix("torch."),
                    int(tensor.storage_offset()),
                    tuple(tensor.size()),
                    tuple(tensor.stride()),
                    tensor.requires_grad,
                    isinstance(tensor, torch.nn.Parameter),
                    False,
                )
            )
        return self._tensor_index[id(tensor)]

    def storage(self, storage: torch.UntypedStorage) -> int:
        key = storage_key(storage)
        if key not in self._storage_index:
            self._storage_index[key] = len(self.storages)
            self.storages.append(storage)
            self.uses.append(0)
        self.uses[self._storage_index[key]] += 1
        return self._storage_index[key]

    def table(self) -> tuple[TensorSpec, ...]:
        def whole(tensor: torch.Tensor, spec: TensorSpec) -> bool:
            usual = torch.empty(spec.size, device="meta").stride()  # of an axis of length 1 any stride is contiguous
            covers = spec.stride == usual and tensor.nbytes == self.storages[spec.storage].nbytes() > 0
            return covers and self.uses[spec.storage] == 1 and spec.dtype in BUFFER_DTYPES

        return tuple(s._replace(whole=whole(t, s)) for t, s in zip(self.tensors, self.specs, strict=True))


class _Splitter(_BasePickler):  # type: ignore[misc, valid-type, unused-ignore]
    def __init__(self, file: io.BytesIO, taken: _Taken):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._taken = taken

    def persistent_id(self, obj: Any) -> int | tuple[int, str] | None:
        if isinstance(obj, torch.Tensor):
            return self._taken.tensor(obj) if is_plain(obj) and not obj.__dict__ else None
        if isinstance(obj, _Bare):
            return self._taken.tensor(obj.tensor)
        if isinstance(obj, torch.storage.TypedStorage):
            return self._taken.storage(obj._untyped_storage), str(obj.dtype).removeprefix("torch.")
        if isinstance(obj, torch.UntypedStorage):
            return self._taken.storage(obj), ""
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and is_plain(obj):
            return _itself, (_Bare(obj),), obj.__dict__, None, None, _set_attributes
        refused = reduce_refused(obj)
        if refused is not None:
            return refused
        override = getattr(super(), "reducer_override", None)
        return override(obj) if override is not None else NotImplemented


class _Bare(NamedTuple):
    """A tensor without the attributes that somebody has set on it, as `from_pretrained` does on each."""

    tensor: torch.Tensor


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)


def _skeleton(obj: Any, taken: _Taken) -> bytes:
    file = io.BytesIO()
    _Splitter(file, taken).dump(obj)
    return file.getvalue()


class _Joiner(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, tensors: list[torch.Tensor], storages: list[torch.UntypedStorage | None] | None
    ):
        super().__init__(file)
        self._tensors = tensors
        self._storages = storages

    def persistent_load(self, pid: int | tuple[int, str]) -> Any:
        if isinstance(pid, int):
            return self._tensors[pid]
        if self._storages is None:
            raise NotImplementedError("tensors of unusual kinds have no shape without their weights")
        index, dtype = pid
        storage = self._storages[index]
        if not dtype:
            return storage
        kind: Any = torch.storage.TypedStorage
        return kind(wrap_storage=storage, dtype=getattr(torch, dtype), _internal=True)


def _unpickle(
    skeleton: bytes,
    description: Description,
    tensors: list[torch.Tensor],
    storages: list[torch.UntypedStorage | None] | None,
) -> torch.nn.Module:
    try:
        model, last_hook = _Joiner(io.BytesIO(skeleton), tensors, storages).load()
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


def _view(
    buffer: Any, description: Description, copy_small: bool
) -> tuple[list[torch.Tensor], list[torch.UntypedStorage | None]]:
    """Tensors of the table as views of the buffer, and the storages that are not some tensor's alone."""
    tensors: list[torch.Tensor] = []
    storages: list[Any] = [None] * len(description.storages)
    own = {spec.storage for spec in description.tensors if spec.whole}
    for number, place in enumerate(description.storages):
        if number not in own:
            storage: Any = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
            if place.nbytes:
                view = torch.frombuffer(buffer, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
                storage = view.untyped_storage()
            storages[number] = storage.clone() if copy_small and place.nbytes < _PAGE else storage
    as_parameter = torch.Tensor._make_subclass  # nn.Parameter() in its plain case, at half the time
    # Never under inference_mode: such tensors cannot be trained, or cast, later.
    with torch.inference_mode(False):
        for number, name, offset, size, stride, requires_grad, parameter, whole in description.tensors:
            dtype = getattr(torch, name)
            if whole:
                place = description.storages[number]
                tensor = torch.frombuffer(
                    buffer, dtype=dtype, count=place.nbytes // dtype.itemsize, offset=place.offset
                )
                if copy_small and (not parameter or place.nbytes < _PAGE):
                    tensor = tensor.clone()
                if len(size) != 1:
                    tensor.resize_(size)
            else:
                tensor = torch.empty(0, dtype=dtype).set_(storages[number], offset, size, stride)
            if parameter:
                tensor = as_parameter(torch.nn.Parameter, tensor, requires_grad)
            elif requires_grad:
                tensor.requires_grad_()
            tensors.append(tensor)
    return tensors, storages


def storage_bytes(storage: torch.UntypedStorage) -> Bytes:
    """Bytes of a storage: a view of them where it is on the CPU."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    array: Bytes = flat.cpu().numpy()
    return array


def _last_hook(model: torch.nn.Module) -> int:
    modules = torch.nn.Module.modules(model)
    return max((key for module in modules for name in HOOKS for key in vars(module).get(name) or ()), default=-1)


def _storage_names(model: torch.nn.Module, taken: _Taken) -> list[str]:
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
    distributions = metadata.packages_distributions().get(package)
    return metadata.version(distributions[0]) if distributions else ""


def _blame(model: torch.nn.Module, error: Exception, attempt: Callable[[Any], object]) -> str:
    """Say which attribute it is: the deepest one with which the attempt fails alone."""
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return f"{type(model).__name__} nests too deeply for pickle: raise sys.setrecursionlimit before publishing"
    path, culprit = _deepest_failure(type(model).__name__, model, attempt, set())
    hint = "Remove it before publishing, or give its class a __getstate__ that leaves it out."
    return f"{path} (a {type(culprit).__name__}) cannot be taken apart: {error}. {hint}"


def _deepest_failure(path: str, obj: Any, attempt: Callable[[Any], object], seen: set[int]) -> tuple[str, Any]:
    seen.add(id(obj))
    children: list[tuple[str, Any]] = []
    if isinstance(obj, torch.nn.Module):
        state = dict(vars(obj))
        for registry in ("_modules", "_parameters", "_buffers"):
            children += [(f"{path}.{name}", child) for name, child in state.pop(registry, {}).items()]
        children += [(f"{path}.{name}", child) for name, child in state.items()]
    elif isinstance(obj, dict):
        children = [(f"{path}[{name!r}]", child) for name, child in obj.items()]
    elif isinstance(obj, list | tuple | set):
        children = [(f"{path}[{number}]", child) for number, child in enumerate(obj)]
    elif hasattr(obj, "__dict__") and not isinstance(obj, type):
        children = [(f"{path}.{name}", child) for name, child in vars(obj).items()]
    for name, child in children:
        if id(child) in seen:
            continue
        try:
            attempt(child)
        except Exception:
            return _deepest_failure(name, child, attempt, seen)
    return path, obj
