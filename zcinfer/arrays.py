"""``predict``: a model applied to arrays, as one layer of a Dask graph. Not for files (`jobs`)."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from .errors import InputError, SettingsError
from .expansion import Spec
from .frames import Table
from .labelled import Labels, unlabelled
from .many import BlockModel, Ensemble, Switch
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
    model: str | ModelRef | Predictor | Sequence[str | ModelRef | Predictor],
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
    engine: str = "eager",
    sort_by: str | None = None,
    columns: Any = None,
    into: Any = None,
    **inputs: Any,
) -> Any:
    """Apply a model to arrays, row by row along axis 0, or to columns of a DataFrame.

    Parameters
    ----------
    model : str, ModelRef or Predictor, or a list of them
        A name is resolved now, to one version. A `Predictor` brings its own settings: give no others here. The models
        of a list run on each block while it is in memory: a tuple of results, one for each.
    *arrays : numpy.ndarray, dask.array.Array, xarray.DataArray or Windows; or one DataFrame of pandas or dask
        ``(rows, ...)`` each; passed to the model by position.
    batch_size : int or "auto"
        Rows that one forward gets. "auto": measured once for this model, rows of this kind and this device, before the
        first block, and remembered beside the registry; by the bytes of a row where there are few rows. Batches begin
        at each block's first row, so that a chunking and a batch size determine the result to the last bit.
    output : str, int or callable, or a list of them, optional
        Which output: a key or attribute, a position, or ``f(output, inputs) -> tensor``. A list: several arrays, of one
        pass over the inputs if they are computed together. Default: the only tensor.
    method, training, device, preprocess, postprocess, autocast, dtype, engine, sort_by
        As for `Predictor`.
    columns : label, list of labels, or dict of them
        Of a DataFrame only: one column is an input ``(rows,)``, a list one ``(rows, columns)`` in the dtype that they
        have in common; a dict names the model's inputs, ``{"ids": "a", "x": ["b", "c"]}``.
    into : label or list of labels, optional
        Of a DataFrame: the new columns, one label for an output ``(rows,)`` or ``(rows, 1)``, a list for ``(rows, k)``
        (or one text, to be numbered). Default: "prediction", "prediction_0"... Of a DataArray: names of the output's
        axes after the first; one named like an axis of the input, and as long, keeps its coordinates. Default:
        "output_0"... With several outputs or models: a list with an entry for each output of each.
    **inputs : numpy.ndarray, dask.array.Array, xarray.DataArray or Windows, or anything else
        Arrays are passed to the model by keyword, row by row; other values as they are.

    Returns
    -------
    numpy.ndarray or dask.array.Array, or a tuple of them
        ``(rows, ...)``: computed at once in this process if all inputs are NumPy arrays, or windows of such; lazy, in
        the row chunks of the first lazy input, if any is a dask array or windows of one.
    xarray.DataArray, or a tuple of them
        If any input is one: with the coordinates of its rows, and its attributes; lazy if any input is.
    pandas.DataFrame or dask.dataframe.DataFrame
        The one given, with new columns; a dask one is lazy.

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

    Columns of a DataFrame, and DataArrays:

    >>> import numpy as np, pandas as pd
    >>> frame = pd.DataFrame(np.ones((5, 6)), columns=[*"uvwxyz"])
    >>> predict("doc-predict", frame, columns=["w", "x", "y", "z"], into=["left", "right"]).columns.tolist()
    ['u', 'v', 'w', 'x', 'y', 'z', 'left', 'right']
    >>> import xarray as xr
    >>> rows = xr.DataArray(np.ones((3, 4)), dims=("time", "feature"), coords={"time": [2024, 2025, 2026]})
    >>> predict("doc-predict", rows, into="class").sel(time=2025).sizes
    Frozen({'class': 2})
    """
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
        "engine": engine,
        "sort_by": sort_by,
    }
    table = Table.of(arrays, inputs, columns, into)
    if table is not None:
        _refuse_lists(inputs)
        return table.through(_asked(model, settings, inputs, table.keywords))
    labels = Labels.of(arrays, inputs, into)
    plain = {name: unlabelled(value) for name, value in inputs.items()}
    every, keywords, constants = _sorted_out([*map(unlabelled, arrays)], plain)
    asked = _asked(model, settings, constants, keywords)
    if labels is None and isinstance(asked, Predictor):
        return _apply(asked, every)
    bound = asked.bind([rows_of(array) for array in every], lambda: [first_rows(array) for array in every])
    dims = labels.dims(bound.outputs, bound.several) if labels is not None else ()
    made = _apply(bound, every)
    results = made if bound.several else [made]
    if labels is not None:
        results = [labels.put_on(array, axes) for array, axes in zip(results, dims, strict=True)]
    if isinstance(bound, Ensemble):
        return bound.grouped(results)
    return tuple(results) if bound.several else results[0]


def predict_by(models: Mapping[Any, str | ModelRef | Predictor], *arrays: Any, by: Any, **settings: Any) -> Any:
    """Send each row to the model that its label names, and put the results in the order of the rows.

    Parameters
    ----------
    models : dict of label to str, ModelRef or Predictor
        Their outputs have one shape and dtype.
    *arrays : numpy.ndarray, dask.array.Array or Windows
        ``(rows, ...)`` each.
    by : numpy.ndarray or dask.array.Array
        Labels, ``(rows,)``.
    **settings
        As for `predict`, for all models: also inputs by keyword.

    Returns
    -------
    numpy.ndarray or dask.array.Array, or a tuple of them
        As from `predict`.

    Raises
    ------
    OutputError
        The models' outputs differ.
    BlockError
        While computing: a label has no model.

    Notes
    -----
    Batches are of the rows that one model has in a block: blocks of a few batches for each model lose little. Going
    from one model to the next costs microseconds once a worker has them.

    Examples
    --------
    >>> import numpy as np, torch, zcinfer as zc
    >>> _ = zc.connect("file")
    >>> for name, sign in ("doc-plus", 1.0), ("doc-minus", -1.0):
    ...     model = torch.nn.Linear(1, 1, bias=False).eval()
    ...     _ = model.weight.data.fill_(sign), zc.put(model, name)
    >>> x, labels = np.ones((4, 1), "f4"), np.array(["a", "b", "b", "a"])
    >>> predict_by({"a": "doc-plus", "b": "doc-minus"}, x, by=labels).ravel()
    array([ 1., -1., -1.,  1.], dtype=float32)
    """
    options = {name: settings.pop(name, default) for name, default in _DEFAULTS.items()}
    every, keywords, constants = _sorted_out(arrays, settings)
    if not _is_array(by):
        raise InputError(f"the labels are a {type(by).__name__}: give a NumPy or dask array, one for each row")
    switch = Switch({label: _predictor(one, options, constants, keywords) for label, one in models.items()})
    return _apply(switch, [*every, by])


def _sorted_out(arrays: Sequence[Any], inputs: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...], dict[str, Any]]:
    """All arrays, the names of the last of them, and what goes to the model as it is."""
    named = {name: value for name, value in inputs.items() if _is_array(value)}
    constants = {name: value for name, value in inputs.items() if name not in named}
    _refuse_lists(constants)
    every = [*arrays, *named.values()]
    if not every:
        raise InputError("no input given: pass one array or more, with rows along axis 0")
    for number, array in enumerate(every):
        if not _is_array(array):
            raise InputError(
                f"input {number} is a {type(array).__name__}: give a NumPy or dask array, for example np.asarray(x)"
            )
    return every, tuple(named), constants


def _refuse_lists(constants: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        if isinstance(value, list) or len(getattr(value, "shape", ())) > 0:
            raise InputError(
                f"{name} is a {type(value).__name__}: if it has a row for each row of the others, give a NumPy or dask "
                "array, for example np.asarray(x); if it is for the model as it is, give a tuple"
            )


def _asked(
    model: Any, settings: dict[str, Any], constants: dict[str, Any], keywords: tuple[str, ...]
) -> Predictor | Ensemble:
    """The model, or the ensemble of a list of them."""
    if isinstance(model, str | ModelRef | Predictor):
        return _predictor(model, settings, constants, keywords)
    return Ensemble([_predictor(one, settings, constants, keywords) for one in model])


def _predictor(
    model: str | ModelRef | Predictor, settings: dict[str, Any], constants: dict[str, Any], keywords: tuple[str, ...]
) -> Predictor:
    if isinstance(model, Predictor):
        if constants or settings != _DEFAULTS:
            raise SettingsError("a Predictor brings its own settings: give them to it, and not to predict")
        predictor = copy.copy(model)
    else:
        predictor = Predictor(model, **settings, **constants)
    predictor.keywords = keywords or predictor.keywords
    return predictor


def _apply(model: BlockModel, inputs: Sequence[Any]) -> Any:
    if any(map(_is_lazy, inputs)):
        return _lazy(model, inputs)
    rows = [array.head(len(array)) if _is_windows(array) else array for array in inputs]
    found = [rows_of(array) for array in rows]
    return model.bind(found, lambda: rows).run_block(rows, "the rows given")


def _lazy(model: BlockModel, inputs: Sequence[Any]) -> Any:
    import dask.array as da
    from dask.layers import ArrayValuesDep

    specs = [rows_of(array) for array in inputs]
    for array in inputs:
        refuse_masked(getattr(array, "_meta", array))
    row_chunks = next(array.chunks[0] for array in inputs if _is_lazy(array))
    arrays = [_rechunk(array, row_chunks, number) for number, array in enumerate(inputs)]
    expansions = [array.spec if _is_windows(array) else None for array in inputs]
    bound = model.bind(specs, lambda: [first_rows(array) for array in inputs])
    starts = np.cumsum([0, *row_chunks])[:-1].tolist()
    where = ArrayValuesDep(
        (row_chunks,), {(i,): (i, None if start != start else int(start)) for i, start in enumerate(starts)}
    )
    # Index 0 is the blocks of rows of all, which lie along axis 0 (of windows: along that of the samples). Every other
    # axis is one chunk, whose length is nobody's matter: it is called as an axis of the result is, as long as there are
    # such, since Dask makes one task of reading and predicting only where the result has all axes of what is read.
    pairs: list[Any] = [where, (0,)]
    for array, spec in zip(arrays, expansions, strict=True):
        others, blocks_along = iter(range(1, array.ndim)), spec.axis if spec else 0
        pairs += [array, tuple(0 if axis == blocks_along else next(others) for axis in range(array.ndim))]
    options = {"align_arrays": False, "batch_rows": bound.planned(row_chunks)}
    name = "predict-" + _token(bound, arrays, expansions)
    function = partial(_run_block, bound.of_job(name), expansions)

    def layer(function: Callable[..., Any], output: Rows, *pairs: Any, **options: Any) -> Any:
        lengths = dict(enumerate(output.shape, start=1))
        most = max(map(len, pairs[1::2]))
        # What has no axes left to join needs no joining, and Dask keeps those apart from what does it.
        options |= {"concatenate": True} if most <= 1 + len(lengths) else {}
        return da.blockwise(
            function,
            (0, *lengths),
            *pairs,
            new_axes={axis: length for axis, length in lengths.items() if axis >= most},
            adjust_chunks={axis: length for axis, length in lengths.items() if axis < most},
            dtype=output.dtype,
            meta=np.empty((0,) * (1 + len(lengths)), output.dtype),
            **options,
        )

    if not bound.several:
        return layer(function, bound.outputs[0], *pairs, **options, name=name)
    # A block of these is the tuple of all outputs.
    passes = layer(function, Rows((), np.dtype(object)), *pairs, **options, name=name)
    return tuple(
        layer(itemgetter(number), output, passes, (0,), name=f"output-{number}-{name}")
        for number, output in enumerate(bound.outputs)
    )


def _run_block(
    model: BlockModel,
    expansions: Sequence[Spec | None],
    where: tuple[int, int | None],
    *blocks: Any,
    batch_rows: Any,
) -> Any:
    number, first_row = where
    rows = list(map(only, blocks))
    rows = [spec.expand(block, first_row or 0) if spec else block for spec, block in zip(expansions, rows, strict=True)]
    return model.run_block(rows, f"block {number}", first_row, batch_rows)


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


def _token(model: BlockModel, arrays: Sequence[Any], expansions: Sequence[Spec | None]) -> str:
    from dask.base import tokenize

    return str(tokenize(model, [array.name for array in arrays], [spec and spec.identity() for spec in expansions]))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or type(value).__module__.startswith("dask.array") or _is_windows(value)


def _is_windows(value: Any) -> TypeGuard[Windows]:
    return type(value).__module__ == f"{__package__}.windowing"  # without importing dask.array for NumPy arrays


def _is_lazy(value: Any) -> bool:
    return value.is_lazy if _is_windows(value) else not isinstance(value, np.ndarray)
