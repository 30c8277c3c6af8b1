"""Inside the vLLM worker: samplers of our own that draw by counter-based random numbers and record what they saw.

vLLM 0.32 (model runner V1) keeps its samplers as attributes; `RecordingWorker`, named by `worker_extension_cls`,
replaces them once after start. They are internals of vLLM: its version is checked, and the laws are tested.

N counts rows of one step, k drafted tokens, K the support, V the vocabulary. Log-probs are float32 nats.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.v1.outputs import SamplerOutput

from actors.engines.vllm_jobs import REQUEST_NUMBER, BlendCounts, Laws, Record, SampleJob, ScoreJob
from actors.random_numbers import Purpose, sample_from_logprobs, uniforms
from actors.trust_region import verify_target

Array = npt.NDArray[Any]

_SCORE_ELEMENTS = 1 << 26


class Tape:
    """Rows of tokens in columns, appended step by step on the host."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Array]] = []

    def write(self, numbers: Array, positions: Array, **columns: Tensor) -> None:
        """Append N rows; the columns are [N, ...]."""
        step = {name: values.cpu().numpy() for name, values in columns.items()}
        self._steps.append({"number": numbers, "position": positions, **step})

    def read(self) -> dict[str, Array]:
        """Return all rows, sorted by number and position, and forget them."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        columns = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
        order = np.lexsort((columns["position"], columns["number"]))
        return {name: values[order] for name, values in columns.items()}


@dataclass(slots=True, kw_only=True)
class Desk:
    """What the samplers of one worker share: the job at hand and the tape."""

    laws: Laws
    runner: Any
    """vLLM's model runner."""
    tape: Tape
    job: SampleJob | ScoreJob
    num_computed: int = 0
    """Tokens that went through the model since the job was set."""

    def numbers(self) -> Array:
        """Return for each row of the running batch its request's place in the job, [N]."""
        runner = self.runner
        return np.array(
            [runner.requests[name].sampling_params.extra_args[REQUEST_NUMBER] for name in runner.input_batch.req_ids],
            dtype=np.int64,
        )

    def num_given(self, numbers: Array) -> Array:
        """Return how many tokens of each request's completion were there before, [N]."""
        assert isinstance(self.job, SampleJob)
        return np.array([len(self.job.requests[number].completion_ids) for number in numbers], np.int64)

    def num_sampled(self) -> Array:
        """Return how many tokens vLLM has sampled for each row, [N]."""
        runner = self.runner
        return np.array([len(runner.requests[name].output_token_ids) for name in runner.input_batch.req_ids], np.int64)

    def is_partial(self) -> npt.NDArray[np.bool_]:
        """Return which rows are in the middle of their prompt, so that vLLM drops what is sampled there, [N]."""
        return np.asarray(self.runner.discard_request_mask.np[: self.runner.input_batch.num_reqs]).astype(bool)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return the laws of logits [N, at least V], [N, V]."""
        return self.laws.head.logprobs(logits)

    def uniforms(self, numbers: Array, positions: Array, purpose: Purpose) -> Tensor:
        """Return one uniform for each request number and position, [N] float64 on the host."""
        assert isinstance(self.job, SampleJob)
        requests = [self.job.requests[number] for number in numbers]
        drawn = uniforms(
            self.laws.seed,
            [request.prompt_id for request in requests],
            [request.sample_index for request in requests],
            positions,
            purpose,
        )
        return torch.from_numpy(drawn)

    def support(self, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the likeliest ids by falling log-prob [N, K], their log-probs [N, K] and the log tail mass [N]."""
        size = self.laws.head.num_reported(self.laws.support_size, logprobs.shape[-1])
        values, ids = logprobs.topk(size, dim=-1)
        return ids, values, _outside(logprobs, ids)


class RecordingSampler:
    """Stands in for vLLM's sampler: draws each row's token and records its law."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, logits: Tensor, sampling_metadata: object) -> SamplerOutput:
        """Return one token per row [N, 1] for logits [N, V]; when scoring, any token, for none is wanted."""
        desk = self._desk
        if isinstance(desk.job, ScoreJob):
            return _sampler_output(torch.zeros(len(logits), 1, device=logits.device))
        numbers = desk.numbers()
        positions = desk.num_sampled() + desk.num_given(numbers)
        logprobs = desk.logprobs(logits)
        drawn_from = desk.job.decoding.logprobs(logprobs)
        tokens = sample_from_logprobs(drawn_from, desk.uniforms(numbers, positions, Purpose.TOKEN))
        complete = ~desk.is_partial()
        rows = torch.from_numpy(complete).to(logits.device)
        self._record(numbers[complete], positions[complete], tokens[rows], logprobs[rows], drawn_from[rows])
        return _sampler_output(tokens[:, None])

    def _record(self, numbers: Array, positions: Array, tokens: Tensor, laws: Tensor, drawn_from: Tensor) -> None:
        """Record N tokens, the laws [N, V] of their places and the laws [N, V] that they were drawn from."""
        desk = self._desk
        assert isinstance(desk.job, SampleJob)
        support_ids, support_logprobs, tail = desk.support(laws)
        spares = self._spares(numbers, positions, laws, support_ids) if desk.job.with_spares else {}
        desk.tape.write(
            numbers,
            positions,
            token_id=tokens,
            token_logprob=_at(laws, tokens),
            behaviour_logprob=_at(drawn_from, tokens),
            support_ids=support_ids,
            support_logprobs=support_logprobs,
            tail_logprob=tail,
            **spares,
        )

    def _spares(self, numbers: Array, positions: Array, laws: Tensor, support_ids: Tensor) -> dict[str, Tensor]:
        """Draw from the laws outside the support, [N]; where there is no tail, -1."""
        if support_ids.shape[-1] in (0, laws.shape[-1]):
            nothing = torch.full_like(laws[:, 0], -torch.inf)
            return {"spare_id": torch.full_like(nothing, -1, dtype=torch.int64), "spare_logprob": nothing}
        tail = laws.scatter(-1, support_ids, -torch.inf)
        ids = sample_from_logprobs(tail, self._desk.uniforms(numbers, positions, Purpose.SPARE))
        return {"spare_id": ids, "spare_logprob": _at(laws, ids)}


class CompletionScorer:
    """Stands in for the runner's prompt log-probs: reads requested ids at the completion's positions of a prompt.

    vLLM's own makes Python objects of the likeliest ids and cannot be asked for given ones. A text is prompt plus
    completion but for the completion's last token, whose hidden state predicts nothing that is asked for. What vLLM
    reads from its prefix cache is not computed and hence not scored: the engine asks again where scores are missing.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> dict[str, Any]:
        """Record scores from this step's hidden states [tokens, H]; vLLM itself gets no prompt log-probs."""
        self._desk.num_computed += sum(num_scheduled_tokens.values())
        job = self._desk.job
        if not isinstance(job, ScoreJob):
            return {}
        runner, spans = self._desk.runner, []
        for row, name in enumerate(runner.input_batch.req_ids):
            request = runner.requests[name]
            number, start = request.sampling_params.extra_args[REQUEST_NUMBER], request.num_computed_tokens
            predicted = start - (job.prompt_lengths[number] - 1)  # position that the step's first state predicts
            first = max(0, predicted)
            last = min(len(job.completions[number]), predicted + num_scheduled_tokens[name])
            if last > first:
                offset = int(runner.query_start_loc.np[row]) - predicted
                spans.append((number, np.arange(first, last), offset))
        if spans:
            self._score(hidden_states, job, spans)
        return {}

    def _score(self, hidden_states: Tensor, job: ScoreJob, spans: list[tuple[int, Array, int]]) -> None:
        numbers = np.concatenate([np.full(len(positions), number) for number, positions, _ in spans])
        positions = np.concatenate([positions for _, positions, _ in spans])
        states = np.concatenate([positions + offset for _, positions, offset in spans])
        tokens = np.concatenate([job.completions[number][positions] for number, positions, _ in spans])
        support = np.concatenate([job.support_ids[number][positions] for number, positions, _ in spans])
        runner = self._desk.runner
        rows_at_once = max(1, _SCORE_ELEMENTS // runner.model_config.get_vocab_size())
        for first in range(0, len(states), rows_at_once):
            rows = slice(first, first + rows_at_once)
            logprobs = self._desk.logprobs(runner.model.compute_logits(hidden_states[_on(hidden_states, states[rows])]))
            ids = _on(logprobs, support[rows])
            self._desk.tape.write(
                numbers[rows],
                positions[rows],
                token_logprob=_at(logprobs, _on(logprobs, tokens[rows])),
                support_logprobs=logprobs.gather(-1, ids),
                tail_logprob=_outside(logprobs, ids),
            )


class BlendingSampler:
    """Stands in for vLLM's rejection sampler and its drafter's sampling: TRB with the drafter as the student.

    Exactness hangs on two things. Where all drafts are kept nothing is added, since the student's law is not known
    there. And since no row may be emitted without a draft, a request's prompt lacks its last token, which is forced as
    the first "generated" one: drafts start right after it.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.num_undrafted = self.num_passes = self.num_drafted = 0
        self._laws: list[Tensor] = []
        """Of the drafts that the coming step verifies, one [N, V] for each position."""
        self._rows: dict[str, int] = {}
        """Which of their N rows is whose, by vLLM's name of the request."""
        self._next_numbers: Array = np.zeros(0, np.int64)
        self._next_positions: Array = np.zeros(0, np.int64)

    def draft(self, hidden_states: Tensor, sampling_metadata: object) -> tuple[Tensor, None]:
        """Draw one more draft for each row, [N]; its law is kept here, so vLLM gets none."""
        desk = self._desk
        logprobs = desk.logprobs(desk.runner.drafter.model.compute_logits(hidden_states))
        drawn = torch.zeros(len(logprobs), dtype=torch.float64)
        known = len(self._next_numbers)  # a padded batch has rows beyond these; nothing of them is kept
        drawn[:known] = desk.uniforms(self._next_numbers, self._next_positions + len(self._laws), Purpose.TOKEN)
        self._laws.append(logprobs)
        return sample_from_logprobs(logprobs, drawn), None

    def __call__(self, metadata: Any, draft_probs: None, logits: Tensor, sampling_metadata: object) -> SamplerOutput:
        """Return the emitted tokens [N, k + 1], -1 where there is none.

        Args:
            metadata: vLLM's `SpecDecodeMetadata`: how many drafts each row has, and where they are.
            draft_probs: unused.
            logits: the teacher's, at rows that the metadata names.
            sampling_metadata: unused.
        """
        desk, names = self._desk, self._desk.runner.input_batch.req_ids
        numbers, num_sampled = desk.numbers(), desk.num_sampled()
        positions = num_sampled - 1 + desk.num_given(numbers)  # the forced token is not a new one
        drafted_as = np.array([self._rows.get(name, -1) if self._laws else -1 for name in names])
        # Where one token of a prompt is left to compute, vLLM pads the row with drafts that nobody drew.
        drafted = (np.array(metadata.num_draft_tokens) > 0) & (drafted_as >= 0)
        emitted = np.full((len(names), metadata.max_spec_len + 1), -1, np.int32)
        for row in np.flatnonzero(~drafted & ~desk.is_partial()):
            emitted[row, 0] = self._without_draft(numbers[row], num_sampled[row])
        if drafted.any():
            drafts = self._drafts(metadata, logits, np.flatnonzero(drafted), drafted_as[drafted])
            emitted[drafted, : drafts.ids.shape[1]] = self._verify(drafts, numbers[drafted], positions[drafted])
        self._laws, self._rows = [], {name: row for row, name in enumerate(names)}
        self._next_numbers, self._next_positions = numbers, positions + (emitted >= 0).sum(1)
        return _sampler_output(torch.from_numpy(emitted).to(logits.device))

    def _drafts(self, metadata: Any, logits: Tensor, rows: Array, drafted_as: Array) -> "_Drafts":
        """Gather the drafts of B rows of the batch; a row with fewer than the longest repeats its last."""
        counts = np.array(metadata.num_draft_tokens)
        first, num_drafted = (np.cumsum(counts) - counts)[rows], counts[rows]
        column = np.minimum(np.arange(num_drafted.max()), num_drafted[:, None] - 1)
        index = _on(logits, first[:, None] + column)
        laws = torch.stack(self._laws, dim=1)
        return _Drafts(
            num_drafted=_on(logits, num_drafted),
            ids=metadata.draft_token_ids[index].long(),
            student_logprobs=laws[_on(logits, drafted_as)[:, None], _on(logits, column)],
            teacher_logprobs=self._desk.logprobs(logits[metadata.target_logits_indices[index]]),
        )

    def _without_draft(self, number: int, num_sampled: int) -> int:
        job = self._desk.job
        assert isinstance(job, SampleJob)
        if num_sampled == 0:
            return job.requests[number].token_ids[-1]
        self.num_undrafted += 1
        # Any token will do, for the engine refuses the whole job; the stop token ends the request at once.
        return max(self._desk.laws.head.stop_token_id, 0)

    def _verify(self, drafts: "_Drafts", numbers: Array, positions: Array) -> Array:
        """Verify B rows that have drafts, record what they emit, and return it, [B, k] with -1 for none."""
        desk, (batch, k) = self._desk, drafts.ids.shape
        assert isinstance(desk.job, SampleJob)
        assert desk.job.behaviour is not None
        self.num_passes += batch
        self.num_drafted += int(drafts.num_drafted.sum())
        every_position = positions[:, None] + np.arange(k)
        flat = (np.repeat(numbers, k), every_position.reshape(-1))
        drawn = torch.stack([desk.uniforms(*flat, Purpose.ACCEPT), desk.uniforms(*flat, Purpose.REPLACE)], dim=-1)
        verdict = verify_target(
            drafts.ids,
            drafts.student_logprobs,
            desk.job.behaviour.target(drafts.student_logprobs, drafts.teacher_logprobs),
            num_drafted=drafts.num_drafted,
            uniforms=drawn.reshape(batch, k, 2).to(drafts.ids.device),
        )
        column = torch.arange(k, device=drafts.ids.device)
        kept = column < verdict.num_accepted[:, None]
        replaced = (column == verdict.num_accepted[:, None]) & (verdict.replacement_ids >= 0)[:, None]
        tokens = torch.where(kept, drafts.ids, verdict.replacement_ids[:, None])
        emitted = kept | replaced
        student, teacher, ids = drafts.student_logprobs[emitted], drafts.teacher_logprobs[emitted], tokens[emitted]
        support_ids, support_student_logprobs, student_tail = desk.support(student)
        where = emitted.cpu().numpy()
        desk.tape.write(
            np.broadcast_to(numbers[:, None], where.shape)[where],
            every_position[where],
            token_id=ids,
            behaviour_logprob=verdict.behaviour_logprobs[emitted],
            student_logprob=_at(student, ids),
            teacher_logprob=_at(teacher, ids),
            beta=verdict.beta[emitted],
            divergence=verdict.divergence[emitted],
            teacher_divergence=verdict.teacher_divergence[emitted],
            accepted=kept[emitted],
            support_ids=support_ids,
            support_student_logprobs=support_student_logprobs,
            support_teacher_logprobs=teacher.gather(-1, support_ids),
            student_tail_logprob=student_tail,
            teacher_tail_logprob=_outside(teacher, support_ids),
        )
        return np.where(where, tokens.cpu().numpy(), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drafts:
    """k drafts of each of B rows."""

    num_drafted: Tensor
    """[B], at most k: how many are real."""
    ids: Tensor
    """[B, k]."""
    student_logprobs: Tensor
    """[B, k, V], the laws they were drawn from."""
    teacher_logprobs: Tensor
    """[B, k, V]."""


class RecordingWorker:
    """Mixed into vLLM's worker; the engine calls these methods by name."""

    model_runner: Any
    vllm_config: Any

    def tutelage_install(self, laws: Laws) -> None:
        """Replace vLLM's samplers by ours."""
        runner = self.model_runner
        desk = Desk(laws=laws, runner=runner, tape=Tape(), job=SampleJob(requests=()))
        self._tutelage_desk, self._tutelage_blending = desk, BlendingSampler(desk)
        runner.sampler = RecordingSampler(desk)
        runner._get_prompt_logprobs_dict = CompletionScorer(desk)
        if runner.speculative_config is not None:
            runner.rejection_sampler = self._tutelage_blending
            runner.drafter._sample_draft_tokens = self._tutelage_blending.draft

    def tutelage_set_job(self, job: SampleJob | ScoreJob) -> None:
        """Say what the coming requests are, and forget what was recorded before."""
        desk, blending = self._tutelage_desk, self._tutelage_blending
        desk.job, desk.num_computed = job, 0
        desk.tape.read()
        blending.num_undrafted = blending.num_passes = blending.num_drafted = 0

    def tutelage_read_record(self) -> Record:
        """Return what was recorded, and forget it."""
        desk, blending = self._tutelage_desk, self._tutelage_blending
        return Record(
            columns=desk.tape.read(),
            num_computed=desk.num_computed,
            num_undrafted=blending.num_undrafted,
            counts=BlendCounts(num_passes=blending.num_passes, num_drafted=blending.num_drafted),
        )

    def tutelage_load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights in place: the drafter's where there is one.

        The model's own `load_weights` fails on CPU, where weights are packed after loading.
        """
        runner = self.model_runner
        student = runner.get_model() if runner.speculative_config is None else runner.drafter.model
        with set_current_vllm_config(self.vllm_config):
            reload_weights(
                self.vllm_config, student, weights_iterator=weights, weights_path=None, is_checkpoint_format=True
            )
            # A head tied to the embedding is loaded with it, but not packed anew; where nothing is packed, no harm.
            student.lm_head.quant_method.process_weights_after_loading(student.lm_head)


def _sampler_output(token_ids: Tensor) -> SamplerOutput:
    return SamplerOutput(sampled_token_ids=token_ids.to(torch.int32), logprobs_tensors=None)


def _on(like: Tensor, values: Array) -> Tensor:
    """Indices or ids as an int64 tensor beside `like`."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(like.device)


def _at(logprobs: Tensor, ids: Tensor) -> Tensor:
    """[N, V] at [N] ids."""
    return logprobs.gather(-1, ids[:, None])[:, 0]


def _outside(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log mass outside [N, K] ids, by logsumexp over the complement; [N]."""
    if ids.shape[-1] == 0:
        return torch.zeros_like(logprobs[:, 0])
    return torch.logsumexp(logprobs.scatter(-1, ids, -torch.inf), dim=-1)
