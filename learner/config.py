"""The recipe's section on learning."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewards.section import Section


class ReverseKLObjective(Section):
    """Distil: KL(student || teacher) at every prefix that was visited."""

    type: Literal["reverse_kl"] = "reverse_kl"
    """Which objective."""
    support_size: Annotated[int, Field(ge=1)] | Literal["full"] = 16
    """On how many of the student's likeliest ids; "full" for the exact KL on the whole vocabulary."""
    tail: bool = False
    """Whether all other ids count as one outcome more, so that no mass is pushed out of the likeliest; the papers' form
    has none, which does no harm where they have nearly all the mass."""
    teacher_logprob_floor: float = Field(default=-30.0, lt=0)
    """Nats; what stands in for a lower log-prob of the teacher, and for a token that it forbids."""


class PolicyGradientObjective(Section):
    """Reinforce what a grader calls right: clipped surrogate on group advantages, with a focal weight (F-GRPO)."""

    type: Literal["policy_gradient"] = "policy_gradient"
    """Which objective."""
    method: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """How a rollout is compared with the others of its group."""
    focal_gamma: float = Field(default=0.5, ge=0)
    """Exponent of (1 - pass_rate); 0 is the method without a focal weight. Other than 0, grades must be 0 or 1."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The ratio of policy and behaviour has no further effect below 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """Likewise above 1 + clip_high."""
    reward_wrong: float = 0.0
    """What a grade of 0 is worth."""
    reward_correct: float = 1.0
    """What a grade of 1 is worth; grades between are interpolated."""

    @model_validator(mode="after")
    def correct_is_worth_more_than_wrong(self) -> Self:
        """Without a difference nothing is learned; with the signs swapped the wrong thing is."""
        if self.reward_correct <= self.reward_wrong:
            raise ValueError(
                f"reward_correct must be above reward_wrong = {self.reward_wrong}, got {self.reward_correct}"
            )
        return self


Objective = Annotated[ReverseKLObjective | PolicyGradientObjective, Field(discriminator="type")]


class LearnerSection(Section):
    """The ranks that learn, and how."""

    objective: Objective = ReverseKLObjective()
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
