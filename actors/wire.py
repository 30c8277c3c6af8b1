"""Records of equal-length arrays as Arrow record batches, for the small messages between actors."""

from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

Record = TypeVar("Record")

_SECONDS = b"seconds"


def to_arrow(record: Any, kind: type[Any] | None = None) -> pa.RecordBatch:
    """Return a batch with one column per field of `kind`, the record's own by default.

    Each field is a numpy array [B, ...] with one B.
    """
    columns = {f.name: _column(getattr(record, f.name)) for f in fields(kind or type(record))}
    return pa.RecordBatch.from_pydict(columns)


def timed(batch: pa.RecordBatch, seconds: float) -> pa.RecordBatch:
    """Return the batch with the seconds that its maker was at work."""
    return batch.replace_schema_metadata({_SECONDS: repr(seconds)})


def seconds_of(batch: pa.RecordBatch) -> float:
    """Return the seconds of a batch made by `timed`."""
    return float(batch.schema.metadata[_SECONDS])


def from_arrow(kind: type[Record], *batches: pa.RecordBatch) -> Record:
    """Return the record of that dataclass, from batches that have its fields between them; arrays are views."""
    columns = {name: batch.column(name) for batch in batches for name in batch.schema.names}
    return kind(**{f.name: _array(columns[f.name]) for f in fields(kind)})  # type: ignore[arg-type]


def _column(array: np.ndarray[Any, Any]) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(array.reshape(-1))
    kind = pa.fixed_shape_tensor(flat.type, array.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type))


def _array(column: pa.Array) -> np.ndarray[Any, Any]:
    if isinstance(column, pa.FixedShapeTensorArray):
        return np.asarray(column.to_numpy_ndarray())
    return np.asarray(column.to_numpy(zero_copy_only=False))
