"""The actor that holds student and teacher together while they are blended: no messages between them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from actors.behaviours import BlendedBehaviour
from actors.blending import blended_rollouts, draft_length_of
from actors.config import BlenderSection
from actors.draft_length import DraftLength, Observation
from actors.engines.build import EngineSpec, build_engine
from actors.engines.protocol import Draft, SequenceEngine, SequenceRequest
from actors.experience import requests_from_arrow
from actors.meter import Meter, metered
from actors.speculation import Pending, Sampled, Speculation, Timed
from actors.student import likeliest, sequence_requests
from actors.teacher import with_signal
from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec
from actors.tokenizer import load_tokenizer
from actors.verification import BlendedTokens
from actors.weights import PolicyWeights, read_weights

_LONGEST_VLLM_DRAFT = 16
"""Where the length adapts: vLLM reserves room for this many when it starts."""


class OneEngineActor:
    """Blends two models of one process: two torch engines, or vLLM with the student as the teacher's draft model."""

    def __init__(self, name: str, spec: EngineSpec, teacher: str, section: BlenderSection) -> None:
        self._name, self._spec, self._teacher, self._section = name, spec, teacher, section

    def __repr__(self) -> str:
        return self._name

    @cached_property
    def _pair(self) -> "TorchPair | VllmPair":
        # Built by the first call and not by the constructor, so that what it raises reaches the caller as it is.
        kind = VllmPair if self._spec.section.type == "vllm" else TorchPair
        return kind(self._spec, self._teacher, self._section)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._spec.model)

    def ready(self) -> str:
        """Load both models; return the actor's name."""
        assert self._pair.policy_version >= 0
        return self._name

    def sample(
        self,
        requests: pa.RecordBatch,
        weights: PolicyWeights,
        behaviour: BlendedBehaviour,
        max_new_tokens: int,
        signal: SignalSpec = STUDENTS_SUPPORT,
    ) -> pa.RecordBatch:
        """Sample every request to its end from mu, and return complete rollouts with the teacher's scores.

        Args:
            requests: made by `requests_to_arrow`.
            weights: of the student.
            behaviour: gives mu.
            max_new_tokens: longest completion.
            signal: what the learner is told of the teacher.

        Raises:
            EngineError: if the engine cannot tell what the signal wants.
        """
        pair = self._pair
        if weights.policy_version != pair.policy_version:
            pair.load_weights(weights)
        asked = requests_from_arrow(requests)
        sampled, meter = pair.sample(sequence_requests(asked, max_new_tokens), behaviour)
        rollouts = metered(blended_rollouts(asked, sampled, behaviour, pair.policy_version, self._tokenizer), meter)
        if signal.is_in_every_rollout:
            return rollouts
        return with_signal(rollouts, pair.teacher, signal, self._spec.support_size)

    def likeliest(self, requests: pa.RecordBatch, weights: PolicyWeights) -> tuple[list[list[int]], ...] | None:
        """Return the support's ids at the position after each prompt, of student and teacher; None where hidden."""
        if weights.policy_version != self._pair.policy_version:
            self._pair.load_weights(weights)
        return self._pair.likeliest(requests)


@dataclass(frozen=True, slots=True)
class Done:
    """A call that has been answered."""

    timed: Timed

    def result(self) -> Timed:
        """Return the answer."""
        return self.timed


class LocalSide:
    """An engine of this process as one side of a rollout."""

    def __init__(self, engine: SequenceEngine) -> None:
        self._engine, self._opened = engine, list[int]()
        self.commit, self.close = engine.commit, engine.close

    def open(self, requests: Sequence[SequenceRequest], lane: int) -> list[int]:
        """Admit sequences and return their handles."""
        handles = self._engine.open(requests, lane)
        self._opened += handles
        return handles

    def finish(self) -> None:
        """Close what is still open, after an error."""
        self._engine.close(self._opened)
        self._opened = []

    def recover(self) -> None:
        """An engine of this process is lost only together with it."""

    def draft(self, sequences: Sequence[int], num_tokens: int) -> Done:
        """Draft now."""
        began = time.perf_counter()
        draft = self._engine.draft(sequences, num_tokens)
        return Done(Timed(draft, time.perf_counter() - began))

    def score(self, sequences: Sequence[int], draft: Pending) -> Done:
        """Score now."""
        began, drafted = time.perf_counter(), draft.result().value
        assert isinstance(drafted, Draft)
        scores = self._engine.score(sequences, drafted.token_ids, drafted.ids.requested)
        return Done(Timed(scores, time.perf_counter() - began))


class TorchPair:
    """Two torch engines."""

    def __init__(self, spec: EngineSpec, teacher: str, section: BlenderSection) -> None:
        self._spec, self._section = spec, section
        self._student: Any = build_engine(spec)
        self.teacher: Any = build_engine(replace(spec, model=teacher))
        """The teacher's engine."""

    @property
    def policy_version(self) -> int:
        """Of the student's weights in use."""
        return int(self._student.policy_version)

    def load_weights(self, weights: PolicyWeights) -> None:
        """Replace the student's weights."""
        self._student.load_weights(read_weights(weights), weights.policy_version)

    def sample(self, requests: Sequence[SequenceRequest], behaviour: BlendedBehaviour) -> tuple[Sampled, Meter]:
        """Sample every request to its end."""
        speculation = Speculation(
            LocalSide(self._student),
            LocalSide(self.teacher),
            behaviour=behaviour,
            draft_length=draft_length_of(self._section, behaviour),
            seed=self._spec.seed,
            stop_token_id=self._spec.head.stop_token_id,
            max_num_sequences=self._spec.section.max_num_sequences,
        )
        return speculation.run(requests), speculation.meter

    def likeliest(self, requests: pa.RecordBatch) -> tuple[list[list[int]], ...]:
        """Return the support's ids at the position after each prompt, of both."""
        return likeliest(self._student, requests), likeliest(self.teacher, requests)


class VllmPair:
    """One vLLM that holds both; the verifier runs inside its worker, on the whole vocabulary."""

    def __init__(self, spec: EngineSpec, teacher: str, section: BlenderSection) -> None:
        from actors.engines.vllm_engine import VllmBlendEngine

        assert spec.section.type == "vllm"
        self._section, self._max_num_sequences = section, spec.section.max_num_sequences
        self._longest = section.draft_length if isinstance(section.draft_length, int) else _LONGEST_VLLM_DRAFT
        self._draft_length: DraftLength | None = None
        self._engine = VllmBlendEngine(
            student=spec.model,
            teacher=teacher,
            draft_length=self._longest,
            seed=spec.seed,
            head=spec.head,
            support_size=spec.support_size,
            max_model_len=spec.max_model_len,
            dtype=spec.section.dtype,
            memory_gib=spec.section.memory_gib,
            max_num_seqs=spec.section.max_num_sequences,
            enforce_eager=spec.section.enforce_eager,
        )

    @property
    def teacher(self) -> Any:
        """What is asked for the teacher's signal, and tells of finished completions nothing more."""
        return self._engine

    @property
    def policy_version(self) -> int:
        """Of the student's weights in use."""
        return self._engine.policy_version

    def load_weights(self, weights: PolicyWeights) -> None:
        """Replace the student's weights."""
        self._engine.load_weights(read_weights(weights), weights.policy_version)

    def sample(self, requests: Sequence[SequenceRequest], behaviour: BlendedBehaviour) -> tuple[Sampled, Meter]:
        """Sample every request to its end."""
        began = time.perf_counter()
        # One length for the whole batch; what is learned of acceptance serves the next one. Draws do not depend on it.
        self._draft_length = chooses = self._draft_length or draft_length_of(self._section, behaviour)
        length = min(self._longest, chooses.choose(min(len(requests), self._max_num_sequences)))
        generations, counts = self._engine.generate_blended(requests, behaviour, length)
        lengths = [len(generation.token_ids) for generation in generations]
        sampled = Sampled(
            tokens=BlendedTokens.joined(generations),
            bounds=np.cumsum([0, *lengths]),
            stopped=np.array([generation.finish_reason == "stop" for generation in generations]),
        )
        num_accepted = int(sampled.tokens.accepted.sum())
        chooses.observe(
            Observation(
                num_rows=len(requests), draft_length=length, num_accepted=num_accepted,
                num_refused=sum(lengths) - num_accepted, student_s=0.0, teacher_s=0.0, round_s=0.0,
            )
        )  # fmt: skip
        meter = Meter(
            num_tokens=sum(lengths),
            num_drafted=counts.num_drafted,
            num_passes=counts.num_passes,
            num_scored=counts.num_drafted,
            teacher_s=time.perf_counter() - began,  # of both: they are one program
        )
        return sampled, meter

    def likeliest(self, requests: pa.RecordBatch) -> None:
        """Neither model can be asked alone."""
