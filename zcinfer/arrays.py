"""``predict``: a model applied to arrays, as one layer of a Dask graph. Not for files (`jobs`)."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from .errors import InputError, SettingsError
from .expansion import Spec
from .outputs import Output
from .predictor import Predictor
from .rows import Rows, first_rows, only, refuse_masked, rows_of
from .sizes import format_size
from .store import ModelRef

if TYPE_CHECKING:
    from .windowing import Windows

log = logging.getLogger("zcinfer")

# Of `predict`, with a `Predictor`.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Predictor.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "keywords"
}


def predict(
    model: str | ModelRef | Predictor,
    *arrays: Any,
    batch_size: int | str = "auto",
    output: Output | Sequence[Output] = None,
    method: str = "forward",
    training: str = "refuse",
    device: str | None = None,
    preprocess: Callable[..., Any] | None = None,
    postprocess: Callable[..., Any] | None = None,
    autocast: str | None = None,
    dtype: str | None = None,
    sort_by: str | None = None,
    **inputs: Any,
) -> Any:
    """Apply a model to arrays, row by row along axis 0.

    Parameters
    ----------
    model : str, ModelRef or Predictor
        A name is resolved now, to one version. A `Predictor` brings its own settings: give no others here.
    *arrays : numpy.ndarray, dask.array.Array or Windows
        ``(rows, ...)`` each; passed to the model by position.
    batch_size : int or "auto"
        Rows that one forward gets. "auto": measured once for this model, rows of this kind and this device, before the
        first block, and remembered beside the registry; by the bytes of a row where there are few rows. Batches begin
        at each block's first row, so that a chunking and a batch size determine the result to the last bit.
    output : str, int or callable, or a list of them, optional
        Which output: a key or attribute, a position, or ``f(output, inputs) -> tensor``. A list: several arrays, of one
        pass over the inputs if they are computed together. Default: the only tensor.
    method, training, device, preprocess, postprocess, autocast, dtype, sort_by
        As for `Predictor`.
    **inputs : numpy.ndarray, dask.array.Array or Windows, or anything else
        Arrays are passed to the model by keyword, row by row; other values as they are.

    Returns
    -------
    numpy.ndarray or dask.array.Array, or a tuple of them
        ``(rows, ...)``: computed at once in this process if all inputs are NumPy arrays, or windows of such; lazy, in
        the row chunks of the first lazy input, if any is a dask array or windows of one.

    Raises
    ------
    ModelNotFound, TrainingModeError, SettingsError
    InputError
        The model refuses such rows (found and expected are named), or lengths differ.
    OutputError
        There are several outputs and none was chosen, or the output has no rows.
    BlockError
        While computing: names the block, its rows and the model's version.

    Notes
    -----
    The rule for dtypes is in `zcinfer.rows`.

    Examples
    --------
    >>> import dask.array as da, torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-predict")
    >>> predict("doc-predict", da.ones((1000, 4), chunks=(250, 4)))
    dask.array<predict, shape=(1000, 2), dtype=float32, chunksize=(250, 2), chunktype=numpy.ndarray>
    """
    named = {name: value for name, value in inputs.items() if _is_array(value)}
    constants = {name: value for name, value in inputs.items() if name not in named}
    for name, value in constants.items():
        if isinstance(value, list) or len(getattr(value, "shape", ())) > 0:
            raise InputError(
                f"{name} is a {type(value).__name__}: if it has a row for each row of the others, give a NumPy or dask "
                "array, for example np.asarray(x); if it is for the model as it is, give a tuple"
            )
    every = [*arrays, *named.values()]
    if not every:
        raise InputError("no input given: pass one array or more, with rows along axis 0")
    for number, array in enumerate(every):
        if not _is_array(array):
            raise InputError(
                f"input {number} is a {type(array).__name__}: give a NumPy or dask array, for example np.asarray(x)"
            )
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "output": output,
        "method": method,
        "training": training,
        "device": device,
        "preprocess": preprocess,
        "postprocess": postprocess,
        "autocast": autocast,
        "dtype": dtype,
        "sort_by": sort_by,
    }
    if isinstance(model, Predictor):
        if constants or settings != _DEFAULTS:
            raise SettingsError("a Predictor brings its own settings: give them to it, and not to predict")
        predictor = copy.copy(model)
    else:
        predictor = Predictor(model, **settings, **constants)
    if named:
        predictor.keywords = tuple(named)
    if not any(map(_is_lazy, every)):
        rows = [array.head(len(array)) if _is_windows(array) else array for array in every]
        return predictor.run_block(rows, "the rows given")
    return _lazy(predictor, every)


def _lazy(predictor: Predictor, inputs: Sequence[Any]) -> Any:
    import dask.array as da
    from dask.layers import ArrayValuesDep

    specs = [rows_of(array) for array in inputs]
    for array in inputs:
        refuse_masked(getattr(array, "_meta", array))
    row_chunks = next(array.chunks[0] for array in inputs if _is_lazy(array))
    arrays = [_rechunk(array, row_chunks, number) for number, array in enumerate(inputs)]
    expansions = [array.spec if _is_windows(array) else None for array in inputs]
    bound = predictor.bind(specs, lambda: [first_rows(array) for array in inputs])
    assert bound.binding is not None
    starts = np.cumsum([0, *row_chunks])[:-1].tolist()
    where = ArrayValuesDep(
        (row_chunks,), {(i,): (i, None if start != start else int(start)) for i, start in enumerate(starts)}
    )
    # Index 0 is the blocks of rows of all, which lie along axis 0 (of windows: along that of the samples); every other
    # axis is one chunk and belongs to one array alone.
    axes = iter(range(1, 1000))
    pairs: list[Any] = [where, (0,)]
    for array, spec in zip(arrays, expansions, strict=True):
        blocks_along = spec.axis if spec else 0
        pairs += [array, tuple(0 if axis == blocks_along else next(axes) for axis in range(array.ndim))]
    options = {"align_arrays": False, "batch_rows": bound.planned(row_chunks)}
    name = "predict-" + _token(bound, arrays, expansions)
    function = partial(_run_block, bound, expansions)

    def layer(function: Callable[..., Any], output: Rows, *pairs: Any, **options: Any) -> Any:
        new = {next(axes): length for length in output.shape}
        meta = np.empty((0,) * (1 + len(new)), output.dtype)
        return da.blockwise(function, (0, *new), *pairs, new_axes=new, dtype=output.dtype, meta=meta, **options)

    if not bound.binding.several:
        return layer(function, bound.binding.output, *pairs, **options, name=name)
    # A block of these is the tuple of all outputs.
    passes = layer(function, Rows((), np.dtype(object)), *pairs, **options, name=name)
    return tuple(
        layer(itemgetter(number), output, passes, (0,), name=f"output-{number}-{name}")
        for number, output in enumerate(bound.binding.outputs)
    )


def _run_block(
    predictor: Predictor,
    expansions: Sequence[Spec | None],
    where: tuple[int, int | None],
    *blocks: Any,
    batch_rows: int,
) -> Any:
    number, first_row = where
    rows = list(map(only, blocks))
    rows = [spec.expand(block, first_row or 0) if spec else block for spec, block in zip(expansions, rows, strict=True)]
    return predictor.run_block(rows, f"block {number}", first_row, batch_rows)


def _rechunk(array: Any, row_chunks: tuple[Any, ...], number: int) -> Any:
    """The array as a dask array in the given row chunks, with every other axis in one chunk; windows as segments."""
    import dask.array as da

    rows, expected = array.shape[0], sum(row_chunks)
    known = rows == rows and expected == expected
    if known and rows != expected:
        raise InputError(f"the inputs have different numbers of rows: {rows:,} and {expected:,}")
    if known and _is_windows(array):
        return array.segments(row_chunks)
    if known and isinstance(array, np.ndarray):
        return da.from_array(array, chunks=(row_chunks, *((length,) for length in array.shape[1:])))
    if not known and (not isinstance(array, da.Array) or len(array.chunks[0]) != len(row_chunks)):
        raise InputError("the inputs have unknown and different row chunks: call compute_chunk_sizes() on them")
    chunks: dict[int, Any] = {axis: -1 for axis in range(1, array.ndim) if len(array.chunks[axis]) > 1}
    if chunks:
        pieces = math.prod(len(array.chunks[axis]) for axis in chunks)
        held = format_size(int(max(row_chunks) * rows_of(array).nbytes)) if known else "all of its rows"
        log.warning(
            "input %d is cut along %s, and a model needs whole rows: %d chunks are read and joined for each block, "
            "which then holds %s. Chunks of whole rows (x.rechunk(%s), once, on disk) would spare that",
            number,
            " and ".join(f"axis {axis}" for axis in chunks),
            pieces,
            held,
            chunks,
        )
    if known and array.chunks[0] != row_chunks:
        chunks[0] = row_chunks
    return array.rechunk(chunks) if chunks else array


def _token(predictor: Predictor, arrays: Sequence[Any], expansions: Sequence[Spec | None]) -> str:
    from dask.base import tokenize

    return str(tokenize(predictor, [array.name for array in arrays], [spec and spec.identity() for spec in expansions]))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or type(value).__module__.startswith("dask.array") or _is_windows(value)


def _is_windows(value: Any) -> TypeGuard[Windows]:
    return type(value).__module__ == f"{__package__}.windowing"  # without importing dask.array for NumPy arrays


def _is_lazy(value: Any) -> bool:
    return value.is_lazy if _is_windows(value) else not isinstance(value, np.ndarray)
