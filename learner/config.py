"""The recipe's section on learning."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewards.section import Section


def require_default(section: Section, name: str, reason: str) -> None:
    """Refuse a setting that would have no effect; one that is left as it is by default misleads nobody.

    Raises:
        ValueError: if the setting has another value than its default.
    """
    value, default = getattr(section, name), type(section).model_fields[name].default
    if value != default:
        raise ValueError(f"{name} must be left out, since {reason}; got {value}")


class VetoSection(Section):
    """Veto (arXiv 2601.07155): the teacher's law times a power of the student's, renormalised, as the target."""

    beta: float = Field(default=0.4, ge=0, le=1)
    """The power at the first step; it falls linearly to 0 at the last."""


class DistillationSection(Section):
    """How far the student is from the teacher at every prefix that was visited, whoever visited it."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """KL(student || teacher), KL(teacher || student), or the generalised Jensen-Shannon divergence between them."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Of `jsd`: the mixture compared with is jsd_beta teacher + (1 - jsd_beta) student; toward 0 it is like the forward
    KL, toward 1 like the reverse."""
    signal: Literal["support", "sampled", "full", "hidden", "auto"] = "support"
    """What the learner is told of the teacher: log-probs on a support of support_size ids; of the sampled token alone;
    of the whole vocabulary; its last hidden state, of which the learner makes all log-probs with the teacher's output
    head. `auto`: the exact one that takes the fewest bytes, or the support where max_bytes_per_token forbids both."""
    max_bytes_per_token: int | None = Field(default=None, ge=4)
    """Most bytes that may travel from teacher to learner for each token; a signal that needs more is refused."""
    support: Literal["student", "teacher", "union"] = "student"
    """With the signal `support`, whose likeliest ids: the student's, as the papers have it, the teacher's, or both."""
    support_size: int = Field(default=16, ge=1)
    """K: how many ids of each of them."""
    tail: bool = False
    """Whether all other ids count as one outcome more, so that no mass is pushed out of the likeliest; the papers' form
    has none, which does no harm where they have nearly all the mass."""
    teacher_logprob_floor: float = Field(default=-30.0, lt=0)
    """Nats; what stands in for a lower log-prob of the teacher, and for a token that it forbids."""
    veto: VetoSection | None = None
    """The teacher's law is replaced by Veto's target; none for the teacher itself."""

    @model_validator(mode="after")
    def settings_have_an_effect(self) -> Self:
        """A setting without an effect would mislead whoever reads the recipe."""
        if self.signal == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f"signal must be support, full or hidden for the divergence {self.divergence}, got sampled: the "
                "sampled token is the student's and tells of KL(student || teacher) alone"
            )
        if self.veto is not None and self.signal == "sampled":
            raise ValueError("signal must be support, full or hidden where veto is set, got sampled")
        if self.divergence != "jsd":
            require_default(self, "jsd_beta", f"the divergence is {self.divergence}")
        if self.divergence != "reverse_kl":
            require_default(self, "teacher_logprob_floor", f"the divergence is {self.divergence}, which needs none")
        if self.signal in ("sampled", "full", "hidden"):
            for name in ("support", "support_size", "tail"):
                require_default(self, name, f"the signal is {self.signal} and not a support")
        return self


class DistillationObjective(DistillationSection):
    """Distil: minimise a divergence between student and teacher."""

    type: Literal["distillation"] = "distillation"
    """Which objective."""
    sft_warmup_steps: int = Field(default=0, ge=0)
    """In the first so many steps the loss is -log student(token) on whatever was sampled; with
    `blending: {type: fixed_beta, beta: 1}` for as many steps that is fine-tuning on the teacher's own samples."""


class CorrectionSection(Section):
    """What is done about rollouts whose sampler computed other log-probs than the learner does now."""

    type: Literal["truncate", "mask"] = "truncate"
    """Weigh each token by learner / sampler, cut off at `high`; or leave out what lies outside [low, high]."""
    level: Literal["token", "sequence"] = "token"
    """Whether the ratio is that of each token or the product over its rollout."""
    low: float = Field(default=0.0, ge=0)
    """Of `mask`."""
    high: float = Field(default=2.0, gt=0)
    """Of both."""

    @model_validator(mode="after")
    def bounds_are_in_order(self) -> Self:
        """Otherwise every token would be left out."""
        if self.low >= self.high:
            raise ValueError(f"low must be below high = {self.high}, got {self.low}")
        if self.type == "truncate":
            require_default(self, "low", "the correction truncates from above only")
        return self


class OverlongSection(Section):
    """DAPO's soft punishment of long completions: the reward falls linearly over the last tokens of the allowance."""

    buffer_tokens: int = Field(default=128, ge=1)
    """Over how many tokens before rollouts.max_new_tokens the reward falls."""
    penalty: float = Field(default=1.0, gt=0)
    """What it has fallen by at the end."""


class PolicyGradientObjective(Section):
    """Reinforce what a grader calls right, with a focal weight (F-GRPO) on the advantages of any method."""

    type: Literal["policy_gradient"] = "policy_gradient"
    """Which objective."""
    method: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "reinforce", "maxrl", "ds_grpo"] = "grpo"
    """Which advantage, surrogate, clipping and aggregation (table in learner/methods.py); each may be set below."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce", "maxrl", "ds_grpo"] | None = None
    """How a rollout is compared with the others of its group; the method's own if left out."""
    surrogate: Literal["clipped", "cispo", "gspo", "reinforce"] | None = None
    """What the advantage multiplies; the method's own if left out."""
    clip_low: float | None = Field(default=None, ge=0)
    """The ratio of policy and behaviour has no further effect below 1 - clip_low; the method's own if left out."""
    clip_high: float | None = Field(default=None, ge=0)
    """Likewise above 1 + clip_high."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed"] | None = None
    """Mean over all tokens; over rollouts of the mean over their tokens; or the sum over rollouts x
    aggregation_tokens. The method's own if left out."""
    aggregation_tokens: int | None = Field(default=None, ge=1)
    """Of `fixed`; rollouts.max_new_tokens if left out."""
    std_ddof: Literal[0, 1] = 1
    """1 divides the variance of a group's rewards by n - 1, 0 by n."""
    focal_gamma: float = Field(default=0.5, ge=0)
    """Exponent of (1 - pass_rate); 0 is the method without a focal weight."""
    focal_while_blending: Literal["off", "on"] = "off"
    """Whether the focal weight is applied to rollouts of a blend, whose pass rate is not the student's."""
    correct_at: float | None = Field(default=None, gt=0, le=1)
    """From which grade on a rollout counts as correct for the pass rate; needed where grades between 0 and 1 occur and
    focal_gamma is not 0."""
    reward_wrong: float = 0.0
    """What a grade of 0 is worth."""
    reward_correct: float = 1.0
    """What a grade of 1 is worth; grades between are interpolated."""
    overlong: OverlongSection | None = None
    """Punishment of long completions, in the advantage and not in the pass rate; none if left out."""
    truncated: Literal["train", "mask"] = "train"
    """Whether completions that were cut off at max_new_tokens train (they always count in their group)."""
    ds_coef: float = Field(default=0.05, ge=0)
    """Of the advantage `ds_grpo`."""
    correction: CorrectionSection | None = None
    """If set, the surrogate's ratio is to the learner's own log-probs, and each token is weighed or masked by learner /
    sampler; otherwise the ratio is to the law that really drew each token."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Times KL(policy || the student before the run), per token; 0 keeps no reference. Above 0 each rank holds another
    whole copy of the student, whatever zero_stage is, unless there are adapters (lora) to switch off."""
    distillation: DistillationSection | None = None
    """A teacher's divergence on top; none for rewards alone."""
    distillation_coef: float = Field(default=1.0, gt=0)
    """What it is multiplied by."""

    @model_validator(mode="after")
    def correct_is_worth_more_than_wrong(self) -> Self:
        """Without a difference nothing is learned; with the signs swapped the wrong thing is."""
        if self.reward_correct <= self.reward_wrong:
            raise ValueError(
                f"reward_correct must be above reward_wrong = {self.reward_wrong}, got {self.reward_correct}"
            )
        return self

    @model_validator(mode="after")
    def settings_have_an_effect(self) -> Self:
        """A setting without an effect would mislead whoever reads the recipe."""
        if self.aggregation_tokens is not None and self.aggregation not in ("fixed", None):
            raise ValueError(f"aggregation_tokens must be left out with aggregation {self.aggregation}")
        for name in ("clip_low", "clip_high"):
            if self.correction is not None:
                require_default(self, name, "with a correction the surrogate's ratio is 1 and nothing is clipped")
        if self.distillation is None:
            require_default(self, "distillation_coef", "there is no distillation section")
        return self


def distillation_of(objective: "DistillationObjective | PolicyGradientObjective") -> DistillationSection | None:
    """Return how the teacher enters an objective; None where it does not."""
    return objective if isinstance(objective, DistillationObjective) else objective.distillation


Objective = Annotated[DistillationObjective | PolicyGradientObjective, Field(discriminator="type")]


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685) by the library peft (the extra `lora`)."""

    rank: int = Field(default=16, ge=1)
    """Of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Names of the linear layers that get one (`q_proj`, say); all but the output head if left out."""


class LearnerSection(Section):
    """The ranks that learn, and how."""

    objective: Objective = DistillationObjective()
    """What is learned."""
    world_size: int = Field(default=1, ge=1)
    """How many ranks, each a Ray actor of its own."""
    num_cpus: float = Field(default=1.0, ge=0.001)
    """Ray CPUs that each rank reserves."""
    num_gpus: float = Field(default=0.0, ge=0, le=1)
    """GPUs that each rank reserves; 0 learns on CPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each rank."""
    zero_stage: Literal[1, 2, 3] = 1
    """What is spread over the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; the optimizer keeps float32 weights either way."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Rollouts of one forward and backward pass of one rank. It changes memory and speed, not the result."""
    packing: bool = True
    """Whether the rollouts of a micro-batch lie one after another in one row, without padding, for the same result."""
    tile_mib: int = Field(default=256, ge=1)
    """Memory in which logits, their laws and their gradients are computed, a few tokens at a time."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's state lives and is updated; `cpu` frees the GPU of it."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of the weights themselves; rollouts and checkpoints get merged weights."""
    activation_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: less memory, slower."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """After the warmup."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its value."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What the learning rate does after the warmup: stays, or falls to 0 at the last step."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    adam_betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Of AdamW, each in [0, 1)."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Norm that the gradient of a step is scaled down to where it is larger."""
    step_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest time that one step (or one publication, save or load) may take; then all ranks are stopped."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time until all ranks run and hold the model."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def zero_stage_reports_a_gradient_norm(cls, value: Any) -> Any:
        """Refuse stage 0 with its reason, and what only equals a number, such as true."""
        if isinstance(value, bool | float):
            raise ValueError(f"zero_stage must be 1 or 2 or 3, got {str(value).lower()}")
        if value == 0:
            raise ValueError(
                "zero_stage must be 1 or 2 or 3, got 0: without ZeRO, DeepSpeed reports no gradient norm and its "
                "bfloat16 results depart from the other stages'; 1 costs nothing at world_size 1"
            )
        return value

    @field_validator("adam_betas")
    @classmethod
    def adam_betas_are_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        """AdamW's averages forget nothing at 1."""
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"adam_betas must lie in [0, 1), got {list(value)}")
        return value

    @property
    def rollouts_per_round(self) -> int:
        """Rollouts that all ranks take in one micro-batch each; a step's number of rollouts is a multiple of it."""
        return self.world_size * self.micro_batch_size
