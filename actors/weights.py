"""Weights on their way from the learner to the engines: numpy arrays in the object store, read without a copy.

Ray keeps numpy arrays as they are in shared memory but copies torch tensors, so tensors travel as arrays. numpy has no
bfloat16; such a tensor travels as uint16 of the same bits.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightArray:
    """One parameter."""

    name: str
    """Hugging Face parameter name; of tied parameters only the first."""
    dtype: str
    """'float32' or 'bfloat16': the tensor's, where the array's may be uint16."""
    array: npt.NDArray[Any]
    """The tensor's shape; uint16 for bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyWeights:
    """All weights of one version of the policy."""

    policy_version: int
    """Optimizer steps applied to these weights."""
    buckets: tuple[ray.ObjectRef[list[WeightArray]], ...]
    """Each a list of `WeightArray`; readable as long as the learner rank that put them lives."""


def pack_bucket(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[WeightArray]:
    """Return the tensors as arrays; on CPU they share memory, so put them away before the tensors change.

    Raises:
        ValueError: for a tensor that is neither float32 nor bfloat16.
    """
    bucket = []
    for name, tensor in named_tensors:
        values = tensor.detach().cpu().contiguous()
        if values.dtype not in _DTYPES.values():
            raise ValueError(f"weights must be float32 or bfloat16, got {values.dtype} for {name}")
        bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
        bucket.append(WeightArray(name=name, dtype=str(values.dtype).removeprefix("torch."), array=bits.numpy()))
    return bucket


def read_weights(policy: PolicyWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter as a view of the object store, one bucket fetched at a time.

    The memory is shared with all readers and mapped read-only: copy from the tensors, never write to them.
    """
    for reference in policy.buckets:
        for weight in ray.get(reference):
            yield weight.name, _view(weight)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _view(weight: WeightArray) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; readers only copy from these.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        tensor = torch.from_numpy(np.asarray(weight.array))
    return tensor.view(_DTYPES[weight.dtype])
