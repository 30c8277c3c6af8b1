"""What the queue does with the rollouts of a batch before they are handed over."""

from typing import Any

import pyarrow as pa
import pytest
import ray

from orchestrator import experience_queue

pytestmark = pytest.mark.ray


class Shard:
    """The part of a shard that the choice of groups reads."""

    def __init__(self, learned: Any) -> None:
        self.learned = learned


def test_rows_of_groups_that_are_kept_stay_beside_their_summaries(ray_cluster: str) -> None:
    batches = [
        pa.RecordBatch.from_pydict({"prompt_id": list(ids), "sample_index": list(range(len(ids)))})
        for ids in ("abab", "cc", "ded")
    ]
    done: list[Any] = [(Shard(ray.put(batch)), batch) for batch in batches]
    learned, summaries = experience_queue._only(done, {"b", "d", "e"})
    assert [ray.get(each).to_pydict() for each in learned] == [each.to_pydict() for each in summaries]
    assert ["".join(each["prompt_id"].to_pylist()) for each in summaries] == ["bb", "ded"]
    assert learned[1] is done[2][0].learned, "a shard that is kept whole is not copied"
