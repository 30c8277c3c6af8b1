"""Builds the engine that the recipe names; each engine's libraries are imported only where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass

from actors.config import TorchEngineSection, VllmEngineSection
from actors.engines.protocol import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything an actor needs to build its engine; it travels to the actor instead of the engine."""

    section: TorchEngineSection | VllmEngineSection
    model: str
    """A Hugging Face folder or the name of a model on the Hub."""
    seed: int
    stop_token_id: int
    support_size: int | None
    """K; None for the whole vocabulary, 0 where no support is wanted."""
    temperature: float
    max_model_len: int
    """Longest prompt plus longest completion, in tokens."""
    on_gpu: bool

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that must be set before the actor's Python starts."""
        if self.section.type == "vllm":
            from actors.engines.vllm_engine import environment

            return environment(self.section.threads, self.section.memory_gib)
        return {"OMP_NUM_THREADS": str(self.section.threads)}


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
            temperature=spec.temperature,
            support_size=spec.support_size,
            stop_token_id=spec.stop_token_id,
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
        stop_token_id=spec.stop_token_id,
        support_size=spec.support_size,
        temperature=spec.temperature,
        dtype=spec.section.dtype,
        device="cuda" if spec.on_gpu else "cpu",
        threads=spec.section.threads,
        max_num_sequences=spec.section.max_num_sequences,
    )
