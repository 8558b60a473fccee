"""What no pickle carries: TorchScript modules and exported programs, carried whole, as torch's own bytes.

Their bytes are shared; what torch's own loader makes of them is private to each process, and said to be.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from itertools import groupby
from typing import Any

import torch
from torch.export import ExportedProgram

# Tensors that count with the pickle that names them, and what is random or says where the source lay.
_WITH_PICKLES = ("data/", "constants/")
_INCIDENTAL = ("serialization_id", ".debug_pkl", "byteorder", "version")

# Numbers that torch gives by process, in the names of classes and in the code.
_MANGLED = re.compile(r"[./]?___torch_mangle_\d+")


def is_program(obj: Any) -> bool:
    """Whether ``obj`` is carried as bytes of torch's own format."""
    return isinstance(obj, torch.jit.ScriptModule | ExportedProgram)


def program_bytes(program: Any) -> bytes:
    """The program in torch's own format.

    Raises
    ------
    RuntimeError
        Torch cannot save it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such, which is not ours to tell
        if isinstance(program, ExportedProgram):
            torch.export.save(program, file)
        else:
            torch.jit.save(program, file)
    return file.getvalue()


def load_script(content: torch.Tensor) -> torch.nn.Module:
    """The TorchScript module of these bytes (uint8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module: torch.nn.Module = torch.jit.load(_file(content))  # type: ignore[no-untyped-call]
    return module


def load_exported(content: torch.Tensor) -> torch.nn.Module:
    """The module of the exported program of these bytes (uint8)."""
    module: torch.nn.Module = torch.export.load(_file(content)).module()
    return module


def _file(content: torch.Tensor) -> io.BytesIO:
    if type(content) is not torch.Tensor:
        raise NotImplementedError("a program cannot be loaded without its bytes")
    array: Any = content.numpy()
    return io.BytesIO(array)


def program_digest(program: Any) -> bytes:
    """SHA-256 of a program's code, state and tensors; equal in all processes, and for what was saved and loaded."""
    with zipfile.ZipFile(io.BytesIO(program_bytes(program))) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    found = []
    for name, record in records.items():
        if name.endswith(".py"):
            content = _code(record.decode())
        elif name.endswith(".pkl"):
            content = _Plain(record, records).text()
        elif name.startswith(("data/", "constants/", ".data/")) or name.endswith(
            (".debug_pkl", "byteorder", "version")
        ):
            continue  # with the pickles that name them; random; or where the source lay
        else:
            content = hashlib.sha256(record).hexdigest()
        found.append((_MANGLED.sub("", name), content))
    return hashlib.sha256(repr(sorted(found)).encode()).digest()


def _code(text: str) -> str:
    """Code without numbers by process; constants of a class in order, which torch takes from a set."""
    groups = groupby(_MANGLED.sub("", text).splitlines(), lambda line: " : Final[" in line)
    return "\n".join(line for constants, lines in groups for line in (sorted(lines) if constants else lines))


class _Made:
    """What a pickle makes by calling something: what was called, with what, and the state it was given."""

    name = ""

    parts: list[Any]

    def __new__(cls, *arguments: Any) -> _Made:
        made = super().__new__(cls)
        made.parts = [cls.name, *arguments]
        return made

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.parts!r}>"


class _Plain(pickle.Unpickler):
    """A pickle of a TorchScript archive as text, without calling anything that it names."""

    def __init__(self, content: bytes, records: dict[str, bytes]):
        super().__init__(io.BytesIO(content))
        self._records = records

    def text(self) -> str:
        return repr(self.load())

    def find_class(self, module: str, name: str) -> Any:
        return type("Made", (_Made,), {"name": _MANGLED.sub("", f"{module}:{name}"), "__module__": __name__})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, device, length = pid
        content = next((self._records[f"{place}/{key}"] for place in ("data", "constants")
                        if f"{place}/{key}" in self._records), b"")  # fmt: skip
        return (kind.name, hashlib.sha256(content).hexdigest(), device, length)
