"""The callable that runs a model on one block: cast, cut into batches, forward, pick the output, back to NumPy.

It carries a `ModelRef`, never weights. Before any work it is *bound* to the inputs' row shapes: the output's shape and
dtype are found without weights, so that lazy arrays know theirs. Works without Dask; not for graphs (`arrays`).

How an input's dtype becomes the model's, decided once when bound:

1. floating inputs are cast to the dtype of the model's floating parameters;
2. booleans, integers and complex numbers stay as they are if the model takes them so;
3. else integers and booleans become int64; if the model does not take those, its floating dtype.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .canonical import Canonical
from .catalog import describe, ready
from .description import sha256_each
from .errors import BlockError, InputError, OutputError, SettingsError, TrainingModeError, ZcinferError
from .loading import residents
from .parts import storage_bytes
from .probing import explain, furthest, weightless
from .store import ModelRef

log = logging.getLogger("zcinfer")

Array = np.ndarray[Any, np.dtype[Any]]
Output = str | int | Callable[[Any, Any], torch.Tensor] | None

# "auto" starts from the bytes of a row: activations grow with them, and small rows need many to a batch.
_AUTO_BYTES, _AUTO_LEAST, _AUTO_MOST = 256 << 10, 8, 1024
_TORCH_INTEGERS = frozenset(("uint8", "int8", "int16", "int32", "int64"))


@dataclass(frozen=True)
class Rows:
    """Rows of one input or output: the shape of one row, and the dtype.

    Examples
    --------
    >>> str(Rows((64,), np.dtype("float32")))
    '(rows, 64) float32'
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({', '.join(['rows', *map(str, self.shape)])}) {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Binding:
    """What was found for given inputs.

    Attributes
    ----------
    inputs : tuple of Rows
        As they come.
    casts : tuple of str
        torch's name of the dtype that each input is cast to.
    output : Rows
        As it goes out.
    batch_size : int
        Rows that one forward gets, at most.
    """

    inputs: tuple[Rows, ...]
    casts: tuple[str, ...]
    output: Rows
    batch_size: int


class Predictor:
    """A model as a function on blocks of rows.

    Parameters
    ----------
    model : str or ModelRef
        A name means its newest version now.
    batch_size : int or "auto"
        Rows that one forward gets. "auto": a power of two between 8 and 1,024, by the bytes of a row.
    output : str, int or callable, optional
        Which output: a key or attribute, a position, or a function ``f(output, inputs) -> tensor``, where ``inputs``
        are the tensors that the model got (a tuple, or a dict if they went by keyword). Default: the only tensor.
    method : str
        Method of the model to call.
    training : {"refuse", "eval", "keep"}
        What to do with a model that has submodules in train mode.
    device : str, optional
        Default: "cuda" where there is one, else "cpu".
    keywords : sequence of str
        Names under which the last inputs go to the model.
    **constants
        Passed to the model as they are.

    Raises
    ------
    ModelNotFound, TrainingModeError, SettingsError

    Examples
    --------
    >>> import zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-predictor")
    >>> p = Predictor("doc-predictor")
    >>> p(np.ones((10, 4), np.float32)).shape
    (10, 2)
    """

    def __init__(
        self,
        model: str | ModelRef,
        *,
        batch_size: int | str = "auto",
        output: Output = None,
        method: str = "forward",
        training: str = "refuse",
        device: str | None = None,
        keywords: Sequence[str] = (),
        **constants: Any,
    ):
        if batch_size != "auto" and not (isinstance(batch_size, int | np.integer) and batch_size > 0):
            raise SettingsError(f"batch_size is {batch_size!r}: give a number of rows, or 'auto'")
        if training not in ("refuse", "eval", "keep"):
            raise SettingsError(f"training is {training!r}: choose 'refuse', 'eval' or 'keep'")
        try:
            torch.device(device or "cpu")
        except RuntimeError as error:
            raise SettingsError(f"device is {device!r}: choose one like 'cpu', 'cuda' or 'cuda:1'") from error
        self.ref = ready(model)
        self.batch_size = batch_size if isinstance(batch_size, str) else int(batch_size)
        self.output = output
        self.method = method
        self.training = training
        self.device = device
        self.keywords = tuple(keywords)
        self.constants = constants
        self.binding: Binding | None = None
        description, _ = describe(self.ref)
        if description.training and training == "refuse":
            names = ", ".join(repr(name) if name else "the model itself" for name in description.training[:3])
            raise TrainingModeError(
                f"{self.ref} has {len(description.training)} submodules in train mode ({names}...): their answers may "
                "depend on the batch. Call model.eval() before you put it, or say training='eval' (or 'keep')."
            )

    def __repr__(self) -> str:
        return f"Predictor({str(self.ref)!r}, batch_size={self.batch_size!r})"

    __name__ = "predict"  # what dask calls the tasks of a plain map_blocks

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("zcinfer.Predictor", self.fingerprint())

    def fingerprint(self) -> str:
        """SHA-256 of model and settings; the same in every process, also with functions of ``__main__``."""
        canonical = Canonical(lambda storage: sha256_each([storage_bytes(storage)])[0])
        settings = (self.output, self.method, self.training, self.device, self.keywords, self.constants)
        casts = self.binding and (self.binding.casts, self.binding.batch_size)
        canonical.add((self.ref.digest, self.batch_size, settings, casts))
        return canonical.hexdigest()

    def bind(self, inputs: Sequence[Rows], sample: Callable[[], Sequence[Array]] | None = None) -> Predictor:
        """The predictor for inputs of these row shapes and dtypes, with its output's shape and dtype found.

        Parameters
        ----------
        inputs : sequence of Rows
            Positional ones first, then those of ``keywords``.
        sample : callable, optional
            Gives some real rows of each input, ``(rows, ...)``; asked for only where the model's branches depend
            on data, so that its output's shape cannot be found without running it. Default: zeros.

        Returns
        -------
        Predictor

        Raises
        ------
        InputError
            The model refuses such rows.
        OutputError
            Its output has no rows, or several outputs and none was chosen.
        """
        for number, rows in enumerate(inputs):
            if rows.dtype.kind not in "biufc":
                raise InputError(
                    f"{self._input_name(number, len(inputs))} has dtype {rows.dtype}, which is not numeric: convert it "
                    "first, for example with .astype('float32')"
                )
        description, skeleton = describe(self.ref)
        failures: list[Exception] = []
        candidates = list(_candidate_casts(inputs, description.dtype))

        def attempt(run: Callable[[tuple[str, ...]], Rows]) -> Binding | None:
            for casts in candidates:
                try:
                    output = run(casts)
                except ZcinferError:
                    raise
                except Exception as error:
                    failures.append(error)
                else:
                    return Binding(tuple(inputs), casts, output, self._batch_rows(inputs))
            return None

        binding = attempt(lambda casts: self._output_of_fake(inputs, casts, description, skeleton))
        if binding is None:
            two = [_two_rows(r, array) for r, array in zip(inputs, sample() if sample else _zeros(inputs), strict=True)]
            binding = attempt(lambda casts: self._output_of_real(two, casts))
            if binding is None:
                found = ", ".join(
                    f"{self._input_name(number, len(inputs))} {rows}" for number, rows in enumerate(inputs)
                )
                failure = furthest(failures[len(failures) // 2 :])  # those on real rows
                raise InputError(
                    f"{self.ref} ({description.class_name}) does not take these inputs: found {found}; "
                    f"{explain(failure)}. Give rows of the shape and dtype that the model was made for."
                ) from failure
            log.info(
                "the output of %s could not be found without weights (%s); two rows were run on the CPU",
                self.ref,
                type(failures[0]).__name__,
            )
        bound = copy.copy(self)
        bound.binding = binding
        return bound

    def like(self, *arrays: Any, **inputs: Any) -> dict[str, Any]:
        """Keywords for ``x.map_blocks(p, **p.like(x))``: dtype, meta, chunks and changed axes of the result.

        Binds this predictor to the arrays.

        Parameters
        ----------
        *arrays, **inputs : dask.array.Array
            As they will be passed; all axes but the first in one chunk, and all of as many axes, since ``map_blocks``
            aligns the last ones. (`predict` takes any.)
        """
        every = [*arrays, *inputs.values()]
        if inputs:
            self.keywords = tuple(inputs)
        if len({array.ndim for array in every}) != 1:
            raise InputError(
                "map_blocks would not align the rows of inputs with different numbers of axes: use zcinfer.predict"
            )
        for array in every:
            if not hasattr(array, "chunks"):
                raise InputError(
                    f"an input is a {type(array).__name__}: give dask arrays, or call the predictor itself"
                )
            if any(len(lengths) > 1 for lengths in array.chunks[1:]):
                axes = dict.fromkeys(range(1, array.ndim), -1)
                raise InputError(f"the axes after the first are cut into several chunks: use x.rechunk({axes})")
        binding = self.bind([rows_of(a) for a in every], lambda: [first_rows(a) for a in every]).binding
        assert binding is not None
        self.binding = binding
        shape, ndim = binding.output.shape, every[0].ndim
        return {
            "dtype": binding.output.dtype,
            "meta": np.empty((0,) * (1 + len(shape)), binding.output.dtype),
            "chunks": (every[0].chunks[0], *((n,) for n in shape)),
            "drop_axis": list(range(1, ndim)),
            "new_axis": list(range(1, 1 + len(shape))),
        }

    def __call__(self, *blocks: Array, block_id: tuple[int, ...] | None = None, **inputs: Array) -> Array:
        """Run the model on blocks of rows.

        Parameters
        ----------
        *blocks, **inputs : numpy.ndarray
            ``(rows, ...)`` each, with equal numbers of rows.

        Returns
        -------
        numpy.ndarray
            ``(rows, ...)``; bfloat16 comes back as float32, which NumPy has.

        Raises
        ------
        InputError, BlockError
        """
        predictor = self
        if inputs:
            predictor = copy.copy(self)
            predictor.keywords = tuple(inputs)
        if block_id is None:
            return predictor.run_block((*blocks, *inputs.values()), "the rows given")
        return predictor.run_block((*blocks, *inputs.values()), f"block {block_id[0]}", first_row=None)

    def run_block(self, blocks: Sequence[Array], where: str, first_row: int | None = 0) -> Array:
        """Run the model on one block.

        Parameters
        ----------
        blocks : sequence of numpy.ndarray
            Positional inputs first, then those of ``keywords``.
        where : str
            What to call the block in errors.
        first_row : int, optional
            Number of the block's first row in the whole array; None: not known.
        """
        blocks = [_as_array(block, self._input_name(number, len(blocks))) for number, block in enumerate(blocks)]
        found = tuple(rows_of(block) for block in blocks)
        lengths = sorted({len(block) for block in blocks})
        if len(lengths) > 1:
            raise InputError(f"{where}: the inputs have different numbers of rows, {lengths}")
        bound = self if self.binding and self.binding.inputs == found else self.bind(found, lambda: blocks)
        binding = bound.binding
        assert binding is not None
        result = np.empty((lengths[0], *binding.output.shape), binding.output.dtype)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if lengths[0] == 0:
            return result
        try:
            with residents.lend(self.ref, device, self.training) as model, torch.inference_mode():
                for start in range(0, lengths[0], binding.batch_size):
                    stop = min(start + binding.batch_size, lengths[0])
                    span = f"{where}, rows {_span(start, stop, first_row)}, of {self.ref}"
                    try:
                        tensors = [
                            _tensor(b[start:stop], c, device) for b, c in zip(blocks, binding.casts, strict=True)
                        ]
                        batch = _numpy(bound._forward(model, tensors))
                    except Exception as error:
                        raise BlockError(f"{span}: {explain(error)}") from error
                    if stop - start == 1 and batch.shape == binding.output.shape:
                        batch = batch[None]  # squeezed away by the model, with axes that it means to
                    if batch.shape != (stop - start, *binding.output.shape):
                        raise BlockError(
                            f"{span}: the output has shape {batch.shape}, expected ({stop - start}, ...) as "
                            f"{binding.output}, found before the job began"
                        )
                    result[start:stop] = batch
        except ZcinferError:
            raise
        except Exception as error:
            raise BlockError(f"{where}: {self.ref} cannot be used on {device}: {explain(error)}") from error
        return result

    def _forward(self, model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        positional = len(tensors) - len(self.keywords)
        named = dict(zip(self.keywords, tensors[positional:], strict=True))
        function = model if self.method == "forward" else getattr(model, self.method, None)
        if not callable(function):
            raise SettingsError(f"{type(model).__name__} has no method {self.method!r}")
        output = function(*tensors[:positional], **named, **self.constants)
        inputs: Any = {**dict(enumerate(tensors[:positional])), **named} if named else tuple(tensors)
        return _choose(output, self.output, inputs)

    def _output_of_fake(
        self, inputs: Sequence[Rows], casts: tuple[str, ...], description: Any, skeleton: bytes
    ) -> Rows:
        shapes = []
        for rows in (2, 3):
            with weightless(skeleton, description) as model:
                if self.training == "eval":
                    model.eval()
                tensors = [
                    torch.empty((rows, *r.shape), dtype=getattr(torch, cast))
                    for r, cast in zip(inputs, casts, strict=True)
                ]
                output = self._forward(model, tensors)
                shapes.append((tuple(int(n) for n in output.shape), output.dtype))
        return _rows_axis(shapes, (2, 3), self.ref)

    def _output_of_real(self, rows: Sequence[Array], casts: tuple[str, ...]) -> Rows:
        shapes = []
        with residents.lend(self.ref, "cpu", self.training) as model, torch.inference_mode():
            for count in (1, 2):
                tensors = [_tensor(r[:count], c, "cpu") for r, c in zip(rows, casts, strict=True)]
                output = self._forward(model, tensors)
                shapes.append((tuple(output.shape), output.dtype))
        return _rows_axis(shapes, (1, 2), self.ref)

    def _batch_rows(self, inputs: Sequence[Rows]) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size
        rows = max(1, _AUTO_BYTES // max(1, sum(r.nbytes for r in inputs)))
        return min(_AUTO_MOST, max(_AUTO_LEAST, 1 << (rows.bit_length() - 1)))

    def _input_name(self, number: int, total: int) -> str:
        positional = total - len(self.keywords)
        return f"input {number}" if number < positional else repr(self.keywords[number - positional])


def rows_of(array: Any) -> Rows:
    """Row shape and dtype of a NumPy or dask array; refuses one without rows."""
    if array.ndim == 0:
        raise InputError("an input is a single number: the rows are along axis 0, so it needs at least one axis")
    return Rows(tuple(array.shape[1:]), array.dtype.newbyteorder("="))


def first_rows(array: Any) -> Array:
    """Some of the first rows of a NumPy or dask array, computed; none where the first block is empty."""
    known = array.shape[0] == array.shape[0]
    rows: Array = np.asarray(array[:2] if known else array.blocks[0])
    return rows


def refuse_masked(array: Any, name: str = "an input") -> None:
    """Refuse an array of which values are to be skipped."""
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, and a model cannot skip values: fill it first, with x.filled(value)"
        )


def _as_array(block: Any, name: str) -> Array:
    refuse_masked(block, name)
    if not isinstance(block, np.ndarray):
        raise InputError(f"{name} is a {type(block).__name__}: give a NumPy or dask array, for example np.asarray(x)")
    return block


def _candidate_casts(inputs: Sequence[Rows], floating: str) -> Iterator[tuple[str, ...]]:
    def cast(dtype: np.dtype[Any], integer: str) -> str:
        if dtype.kind == "f" and floating:
            return floating
        if dtype.kind in "iub":
            name = integer or dtype.name
            return name if name in _TORCH_INTEGERS or name == floating or dtype.kind == "b" else "int64"
        return dtype.name

    seen = set()
    for integer in ("", "int64", *([floating] if floating else [])):
        casts = tuple(cast(rows.dtype, integer) for rows in inputs)
        if casts not in seen:
            seen.add(casts)
            yield casts


def _choose(output: Any, which: Output, inputs: Any) -> torch.Tensor:
    chosen: Any
    if callable(which):
        chosen = which(output, inputs)
    elif isinstance(which, str):
        chosen = output.get(which) if isinstance(output, Mapping) else getattr(output, which, None)
        if chosen is None:
            raise OutputError(f"the model gives no output {which!r}: it gives {_outputs(output)}")
    elif isinstance(which, int):
        try:
            chosen = output[which]
        except (IndexError, KeyError, TypeError):
            raise OutputError(f"the model gives no output {which}: it gives {_outputs(output)}") from None
    elif isinstance(output, torch.Tensor):
        chosen = output
    else:
        tensors = [value for value in _items(output).values() if isinstance(value, torch.Tensor)]
        if len(tensors) != 1:
            raise OutputError(
                f"the model gives {_outputs(output)}: say which, with output=NAME, POSITION or a function"
            )
        chosen = tensors[0]
    if not isinstance(chosen, torch.Tensor):
        raise OutputError(f"the chosen output is a {type(chosen).__name__}, not a tensor")
    return chosen


def _items(output: Any) -> dict[Any, Any]:
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _outputs(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"one tensor of shape {tuple(output.shape)}"
    found = [f"{k!r} {tuple(v.shape)}" for k, v in _items(output).items() if isinstance(v, torch.Tensor)]
    return ", ".join(found) or f"a {type(output).__name__} without tensors"


def _rows_axis(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], rows: tuple[int, int], ref: ModelRef) -> Rows:
    (first, dtype), (second, _) = shapes
    if rows[0] == 1 and first == second[1:]:
        first = (1, *first)  # squeezed away by the model, with axes that it means to
    if not first or (first[0], second[0]) != rows or first[1:] != second[1:]:
        raise OutputError(
            f"the output of {ref} has no row axis: {rows[0]} rows give shape {first}, {rows[1]} give {second}, "
            "expected (rows, ...). Choose or shape it with output=f(output, inputs)."
        )
    return Rows(first[1:], _numpy(torch.empty(0, dtype=dtype)).dtype)


def _tensor(block: Array, cast: str, device: str) -> torch.Tensor:
    # Always a copy: a model may write to its input, which other tasks, or the caller, still use. It also takes
    # read-only, strided, Fortran-ordered and big-endian blocks.
    if cast == "bfloat16":  # which NumPy has not
        dtype = np.dtype("float64") if block.itemsize > 8 else block.dtype.newbyteorder("=")
    else:
        dtype = np.dtype(cast)
    tensor = torch.from_numpy(np.array(block, dtype=dtype, order="C", copy=True))
    return tensor.to(device=device, dtype=getattr(torch, cast))


def _numpy(tensor: torch.Tensor) -> Array:
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    array: Array = tensor.detach().resolve_conj().resolve_neg().to_dense().cpu().numpy()
    return array


def _zeros(inputs: Sequence[Rows]) -> list[Array]:
    return [np.zeros((2, *rows.shape), rows.dtype) for rows in inputs]


def _two_rows(rows: Rows, array: Array) -> Array:
    if len(array) == 0:
        return np.zeros((2, *rows.shape), rows.dtype)
    return np.concatenate([array[:1], array[-1:]]) if len(array) == 1 else array[:2]


def _span(start: int, stop: int, first_row: int | None) -> str:
    if first_row is None:
        return f"{start:,}–{stop - 1:,} of the block"
    return f"{first_row + start:,}–{first_row + stop - 1:,}"
