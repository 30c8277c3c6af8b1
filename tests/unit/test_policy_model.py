"""The student in tiles against its own dense logits, in float64; output heads of folders; adapters."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.experience import Completion, Prompt, Rollout, TeacherScores
from actors.head import Head
from learner import attention
from learner.config import LoraSection
from learner.distillation import FullDistillation
from learner.divergences import ReverseKL
from learner.lora import adapters_off, add_adapters, published_weights
from learner.losses import Loss, WeightedSum
from learner.micro_batches import MicroBatch, TrainRow, build_micro_batch
from learner.policy_losses import ClippedSurrogate, Gspo, ReferenceKL
from learner.policy_model import PolicyModel, load_output_head

VOCAB_SIZE = 13
HEAD = Head(stop_token_ids=(2, 11), vocab_size=12)
TILE_BYTES = 3 * 8 * VOCAB_SIZE * 2
"""Two or three tokens a tile."""
CPU = torch.device("cpu")


def make_model(*, tied: bool = True, seed: int = 0) -> Any:
    attention.register()
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME).double()


def make_rows(lengths: Sequence[tuple[int, int]], *, untrained: Sequence[int] = ()) -> list[TrainRow]:
    """Rollouts of (prompt, completion) tokens with random laws of sampler and teacher."""
    random = np.random.default_rng(3)
    rows = []
    for i, (num_prompt, num_tokens) in enumerate(lengths):
        laws = np.log(random.dirichlet(np.ones(11), size=(2, num_tokens))).astype(np.float32)
        laws = np.concatenate([laws, np.full((2, num_tokens, 1), -np.inf, np.float32)], -1)
        token_ids = random.integers(11, size=num_tokens).astype(np.int32)
        chosen = laws[0][np.arange(num_tokens), token_ids]
        scores = TeacherScores(
            support_ids=np.tile(np.arange(12, dtype=np.int32), (num_tokens, 1)),
            student_logprobs=laws[0],
            student_tail_logprobs=np.full(num_tokens, -np.inf, np.float32),
            teacher_logprobs=laws[1],
            teacher_tail_logprobs=np.full(num_tokens, -np.inf, np.float32),
        )
        prompt_ids = tuple(random.integers(11, size=num_prompt).tolist())
        rollout = Rollout(
            prompt=Prompt(prompt_id=f"p{i}", text="", token_ids=prompt_ids, task="none", reference=""),
            sample_index=0,
            completion=Completion(
                token_ids=token_ids,
                behaviour_logprobs=chosen,
                student_logprobs=chosen,
                finish_reason="stop",
                policy_versions=np.zeros(num_tokens, np.int32),
            ),
            teacher=scores,
        )
        rows.append(
            TrainRow(
                rollout=rollout,
                advantage=float(random.normal()),
                trains=i not in untrained,
                token_weight=float(random.uniform(0.1, 1)),
            )
        )
    return rows


def dense_laws(model: Any, rows: Sequence[TrainRow]) -> list[Tensor]:
    """The laws [T, V] of each completion from the model's own logits, one rollout at a time."""
    laws = []
    for row in rows:
        ids = torch.tensor([[*row.rollout.prompt.token_ids, *row.rollout.completion.token_ids.tolist()]])
        segments = ((ids.shape[1],),)
        logits = model(ids, segments=segments, use_cache=False).logits[0, len(row.rollout.prompt.token_ids) - 1 : -1]
        laws.append(HEAD.scores(logits).log_softmax(-1))
    return laws


def plain_total(model: Any, reference: Any, rows: Sequence[TrainRow], kind: str) -> Tensor:
    """The weighted sum of losses by the plain formulas."""
    total = torch.zeros((), dtype=torch.float64)
    for row, law, reference_law in zip(rows, dense_laws(model, rows), dense_laws(reference, rows), strict=True):
        completion, scores = row.rollout.completion, row.rollout.teacher
        assert scores is not None
        places = range(completion.num_tokens), completion.token_ids.tolist()
        log_ratios = law[places] - torch.tensor(completion.behaviour_logprobs)
        gaps = reference_law[places].detach() - law[places]
        if kind == "distil":
            teacher = torch.tensor(scores.teacher_logprobs).double().clamp(min=-30)
            allowed = law != -torch.inf
            per_token = (law.exp() * torch.where(allowed, law - teacher, 0)).nan_to_num(0).sum(-1)
        elif kind == "gspo":
            ratio = log_ratios.mean().exp().expand(completion.num_tokens)
            per_token = -torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage)
        else:
            ratios = log_ratios.exp()
            surrogate = -torch.minimum(ratios * row.advantage, ratios.clamp(0.8, 1.2) * row.advantage)
            per_token = surrogate + 0.3 * (gaps.exp() - gaps - 1)
        total = total + np.float32(row.token_weight).item() * per_token.sum()
    return total


CLIPPED = ClippedSurrogate(clip_low=0.2, clip_high=0.2)
LOSSES: dict[str, Loss] = {
    "distil": FullDistillation(divergence=ReverseKL()),
    "gspo": Gspo(clip_low=0.2, clip_high=0.2),
    "reference": WeightedSum(parts=((1.0, CLIPPED), (0.3, ReferenceKL()))),
}
LENGTHS = [(3, 4), (1, 5), (2, 1), (1, 4)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_of_dense_logits(packing: bool, tied: bool, kind: str) -> None:
    model, plain = make_model(tied=tied), make_model(tied=tied)
    initial = make_model(tied=tied, seed=1)
    policy = PolicyModel(model, HEAD)
    if kind == "reference":
        policy.refer_to(PolicyModel(initial, HEAD))
    rows = make_rows(LENGTHS)
    micro_batch = build_micro_batch(rows, packing=packing, support_size=None)
    total, per_token, _ = policy(micro_batch, LOSSES[kind], TILE_BYTES)
    expected = plain_total(plain, initial, rows, kind)
    assert len(per_token) == sum(length for _, length in LENGTHS)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    expected.backward()
    for (name, parameter), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.grad, twin.grad) < 1e-5, name


def test_rows_that_do_not_train_change_nothing_and_none_that_trains_is_a_loss_of_zero() -> None:
    model = make_model()
    policy = PolicyModel(model, HEAD)
    rows = make_rows(LENGTHS, untrained=[1, 3])
    totals = [
        policy(build_micro_batch(kept, packing=packing, support_size=None), CLIPPED, TILE_BYTES)[0]
        for kept in (rows, [rows[0], rows[2]])
        for packing in (True, False)
    ]
    assert all(total.item() == pytest.approx(totals[0].item(), rel=1e-9) for total in totals)
    nothing: MicroBatch = build_micro_batch(make_rows([(1, 0), (2, 3)], untrained=[1]), packing=True, support_size=None)
    total, per_token, _ = policy(nothing, FullDistillation(divergence=ReverseKL()), TILE_BYTES)
    assert len(per_token) == 0
    total.backward()
    assert total.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_log_probs_of_the_reference_stay_those_of_the_frozen_weights() -> None:
    model = make_model()
    frozen = PolicyModel(copy.deepcopy(model), HEAD)
    policy = PolicyModel(model, HEAD)
    policy.refer_to(frozen)
    micro_batch = build_micro_batch(make_rows(LENGTHS), packing=True, support_size=0)
    loss = ReferenceKL()
    assert policy(micro_batch, loss, TILE_BYTES)[0].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    gaps = frozen.logprobs(micro_batch, TILE_BYTES) - policy.logprobs(micro_batch, TILE_BYTES)
    _, per_token, _ = policy(micro_batch, loss, TILE_BYTES)
    torch.testing.assert_close(per_token, gaps.exp() - gaps - 1)
    assert float(per_token.max()) > 1e-3
    assert {name.split(".")[0] for name, _ in policy.named_parameters()} == {"model"}


def test_models_whose_logits_are_more_than_the_head_are_refused() -> None:
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    attention.register()
    granite = GraniteForCausalLM._from_config(config, attn_implementation=attention.NAME)
    with pytest.raises(ValueError, match=r"the last hidden state, but .* has logits_scaling = 8\.0 in its config"):
        PolicyModel(granite, HEAD)
    capped = make_model()
    capped.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.tanh())
    with pytest.raises(ValueError, match="those of Qwen3ForCausalLM differ by up to"):
        PolicyModel(capped, HEAD)
    with pytest.raises(ValueError, match=r"has 14 ids, but the logits of .* are 13 wide"):
        PolicyModel(make_model(), Head(stop_token_ids=(2,), vocab_size=14))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "2KB"], ids=["one file", "shards"])
def test_an_output_head_read_from_a_folder_is_the_models(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    model = make_model(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "10GB")
    output = load_output_head(str(tmp_path), HEAD, device=CPU, dtype=torch.float64)
    hidden = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(output.scores(hidden), HEAD.scores(model.lm_head(hidden)))


def test_a_folder_without_a_plain_output_head_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    wide = Head(stop_token_ids=(2,), vocab_size=14)
    with pytest.raises(ValueError, match=r"has 14 ids, but the logits of .* are 13 wide"):
        load_output_head(str(tmp_path), wide, device=CPU, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold lm_head.weight or embed_tokens.weight, got"):
        load_output_head(str(tmp_path), HEAD, device=CPU, dtype=torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must be in model.safetensors or its shards, got none in"):
        load_output_head(str(tmp_path), HEAD, device=CPU, dtype=torch.float32)
    model.config.final_logit_softcapping = 30.0
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"final_logit_softcapping = 30\.0 in its config.json"):
        load_output_head(str(tmp_path), HEAD, device=CPU, dtype=torch.float32)


def adapted(section: LoraSection) -> Any:
    """A model whose adapters have moved from where they begin."""
    model = make_model()
    add_adapters(model, section)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_merged_weights_compute_what_the_adapters_do_and_without_them_the_model_is_as_before() -> None:
    pytest.importorskip("peft")
    micro_batch = build_micro_batch(make_rows(LENGTHS), packing=True, support_size=0)

    def logprobs(model: Any) -> Tensor:
        return PolicyModel(model, HEAD).logprobs(micro_batch, TILE_BYTES)

    original, model = make_model(), adapted(LoraSection(rank=2, alpha=3.0))
    weights = {weight.name: weight.tensor() for weight in published_weights(model)}
    assert weights.keys() == dict(original.named_parameters()).keys()
    merged = make_model(seed=1)
    merged.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logprobs(merged), logprobs(model), rtol=1e-5, atol=1e-6)
    assert float((logprobs(model) - logprobs(original)).abs().max()) > 1e-2
    with adapters_off(model):
        assert torch.equal(logprobs(model), logprobs(original))


def test_only_adapters_train_and_they_begin_as_no_change_the_same_each_time() -> None:
    pytest.importorskip("peft")
    one, other = make_model(), make_model()
    for model in (one, other):
        add_adapters(model, LoraSection(rank=2, modules=("q_proj", "down_proj")))
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all(".lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trained)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    for weight, (name, parameter) in zip(published_weights(one), make_model().named_parameters(), strict=True):
        assert weight.name == name
        assert torch.equal(weight.tensor(), parameter)


def test_a_missing_peft_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="needs the library peft: install the extra `lora`"):
        add_adapters(make_model(), LoraSection())


@pytest.mark.parametrize(
    ("module", "message"),
    [("lm_head", "other than the output head, got lm_head"), ("embed_tokens", "linear layers"), ("nowhere", "nowhere")],
)
def test_modules_that_cannot_be_adapted_are_refused(module: str, message: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        add_adapters(make_model(tied=False), LoraSection(modules=(module,)))
