"""Records of equal-length arrays as Arrow record batches, for the small messages between actors."""

from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

Record = TypeVar("Record")


def to_arrow(record: Any) -> pa.RecordBatch:
    """Return a batch with one column per field; each field is a numpy array [B, ...] with one B."""
    columns = {f.name: _column(getattr(record, f.name)) for f in fields(record)}
    return pa.RecordBatch.from_pydict(columns)


def from_arrow(kind: type[Record], batch: pa.RecordBatch) -> Record:
    """Return the record of that dataclass; its arrays are read-only views of the batch."""
    return kind(**{f.name: _array(batch.column(f.name)) for f in fields(kind)})  # type: ignore[arg-type]


def _column(array: np.ndarray[Any, Any]) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))


def _array(column: pa.Array) -> np.ndarray[Any, Any]:
    if isinstance(column, pa.FixedShapeTensorArray):
        return np.asarray(column.to_numpy_ndarray())
    return np.asarray(column.to_numpy(zero_copy_only=False))
