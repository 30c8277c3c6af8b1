"""How many bytes a token costs between actors at a real vocabulary, with real models of 151,936 ids. Half a minute.

The models are tiny but for their vocabulary: messages depend on K, on the draft length and on how many drafts are kept.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.behaviours import TrustRegion
from actors.config import ModelPoolSection, TorchEngineSection, TrustRegionSection
from actors.engines.build import EngineSpec
from actors.experience import LEARNED_COLUMNS, Prompt, rollouts_from_arrow
from actors.head import Head
from actors.meter import meter_of
from actors.sampling import BlendedSampler, PlainSampler, SampleJob
from actors.weights import PolicyWeights
from rewards.grader_actor import with_only

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

VOCABULARY, SUPPORT_SIZE, NUM_TOKENS = 151_936, 64, 48


@pytest.fixture(scope="module")
def sampler(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlendedSampler]:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.7,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>")), eos_token="<eos>"
    )
    for name, noise in (("student", 0.0), ("teacher", 0.1)):
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    spec = EngineSpec(
        section=TorchEngineSection(), model=str(folder / "student"), seed=0, head=Head(stop_token_ids=(0,)),
        support_size=SUPPORT_SIZE, max_model_len=128, on_gpu=False,
    )  # fmt: skip
    students = ModelPoolSection(model=spec.model, num_cpus=0.2)
    teachers = ModelPoolSection(model=str(folder / "teacher"), num_cpus=0.2)
    plain = PlainSampler(students, spec, teachers, replace(spec, model=teachers.model))
    blended = BlendedSampler(plain, TrustRegionSection(num_cpus=0.2), spec)
    blended.start()
    yield blended
    blended.close()
    plain.close()


def test_a_token_costs_little_on_the_wire(sampler: BlendedSampler) -> None:
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=(5 + i, 1, 7), task="addition", reference="1") for i in range(8)
    ]
    job = SampleJob(
        prompts=prompts, group_size=1, behaviour=TrustRegion(epsilon=0.02), max_new_tokens=NUM_TOKENS,
        weights=PolicyWeights(policy_version=0, buckets=()),
    )  # fmt: skip
    shards = ray.get(sampler.sample(job))
    meter = meter_of(shards)
    rollouts = [rollout for shard in shards for rollout in rollouts_from_arrow(shard)]
    beta = np.concatenate([rollout.blend.beta for rollout in rollouts if rollout.blend is not None])
    learned = sum(with_only(shard, LEARNED_COLUMNS).nbytes for shard in shards)
    print(
        f"{meter.wire_bytes / meter.num_tokens:.0f} bytes a token between the actors, "
        f"{learned / meter.num_tokens:.0f} to the learner; {meter.num_drafted / meter.num_tokens:.2f} drafted a token"
    )
    assert (beta < 1).mean() > 0.8, "the budget binds"
    assert meter.wire_bytes / meter.num_tokens < 1500
    assert learned / meter.num_tokens < 800
