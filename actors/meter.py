"""What it took to sample a batch of rollouts: counts, seconds and bytes that travel with the batch."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

_KEY = b"tutelage_meter"


@dataclass(slots=True, kw_only=True)
class Meter:
    """Sums over a batch; adding up the meters of several batches gives the meter of all."""

    num_tokens: int = 0
    """Emitted."""
    num_drafted: int = 0
    """Tokens that the student drew, those behind a refused one included."""
    num_passes: int = 0
    """Passes of the teacher over a sequence, summed over sequences; not that over a finished blend for the learner."""
    num_scored: int = 0
    """Positions that the teacher scored."""
    num_reopened: int = 0
    """Sequences that went on elsewhere after an actor was lost."""
    student_s: float = 0.0
    """Seconds that students were at work."""
    teacher_s: float = 0.0
    """Seconds that teachers were at work."""
    wire_bytes: int = 0
    """Arrow bytes between students, blending service and teachers."""

    def __iadd__(self, other: "Meter") -> "Meter":
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


def metered(batch: pa.RecordBatch, meter: Meter) -> pa.RecordBatch:
    """Return the batch with this meter added to the one it carries."""
    total = meter_of([batch])
    total += meter
    metadata = dict(batch.schema.metadata or {})
    return batch.replace_schema_metadata({**metadata, _KEY: json.dumps(asdict(total)).encode()})


def meter_of(batches: Iterable[pa.RecordBatch]) -> Meter:
    """Return the sum of the batches' meters; a batch without one counts nothing."""
    total = Meter()
    for batch in batches:
        carried = (batch.schema.metadata or {}).get(_KEY)
        if carried is not None:
            total += Meter(**json.loads(carried))
    return total


def unmetered(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch without its meter."""
    metadata = dict(batch.schema.metadata or {})
    metadata.pop(_KEY, None)
    return batch.replace_schema_metadata(metadata)
