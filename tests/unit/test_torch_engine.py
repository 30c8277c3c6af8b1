"""The torch engine against plain forwards of the same model: drafting, scoring, rolling back, closing, reloading."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.errors import EngineError
from actors.engines.protocol import SequenceRequest
from actors.engines.torch_engine import TorchEngine
from tests.exact_laws import STOP, VOCABULARY, laws_along, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder, seed=1, hidden_size=32, tied=True, scale=0.3)


def make_engine(folder: Path, support_size: int | None = None, seed: int = 7) -> TorchEngine:
    return TorchEngine(model=str(folder), seed=seed, stop_token_id=STOP, support_size=support_size)


def request(index: int, prompt: tuple[int, ...], max_new_tokens: int = 12) -> SequenceRequest:
    return SequenceRequest(prompt_id=f"p{index}", sample_index=0, prompt_ids=prompt, max_new_tokens=max_new_tokens)


@settings(max_examples=15)
@given(st.data())
def test_any_course_of_drafts_commits_and_closes_tells_the_models_log_probs(
    folder: Path, model: Qwen3ForCausalLM, data: st.DataObject
) -> None:
    """Ragged prompts, partial acceptance, replacements, subsets, late arrivals: always the law of the kept tokens."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    support_size = data.draw(st.sampled_from([3, None]))
    drafter, scorer = make_engine(folder, support_size), make_engine(folder)
    texts: dict[tuple[int, int], list[int]] = {}

    def admit(first: int, num: int) -> None:
        requests = [
            request(first + i, tuple(rng.integers(3, VOCABULARY, rng.integers(1, 9)).tolist())) for i in range(num)
        ]
        for pair, admitted in zip(zip(drafter.open(requests), scorer.open(requests), strict=True), requests,
                                  strict=True):  # fmt: skip
            texts[pair] = list(admitted.prompt_ids)

    admit(0, 4)
    for round_index in range(4):
        chosen = [pair for pair in texts if rng.random() < 0.8] or list(texts)
        ours, theirs = [a for a, _ in chosen], [b for _, b in chosen]
        length = int(rng.integers(1, 5))
        draft = drafter.draft(ours, length)
        scores = scorer.score(theirs, draft.token_ids, draft.support_ids)
        for row, pair in enumerate(chosen):
            laws = laws_along(model, texts[pair], draft.token_ids[row])
            tokens = torch.from_numpy(draft.token_ids[row]).long()[:, None]
            support = torch.from_numpy(draft.support_ids[row]).long()
            tail = torch.logsumexp(laws.scatter(1, support, -torch.inf), 1)
            for told in (draft, scores):
                np.testing.assert_allclose(told.token_logprobs[row], laws.gather(1, tokens)[:, 0], atol=2e-5)
                np.testing.assert_allclose(told.support_logprobs[row], laws.gather(1, support), atol=2e-5)
                np.testing.assert_allclose(told.tail_logprobs[row], tail, atol=2e-5)
            assert (np.diff(draft.support_logprobs[row], axis=-1) <= 0).all()
            if support_size is not None:
                spare = torch.from_numpy(draft.spare_ids[row]).long()[:, None]
                assert not (support == spare).any()
                np.testing.assert_allclose(draft.spare_logprobs[row], laws.gather(1, spare)[:, 0], atol=2e-5)
        accepted = rng.integers(0, length + 1, len(chosen)).astype(np.int32)
        replaced = np.where(accepted < length, rng.integers(3, VOCABULARY, len(chosen)), -1).astype(np.int32)
        drafter.commit(ours, accepted, replaced)
        scorer.commit(theirs, accepted, replaced)
        for row, pair in enumerate(chosen):
            texts[pair] += draft.token_ids[row, : accepted[row]].tolist()
            texts[pair] += [int(replaced[row])] if replaced[row] >= 0 else []
        gone = [pair for pair in texts if rng.random() < 0.2]
        drafter.close([a for a, _ in gone])
        scorer.close([b for _, b in gone])
        for pair in gone:
            del texts[pair]
        if not texts or rng.random() < 0.5:
            admit(10 * (round_index + 1), 2)


@given(st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=10)
def test_a_completion_depends_neither_on_its_batch_nor_on_the_draft_length(
    folder: Path, model: Qwen3ForCausalLM, num_requests: int, length: int
) -> None:
    requests = [request(i, (1, 4 + i % 3, *([5] * i)), 6) for i in range(num_requests)]
    engine = make_engine(folder)
    together = engine.generate(requests)
    for asked, generation in zip(requests, together, strict=True):
        alone = engine.generate([asked])[0]
        assert alone.token_ids.tolist() == generation.token_ids.tolist()
        (handle,) = engine.open([asked])
        drafted = engine.draft([handle], length).token_ids[0].tolist()
        engine.close([handle])
        shorter = min(length, len(drafted), generation.token_ids.size)
        assert drafted[:shorter] == generation.token_ids.tolist()[:shorter]


def test_generation_ends_at_the_stop_token_or_the_longest_length(folder: Path, model: Qwen3ForCausalLM) -> None:
    generations = make_engine(folder, 0).generate([request(i, (1, 5), 5) for i in range(60)])
    reasons = {generation.finish_reason for generation in generations}
    assert reasons == {"stop", "length"}
    for generation in generations:
        ids = generation.token_ids.tolist()
        assert STOP not in ids[:-1]
        assert (ids[-1] == STOP) == (generation.finish_reason == "stop")
        assert len(ids) == 5 or ids[-1] == STOP
        assert generation.support_ids.shape == (len(ids), 0)


def test_finished_completions_are_scored_as_plain_forwards_do(folder: Path, model: Qwen3ForCausalLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, VOCABULARY, n).tolist()) for n in (1, 4, 9)]
    completions = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (1, 7, 3)]
    support = [
        np.stack([rng.permutation(VOCABULARY)[:3] for _ in completion]).astype(np.int32) for completion in completions
    ]
    scored = make_engine(folder).score_completions(prompts, completions, support)
    for prompt, completion, ids, scores in zip(prompts, completions, support, scored, strict=True):
        laws, where = laws_along(model, prompt, completion), torch.from_numpy(ids).long()
        tokens = torch.from_numpy(completion).long()[:, None]
        np.testing.assert_allclose(scores.token_logprobs[0], laws.gather(1, tokens)[:, 0], atol=2e-5)
        np.testing.assert_allclose(scores.support_logprobs[0], laws.gather(1, where), atol=2e-5)
        tail = torch.logsumexp(laws.scatter(1, where, -torch.inf), 1)
        np.testing.assert_allclose(scores.tail_logprobs[0], tail, atol=2e-5)


def test_new_weights_change_the_law_and_are_stamped(folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path, seed=2, hidden_size=32, tied=True, scale=0.3)
    engine, ids = make_engine(folder), np.array([4, 6, 5], np.int32)
    support = np.tile(np.arange(VOCABULARY, dtype=np.int32), (3, 1))
    before = engine.score_completions([(1, 5)], [ids], [support])[0].support_logprobs[0]
    engine.load_weights(((name, p.float()) for name, p in other.named_parameters()), 3)
    after = engine.score_completions([(1, 5)], [ids], [support])[0].support_logprobs[0]
    np.testing.assert_allclose(after, laws_along(other, (1, 5), ids), atol=2e-5)
    assert np.abs(after - before).max() > 0.1
    assert set(engine.generate([request(0, (1, 5))])[0].policy_versions.tolist()) == {3}
    with pytest.raises(EngineError, match="must be a parameter of the student's model, got 'nonsense'"):
        engine.load_weights([("nonsense", torch.zeros(1))], 4)


def test_a_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="needs full attention in every layer"):
        make_engine(tmp_path)
