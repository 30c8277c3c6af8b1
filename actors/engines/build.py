"""Builds the engine that the recipe names; each engine's libraries are imported only where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass

from actors.config import TorchEngineSection, VllmEngineSection
from actors.engines.environment import engine_environment
from actors.engines.protocol import Engine
from actors.head import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything an actor needs to build its engine; it travels to the actor instead of the engine."""

    section: TorchEngineSection | VllmEngineSection
    model: str
    """A Hugging Face folder or the name of a model on the Hub."""
    seed: int
    head: Head
    """How its logits are read."""
    support_size: int | None
    """K; None for the whole vocabulary, 0 where no support is wanted."""
    max_model_len: int
    """Longest prompt plus longest completion, in tokens."""
    on_gpu: bool

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that must be set before the actor's Python starts."""
        return engine_environment(self.section)


def build_engine(spec: EngineSpec) -> Engine:
    """Return the engine of the spec, with its model loaded.

    Raises:
        EngineError: if the engine's library is missing or of a wrong version, or the model cannot be served.
    """
    if spec.section.type == "vllm":
        from actors.engines.vllm_engine import VllmEngine

        return VllmEngine(
            model=spec.model,
            seed=spec.seed,
            head=spec.head,
            support_size=spec.support_size,
            max_model_len=spec.max_model_len,
            dtype=spec.section.dtype,
            memory_gib=spec.section.memory_gib,
            max_num_seqs=spec.section.max_num_sequences,
            enforce_eager=spec.section.enforce_eager,
        )
    from actors.engines.torch_engine import TorchEngine

    return TorchEngine(
        model=spec.model,
        seed=spec.seed,
        head=spec.head,
        support_size=spec.support_size,
        dtype=spec.section.dtype,
        device="cuda" if spec.on_gpu else "cpu",
        threads=spec.section.threads,
        max_num_sequences=spec.section.max_num_sequences,
    )
