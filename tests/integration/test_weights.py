"""Weights through a real object store."""

import warnings

import pytest
import ray
import torch

from actors.weights import PolicyWeights, pack_bucket, read_weights

pytestmark = pytest.mark.ray


def test_weights_are_read_without_a_copy_and_without_a_warning(ray_cluster: str) -> None:
    tensors = {"whole": torch.randn(256, 256), "half": torch.randn(256, 512).bfloat16()}
    policy = PolicyWeights(policy_version=3, buckets=tuple(ray.put(pack_bucket([item])) for item in tensors.items()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = dict(read_weights(policy)), dict(read_weights(policy))
    assert first.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(first[name], tensor)
        assert first[name].data_ptr() == second[name].data_ptr(), "both are views of the store"
        assert first[name].data_ptr() != tensor.data_ptr()
