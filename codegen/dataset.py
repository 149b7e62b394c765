"""Calibration and evaluation data: named arrays, checked against the network's inputs.

Shapes. One sample is one inference. An input whose leading dimension is symbolic or 1 takes one row per sample; an
input of fixed leading dimension B takes B rows per sample, so that rows N*B make N samples; a scalar input takes one
element. Whole inputs stacked on an extra axis in front are accepted too. Where all other inputs have N samples, a
scalar input and one of fixed B may be given once and then serve every sample.

Types. Floats are converted to the float the network wants, integers to its integer where every value fits. An integer
array for a float input is refused: almost always it is raw pixels that still lack the scaling the network was trained
with, and a silent conversion would calibrate on nonsense.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.dataset_files import LABELS, Piece, pieces, split_source
from passes.errors import InputError, UnsupportedError, UsageError
from passes.graph import TensorSpec

__all__ = ["Dataset", "bind_shapes", "load", "of_arrays", "random_inputs", "split_source"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Dataset:
    """``count`` samples. ``feeds``: input name -> rows of all samples, (count * rows, ...).

    ``rows``: input name -> rows of the leading axis that one sample takes, 0 for a scalar input. ``dynamic``: every
    input has a symbolic leading dimension, so samples can be batched. ``dropped``: rows at the end that made no whole
    sample. ``labels``: one per row of the first batched input, or None. ``source`` says where it came from.
    """

    feeds: dict[str, Array]
    rows: dict[str, int]
    count: int
    dynamic: bool
    source: str
    labels: Array | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int = 1) -> Iterator[dict[str, Array]]:
        """Feeds for one inference each: ``size`` samples at a time where the batch is symbolic, else one."""
        step = size if self.dynamic else 1
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            yield {
                name: array[start * rows : stop * rows] if (rows := self.rows[name]) else np.asarray(array[start])
                for name, array in self.feeds.items()
            }

    def head(self, count: int) -> Dataset:
        """The first ``count`` samples."""
        if count >= self.count:
            return self
        labels = None if self.labels is None else self.labels[: count * (len(self.labels) // self.count)]
        feeds = {name: array[: count * max(self.rows[name], 1)] for name, array in self.feeds.items()}
        return replace(self, feeds=feeds, count=count, labels=labels)

    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values."""
        state = hashlib.sha256()
        labels = {} if self.labels is None else {LABELS: self.labels}
        for name, array in sorted({**self.feeds, **labels}.items()):
            state.update(f"{name} {array.dtype.str} {array.shape};".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()


def load(
    source: str,
    inputs: Sequence[TensorSpec],
    limit: int | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Dataset:
    """Reads ``source`` (see :mod:`codegen.dataset_files`), at most ``limit`` samples of it.

    ``on_rows`` is told how many rows of the first input have been read, after each file or item.
    Raises InputError of one line: which key, what it is, what was expected.
    """
    names = [spec.name for spec in inputs]
    found: dict[str, list[Array]] = {name: [] for name in names}
    labels: list[Array] = []
    wheres: dict[str, str] = {}
    for piece in pieces(source, names):
        _take(piece, inputs, limit, found, labels, wheres)
        on_rows(_rows(found[names[0]]) if names else 0)
        if limit is not None and all(_rows(found[s.name]) >= limit * max(_rows_each(s), 1) for s in inputs):
            break
    missing = [name for name in names if not found[name]]
    if missing:
        raise InputError(f"{source}: has no data for the input {missing[0]!r}; needs {_expected(inputs)}")
    feeds = {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in found.items()}
    return _assemble(source, inputs, feeds, labels, limit)


def _take(
    piece: Piece,
    inputs: Sequence[TensorSpec],
    limit: int | None,
    found: dict[str, list[Array]],
    labels: list[Array],
    wheres: dict[str, str],
) -> None:
    specs = {spec.name: spec for spec in inputs}
    lengths = set()
    for name, array in piece.arrays.items():
        if name == LABELS and name not in specs:
            labels.append(np.atleast_1d(array))
            continue
        if name not in specs:
            raise InputError(f"{piece.where}: {name!r} is no input of the network; needs {_expected(inputs)}")
        whole = _rows_of(array, specs[name], piece)
        lengths.add(len(whole))
        part = whole if limit is None else whole[: limit * max(_rows_each(specs[name]), 1)]
        rows = _converted(part, specs[name], f"{piece.where}: {name!r}")
        earlier = found[name]
        if earlier and earlier[0].shape[1:] != rows.shape[1:]:
            raise InputError(
                f"{piece.where}: {name!r} has samples of shape {rows.shape[1:]}, but those before ({wheres[name]}) "
                f"have {earlier[0].shape[1:]}; all samples of a run share one shape"
            )
        wheres.setdefault(name, piece.where)
        earlier.append(rows)
    if lengths and LABELS in piece.arrays and len(labels[-1]) not in lengths:
        raise InputError(f"{piece.where}: {LABELS!r} has {len(labels[-1])} entries for {max(lengths)} rows of data")
    absent = [name for name in specs if name not in piece.arrays]
    if absent and piece.arrays.keys() != {LABELS}:
        raise InputError(f"{piece.where}: has no data for the input {absent[0]!r}; needs {_expected(inputs)}")


def _rows_of(array: Array, spec: TensorSpec, piece: Piece) -> Array:
    """One input as rows; checks rank and shape."""
    where, rank = f"{piece.where}: {spec.name!r}", len(spec.shape)
    shaped = array
    if array.ndim == rank + 1 and rank:
        shaped = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
    elif array.ndim == 0 == rank or (piece.one_sample and array.ndim == rank - 1):
        shaped = array[None]
    if shaped.ndim != max(rank, 1) or any(
        isinstance(want, int) and have != want for have, want in zip(shaped.shape[1:], spec.shape[1:], strict=True)
    ):
        raise InputError(f"{where} has shape {array.shape}, expected {_shape_text(spec)}")
    if shaped.size == 0:
        raise InputError(f"{where} is empty: shape {array.shape}, expected {_shape_text(spec)}")
    return shaped


def _converted(array: Array, spec: TensorSpec, where: str) -> Array:
    """The rows in the network's type; checks type and values."""
    wanted = _dtype(spec)
    have = array.dtype.kind
    if array.dtype != wanted:
        if have in "iu" and wanted.kind == "f":
            raise InputError(
                f"{where} is {array.dtype}, expected {wanted}; convert and scale it the way the network was trained"
            )
        if not (have == wanted.kind == "f" or (have in "iu" and wanted.kind in "iu")):
            raise InputError(f"{where} is {array.dtype}, expected {wanted}")
    if have == "f" and not (finite := np.isfinite(array)).all():
        bad = int(array.size - np.count_nonzero(finite))
        raise InputError(f"{where} holds {bad} NaN or infinite values of {array.size}")
    if have in "iu" and array.dtype != wanted:
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InputError(f"{where} holds values that do not fit {wanted}: {array.min()} to {array.max()}")
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, dtype=wanted)
    if have == "f" and wanted.itemsize < array.dtype.itemsize and not np.isfinite(out).all():
        raise InputError(f"{where} holds values too large for {wanted}")
    return out


def _assemble(
    source: str, inputs: Sequence[TensorSpec], feeds: dict[str, Array], label_parts: list[Array], limit: int | None
) -> Dataset:
    rows = {spec.name: _rows_each(spec) for spec in inputs}
    counts = {name: len(array) // max(rows[name], 1) for name, array in feeds.items()}
    for name, count in counts.items():
        if count == 0:
            raise InputError(f"{source}: {name!r} has {len(feeds[name])} rows, one sample takes {rows[name]}")
    # Given once, a scalar or a state of fixed leading dimension serves all samples.
    leader = max(counts, key=lambda name: (counts[name], -rows[name]))
    total = counts[leader]
    for spec in inputs:
        count, serves_all = counts[spec.name], rows[spec.name] != 1
        if count == 1 and total > 1 and serves_all:
            feeds[spec.name] = np.concatenate([feeds[spec.name]] * total)
        elif count != total:
            raise InputError(
                f"{source}: {spec.name!r} holds {count} samples, but {leader!r} holds {total}; all inputs need as many"
            )
    _check_symbols(source, inputs, feeds)
    kept = total if limit is None else min(total, limit)
    each = max(rows[leader], 1)
    labels = None
    if label_parts:
        labels = np.concatenate(label_parts)
        if len(labels) < kept * each or (limit is None and len(labels) != len(feeds[leader])):
            raise InputError(f"{source}: {LABELS!r} has {len(labels)} entries for {len(feeds[leader])} rows of data")
        labels = labels[: kept * each]
    dropped = len(feeds[leader]) - total * each
    feeds = {name: array[: kept * max(rows[name], 1)] for name, array in feeds.items()}
    dynamic = all(spec.shape and not isinstance(spec.shape[0], int) for spec in inputs)
    return Dataset(feeds, rows, kept, dynamic, source, labels, dropped)


def _check_symbols(source: str, inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Dimensions of one name must agree between inputs, the leading one apart (it counts samples)."""
    seen: dict[str, tuple[str, int]] = {}
    for spec in inputs:
        for symbol, size in zip(spec.shape[1:], feeds[spec.name].shape[1:], strict=True):
            if isinstance(symbol, str) and symbol:
                name, first = seen.setdefault(symbol, (spec.name, size))
                if first != size:
                    raise InputError(
                        f"{source}: dimension {symbol!r} is {first} in {name!r} and {size} in {spec.name!r}"
                    )


def bind_shapes(inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    """``inputs`` with the shapes that the user gave; UsageError where one does not fit or names no input."""
    for name in shapes:
        if name not in {spec.name for spec in inputs}:
            raise UsageError(f"--shape {name}: no input is called so; inputs: {', '.join(s.name for s in inputs)}")
    bound = []
    for spec in inputs:
        shape: tuple[int | str | None, ...] = shapes.get(spec.name, spec.shape)
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(want, int) or want == have for have, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            written = ",".join(str(size) for size in shape)
            raise UsageError(f"--shape {spec.name}={written} does not fit the network, which has {_shape_text(spec)}")
        bound.append(replace(spec, shape=shape))
    return tuple(bound)


def random_inputs(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], count: int, seed: int
) -> Dataset:
    """``count`` random samples: standard normal floats, integers and booleans from {0, 1} (valid as small indices).

    ``shapes`` binds inputs; a symbolic leading dimension needs no binding. UsageError where another one stays open.
    """
    rng = np.random.default_rng(seed)
    specs = bind_shapes(inputs, shapes)
    feeds: dict[str, Array] = {}
    for spec in specs:
        open_dims = [str(d or "?") for d in spec.shape[1:] if not isinstance(d, int)]
        if open_dims:
            lead = spec.shape[0] if isinstance(spec.shape[0], int) else 1
            sizes = ",".join(str(d or "?") for d in (lead, *spec.shape[1:]))
            raise UsageError(
                f"input {spec.name!r} has the symbolic dimension {open_dims[0]}; give --shape {spec.name}={sizes} "
                "with numbers, or --calib data"
            )
        dtype = _dtype(spec)
        shape = (count * max(_rows_each(spec), 1), *(int(d) for d in spec.shape[1:] if isinstance(d, int)))
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[spec.name] = values.astype(dtype)
    return _assemble(f"random inputs, seed {seed}", specs, feeds, [], None)


def of_arrays(source: str, inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> Dataset:
    """Samples that are in memory already, as the network takes them. InputError where they do not fit together."""
    return _assemble(source, inputs, dict(feeds), [], None)


def _rows_each(spec: TensorSpec) -> int:
    if not spec.shape:
        return 0
    return spec.shape[0] if isinstance(spec.shape[0], int) else 1


def _rows(parts: Sequence[Array]) -> int:
    return sum(len(part) for part in parts)


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as error:
        raise UnsupportedError(f"input {spec.name!r} is {spec.dtype}, which NumPy data cannot feed") from error
    if dtype.kind not in "fiub":
        raise UnsupportedError(f"input {spec.name!r} is {spec.dtype}; data can feed floats, integers and booleans")
    return dtype


def _shape_text(spec: TensorSpec) -> str:
    if not spec.shape:
        return "a scalar, or (N,)"
    lead = "N" if _rows_each(spec) == 1 else f"N*{_rows_each(spec)}"
    rest = ["?" if d is None or d == "" else str(d) for d in spec.shape[1:]]
    return f"({', '.join([lead, *rest])}{',' if not rest else ''})"


def _expected(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name!r} {spec.dtype} {_shape_text(spec)}" for spec in inputs)
