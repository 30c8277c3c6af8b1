"""What an engine's process needs in its environment, told without importing any of the engine's libraries."""

from collections.abc import Mapping

from actors.config import TorchEngineSection, VllmEngineSection


def engine_environment(section: TorchEngineSection | VllmEngineSection) -> Mapping[str, str]:
    """Return the variables that must be set before the Python of an engine's process starts."""
    if section.type == "vllm":
        from actors.engines.vllm_process import environment

        return environment(section.threads, section.memory_gib)
    return {"OMP_NUM_THREADS": str(section.threads)}
