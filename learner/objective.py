"""What is minimised at each step of a run."""

from learner.config import DistillationObjective, DistillationSection, Objective, distillation_of
from learner.distillation import SupervisedFineTuning, build_distillation
from learner.losses import Loss, WeightedSum
from learner.policy_losses import build_policy_loss
from learner.tiles import OutputHead


class LossPlan:
    """The loss of each step: the objective's, with what changes from step to step.

    - Veto's weight falls linearly from its value at the first step to 0 at the last.
    - The first `sft_warmup_steps` of a distillation are supervised fine-tuning on what was sampled.
    - A policy gradient with a distillation minimises policy loss + distillation_coef x divergence.

    Args:
        objective: the recipe's.
        num_steps: of the whole run.
        signal: what the rollouts carry of the teacher: support, sampled, full or hidden.
        temperature: the sampler's, which the learner's logits are at.
        vocab_size: V, of the shared law.
        teacher_head: of the teacher; for the signal `hidden` only.

    Raises:
        ValueError: if a teacher is distilled at another temperature than 1, or its output head is missing.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        num_steps: int,
        signal: str,
        temperature: float,
        vocab_size: int,
        teacher_head: OutputHead | None = None,
    ) -> None:
        self._objective = objective
        self._distillation = distillation_of(objective)
        self._num_steps = num_steps
        self._signal = signal
        self._vocab_size = vocab_size
        self._teacher_head = teacher_head
        if self._distillation is None:
            return
        if temperature != 1.0:
            raise ValueError(f"distillation compares both laws at temperature 1.0, got rollouts at {temperature!r}")
        if signal == "hidden" and teacher_head is None:
            raise ValueError("the signal hidden needs the teacher's folder with its output head, got none")

    def at(self, step: int) -> Loss:
        """Return the loss of an optimizer step, counted from 0."""
        if isinstance(self._objective, DistillationObjective):
            if step < self._objective.sft_warmup_steps:
                return SupervisedFineTuning()
            return self._divergence(self._objective, step)
        policy = build_policy_loss(self._objective)
        if self._distillation is None:
            return policy
        return WeightedSum(
            parts=((1.0, policy), (self._objective.distillation_coef, self._divergence(self._distillation, step)))
        )

    @property
    def support_size(self) -> int | None:
        """How many ids of each stored support the loss takes (`build_micro_batch`): 0 none, None all."""
        section = self._distillation
        if section is None or self._signal == "hidden":
            return 0
        return section.support_size if self._signal == "support" and section.support == "student" else None

    def _divergence(self, section: DistillationSection, step: int) -> Loss:
        remaining = max(0.0, 1 - step / max(1, self._num_steps - 1))
        return build_distillation(
            section,
            signal=self._signal,
            veto_beta=0.0 if section.veto is None else section.veto.beta * remaining,
            teacher_head=self._teacher_head,
            vocab_size=self._vocab_size,
        )
