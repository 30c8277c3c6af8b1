"""The torch engine against plain forwards of the same model: drafting, scoring, rolling back, closing, reloading."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.errors import EngineError
from actors.engines.protocol import Draft, Ints, Scores, SequenceRequest
from actors.engines.torch_engine import TorchEngine
from actors.head import PLAIN, Decoding, Head
from tests.exact_laws import STOP, VOCABULARY, laws_along, make_model

ONE_STOP = Head(stop_token_ids=(STOP,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder, seed=1, hidden_size=32, tied=True, scale=0.3)


def make_engine(
    folder: Path, support_size: int | None = None, seed: int = 7, head: Head = ONE_STOP, **more: int
) -> TorchEngine:
    return TorchEngine(model=str(folder), seed=seed, head=head, support_size=support_size, **more)


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


def assert_laws(
    model: Qwen3ForCausalLM, told: Draft | Scores, row: int, text: Sequence[int], token_ids: Ints, support_ids: Ints
) -> None:
    """Compare one row of what an engine told with a fresh forward of the whole text."""
    laws = laws_along(model, text, token_ids)
    support = torch.from_numpy(support_ids).long()
    tail = torch.logsumexp(laws.scatter(1, support, -torch.inf), 1)
    chosen = laws.gather(1, torch.from_numpy(token_ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(told.token_logprobs[row], chosen, atol=2e-5)
    np.testing.assert_allclose(told.support_logprobs[row], laws.gather(1, support), atol=2e-5)
    np.testing.assert_allclose(told.tail_logprobs[row], tail, atol=2e-5)


def nothing(num: int) -> Ints:
    return np.full(num, -1, np.int32)


def test_rows_that_move_into_holes_and_any_order_of_a_call_keep_their_texts(
    folder: Path, model: Qwen3ForCausalLM
) -> None:
    engine = make_engine(folder, 3)
    requests = [request(i, (1, *([4 + i % 4] * (1 + 5 * i % 7)))) for i in range(7)]
    handles = engine.open(requests)
    kept = np.array([3, 1, 2, 0, 3, 1, 2], np.int32)
    first = engine.draft(handles, 3).token_ids
    engine.commit(handles, kept, nothing(7))
    second = engine.draft(handles, 2).token_ids
    engine.commit(handles, np.full(7, 2, np.int32), nothing(7))
    texts = {
        handle: [*requests[row].prompt_ids, *first[row, : kept[row]], *second[row]]
        for row, handle in enumerate(handles)
    }
    for gone in ([handles[0]], [handles[6], handles[3]], [handles[1]]):
        engine.close(gone)
        left = [handle for handle in handles if handle in texts and handle not in gone]
        for handle in gone:
            del texts[handle]
        for order in (left, left[::-1], left[::2], [left[-1], left[0]]):
            draft = engine.draft(order, 2)
            for row, handle in enumerate(order):
                assert_laws(model, draft, row, texts[handle], draft.token_ids[row], draft.support_ids[row])
            scores = engine.score(order, draft.token_ids, draft.support_ids)
            np.testing.assert_allclose(scores.support_logprobs, draft.support_logprobs, atol=2e-5)


def test_a_draft_that_is_pending_survives_that_its_row_is_moved(folder: Path, model: Qwen3ForCausalLM) -> None:
    engine = make_engine(folder)
    handles = engine.open([request(0, (1, 4)), request(1, (1, 5, 6))])
    draft = engine.draft(handles, 4)
    engine.close(handles[:1])
    engine.commit(handles[1:], np.array([4], np.int32), nothing(1))
    after = engine.draft(handles[1:], 2)
    assert_laws(model, after, 0, [1, 5, 6, *draft.token_ids[1]], after.token_ids[0], after.support_ids[0])


def test_lanes_do_not_disturb_one_another(folder: Path, model: Qwen3ForCausalLM) -> None:
    engine = make_engine(folder, 3)
    texts = [(1, 4, 5), (1, 7), (1, 6, 6, 6, 5)]
    one = engine.open([request(i, text) for i, text in enumerate(texts)], 0)
    other = engine.open([request(i, text) for i, text in enumerate(texts[::-1])], 1)
    mine = engine.draft(one, 3)
    engine.draft(other, 4)
    engine.close(other[:1])
    generated = engine.generate([request(5, (1, 4))])[0]
    engine.commit(one, np.full(3, 3, np.int32), nothing(3))
    engine.commit(other[1:], np.full(2, 1, np.int32), np.array([4, 5], np.int32))
    draft = engine.draft(one, 2)
    for row, text in enumerate(texts):
        assert_laws(model, draft, row, [*text, *mine.token_ids[row]], draft.token_ids[row], draft.support_ids[row])
    assert generated.token_ids.tolist() == make_engine(folder, 3).generate([request(5, (1, 4))])[0].token_ids.tolist()
    with pytest.raises(AssertionError, match="of one lane"):
        engine.draft([one[0], other[1]], 1)


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


@pytest.mark.parametrize("decoding", [PLAIN, Decoding(temperature=0.8, top_k=4)])
def test_what_is_drawn_does_not_depend_on_how_many_run_at_once(
    folder: Path, model: Qwen3ForCausalLM, decoding: Decoding
) -> None:
    requests = [request(i, (1, 4 + i % 4, *([5] * (i % 5))), (1, 70, 9, 33)[i % 4]) for i in range(13)]
    few, some, all_at_once = (
        make_engine(folder, 3, max_num_sequences=number).generate(requests, decoding) for number in (2, 3, 64)
    )
    for asked, *generations in zip(requests, few, some, all_at_once, strict=True):
        ids = generations[0].token_ids
        assert 1 <= len(ids) <= asked.max_new_tokens
        law = laws_along(model, asked.prompt_ids, ids)
        chosen = law.gather(1, torch.from_numpy(ids).long()[:, None])[:, 0]
        for generation in generations:
            assert generation.token_ids.tolist() == ids.tolist()
            assert generation.support_ids.tolist() == generations[0].support_ids.tolist()
            np.testing.assert_allclose(generation.token_logprobs, chosen, atol=2e-5)


def test_a_completion_that_is_continued_is_the_one_that_was_not_interrupted(
    folder: Path, model: Qwen3ForCausalLM
) -> None:
    engine = make_engine(folder, 3)
    whole = [g for i in range(12) if (g := (i, engine.generate([request(i, (1, 4), 20)])[0]))[1].token_ids.size > 3]
    assert len(whole) > 3
    requests = [
        replace(request(i, (1, 4), 20), completion_ids=tuple(generation.token_ids[: 1 + i % 3].tolist()))
        for i, generation in whole
    ]
    for asked, (_, generation), rest in zip(requests, whole, engine.generate(requests), strict=True):
        there = len(asked.completion_ids)
        assert rest.token_ids.tolist() == generation.token_ids[there:].tolist()
        assert rest.finish_reason == generation.finish_reason
        np.testing.assert_allclose(rest.token_logprobs, generation.token_logprobs[there:], atol=2e-5)
    draft = engine.draft(engine.open(requests), 1)
    for row, (asked, (_, generation)) in enumerate(zip(requests, whole, strict=True)):
        assert draft.token_ids[row, 0] == generation.token_ids[len(asked.completion_ids)]


def test_without_a_stop_token_only_the_longest_length_ends(folder: Path, model: Qwen3ForCausalLM) -> None:
    generations = make_engine(folder, head=Head(stop_token_ids=())).generate([request(i, (1, 5), 9) for i in range(20)])
    assert {(g.finish_reason, len(g.token_ids)) for g in generations} == {("length", 9)}


def test_a_request_without_room_for_a_token_gets_none(folder: Path, model: Qwen3ForCausalLM) -> None:
    full = replace(request(0, (1, 4), 2), completion_ids=(5, 6))
    for requests in ([full], [request(1, (1, 4), 3), full]):
        generation = make_engine(folder, 3).generate(requests)[-1]
        assert generation.token_ids.shape == (0,)
        assert generation.support_ids.shape == (0, 3)
        assert generation.finish_reason == "length"
    assert make_engine(folder).generate([]) == []


@pytest.mark.parametrize("support_size", [3, 7, None])
def test_two_stop_tokens_are_one_event_of_which_one_is_drawn(
    folder: Path, model: Qwen3ForCausalLM, support_size: int | None
) -> None:
    duplicate = 6
    engine = make_engine(folder, support_size, head=Head(stop_token_ids=(STOP, duplicate)))
    generations = engine.generate([request(i, (1, 5), 8) for i in range(40)])
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    for generation in generations:
        ids = torch.from_numpy(generation.token_ids).long()
        assert duplicate not in ids
        laws = laws_along(model, (1, 5), generation.token_ids).exp()
        laws[:, STOP] += laws[:, duplicate]
        laws[:, duplicate] = 0
        support = torch.from_numpy(generation.support_ids).long()
        np.testing.assert_allclose(generation.token_logprobs, laws.log().gather(1, ids[:, None])[:, 0], atol=2e-5)
        np.testing.assert_allclose(generation.support_logprobs, laws.log().gather(1, support), atol=2e-5)
        assert (ids[:-1] != STOP).all()
        if support_size == 3:
            np.testing.assert_allclose(np.exp(generation.tail_logprobs), 1 - laws.gather(1, support).sum(1), atol=2e-5)
        else:  # 7 of 8 ids are all that can be drawn
            assert generation.support_ids.shape[1] == VOCABULARY
            assert (generation.tail_logprobs == -np.inf).all()
    draft = engine.draft(engine.open([request(i, (1, 5)) for i in range(40)]), 4)
    assert duplicate not in draft.spare_ids
    assert draft.has_tail == (support_size == 3)


def test_logits_beyond_the_shared_vocabulary_have_no_mass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5,
    )  # fmt: skip
    padded = Qwen3ForCausalLM(config)
    padded.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, head=Head(stop_token_ids=(STOP,), vocab_size=8))
    draft = engine.draft(engine.open([request(i, (1, 5)) for i in range(20)]), 3)
    assert draft.token_ids.max() < 8
    assert draft.support_ids.shape == (20, 3, 8)
    with torch.no_grad():
        first = padded.eval()(torch.tensor([[1, 5]])).logits[0, -1, :8].log_softmax(-1)
    np.testing.assert_allclose(draft.support_logprobs[0, 0], first[draft.support_ids[0, 0]], atol=2e-5)
    with pytest.raises(EngineError, match=r"shared vocabulary has 13 ids, but the logits of .* are 12 wide"):
        make_engine(tmp_path, head=Head(stop_token_ids=(STOP,), vocab_size=13))
    with pytest.raises(EngineError, match=r"stop tokens must be among the 12 ids .* got \[2, 12\]"):
        make_engine(tmp_path, head=Head(stop_token_ids=(STOP, 12)))


@pytest.mark.parametrize(
    "decoding", [Decoding(temperature=0.6), Decoding(top_k=2), Decoding(top_p=0.7), Decoding(temperature=2, top_k=5)]
)
def test_a_decoding_changes_what_is_drawn_and_not_the_law_that_is_told(
    folder: Path, model: Qwen3ForCausalLM, decoding: Decoding
) -> None:
    for asked, generation in zip(
        requests := [request(i, (1, 5, 4), 6) for i in range(20)],
        make_engine(folder).generate(requests, decoding),
        strict=True,
    ):
        laws = laws_along(model, asked.prompt_ids, generation.token_ids)
        drawn, ids = decoding.logprobs(laws), torch.from_numpy(generation.token_ids).long()[:, None]
        np.testing.assert_allclose(drawn.exp().sum(1), 1, atol=1e-6)
        assert (drawn.gather(1, ids) > -torch.inf).all()
        np.testing.assert_allclose(generation.behaviour_logprobs, drawn.gather(1, ids)[:, 0], atol=5e-5)
        np.testing.assert_allclose(generation.token_logprobs, laws.gather(1, ids)[:, 0], atol=2e-5)
        support = torch.from_numpy(generation.support_ids).long()
        np.testing.assert_allclose(generation.support_logprobs, laws.gather(1, support), atol=2e-5)


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
