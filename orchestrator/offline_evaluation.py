"""`tutelage eval`: pass@k of one checkpoint, in this process, without a cluster."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from actors.config import TorchEngineSection, VllmEngineSection
from actors.engines.environment import engine_environment
from orchestrator.config import AdditionData, CountdownData, DataSection, FileData
from orchestrator.errors import UserError
from orchestrator.evaluation import Evaluation, evaluate
from orchestrator.models import check_model, make_models, model_location
from orchestrator.prompts import PromptText, build_source, read_prompts
from rewards.config import GradersSection
from rewards.grade import Grade
from rewards.graders import Graders, require_task

if TYPE_CHECKING:
    from actors.experience import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What the command line asks for."""

    checkpoint: str
    task: str
    data: str | None
    num_prompts: int
    num_samples: int
    pass_at: str
    max_new_tokens: int
    seed: int
    engine: str
    device: str


def print_evaluation(request: EvaluationRequest) -> None:
    """Evaluate and print a table.

    Raises:
        UserError: for a request that cannot be met; names the option.
    """
    ks = _pass_at(request)
    held_out = _held_out(request)
    check_model("CHECKPOINT", request.checkpoint)
    make_models(request.checkpoint)
    # Threads and engine settings are read when torch and vLLM are first imported, which is below.
    os.environ.update(engine_environment(_engine(request)))
    from orchestrator.tokenization import PromptEncoder

    encoder = PromptEncoder(request.checkpoint, stop_token=None, max_prompt_tokens=sys.maxsize, setting="CHECKPOINT")
    prompts = encoder.encode(held_out)
    texts = _sample(request, prompts, encoder.stop_token_ids)
    graders = Graders(GradersSection())
    try:
        rows = [(prompt, text) for prompt, samples in zip(prompts, texts, strict=True) for text in samples]
        grades = graders.grade([(text, prompt.task, prompt.reference) for prompt, text in rows])
    finally:
        graders.close()
    _print(request, evaluate([_summary([prompt for prompt, _ in rows], grades)], ks))


def _sample(
    request: EvaluationRequest, prompts: "Sequence[Prompt]", stop_token_ids: tuple[int, ...]
) -> list[list[str]]:
    """Return the texts of each prompt's samples."""
    from transformers.utils import logging

    from actors.engines.build import EngineSpec, build_engine
    from actors.engines.protocol import SequenceRequest
    from actors.head import Head
    from actors.tokenizer import load_tokenizer

    logging.disable_progress_bar()
    longest = max(len(prompt.token_ids) for prompt in prompts)
    location = model_location(request.checkpoint)
    engine = build_engine(
        EngineSpec(
            section=_engine(request),
            model=location,
            seed=request.seed,
            head=Head(stop_token_ids=stop_token_ids),
            support_size=0,
            max_model_len=longest + request.max_new_tokens,
            on_gpu=request.device == "cuda",
        )
    )
    try:
        generations = engine.generate(
            [
                SequenceRequest(
                    prompt_id=prompt.prompt_id,
                    sample_index=index,
                    prompt_ids=prompt.token_ids,
                    max_new_tokens=request.max_new_tokens,
                )
                for prompt in prompts
                for index in range(request.num_samples)
            ]
        )
    finally:
        engine.shutdown()
    tokenizer = load_tokenizer(location)
    texts = tokenizer.batch_decode([g.token_ids.tolist() for g in generations], skip_special_tokens=True)
    return [texts[i : i + request.num_samples] for i in range(0, len(texts), request.num_samples)]


def _engine(request: EvaluationRequest) -> TorchEngineSection | VllmEngineSection:
    return VllmEngineSection() if request.engine == "vllm" else TorchEngineSection()


def _pass_at(request: EvaluationRequest) -> list[int]:
    try:
        ks = [int(k) for k in request.pass_at.split(",")]
    except ValueError:
        raise UserError(f"--pass-at must be whole numbers with commas between, got {request.pass_at!r}") from None
    # Fewer samples than the default asks for: report what they allow.
    default = click.get_current_context().get_parameter_source("pass_at") is not click.core.ParameterSource.COMMANDLINE
    ks = [k for k in ks if k <= request.num_samples] if default else ks
    wrong = [k for k in ks if not 1 <= k <= request.num_samples]
    if wrong:
        raise UserError(f"--pass-at must lie between 1 and --samples ({request.num_samples}), got {wrong[0]}")
    return ks


def _held_out(request: EvaluationRequest) -> list[PromptText]:
    try:
        require_task(request.task)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if request.data is not None:
        section = FileData.model_validate({"path": request.data, "task": request.task})
        return read_prompts("--data", request.data, section)[: request.num_prompts]
    generated: dict[str, DataSection] = {"addition": AdditionData(), "countdown": CountdownData()}
    if request.task not in generated:
        raise UserError(f"--data must name a file of prompts, since --task {request.task} generates none")
    return build_source(generated[request.task], request.seed).held_out(request.num_prompts)


def _summary(prompts: "Sequence[Prompt]", grades: Sequence[Grade]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "prompt_id": [prompt.prompt_id for prompt in prompts],
            "reward": [grade.reward for grade in grades],
            "status": [grade.status.value for grade in grades],
        }
    )


def _print(request: EvaluationRequest, evaluation: Evaluation) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, estimate in evaluation.estimates.items():
        table.add_row(name, str(estimate))
    for status, count in evaluation.statuses.items():
        table.add_row(status, str(count))
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{request.checkpoint} on {request.task}: {evaluation.num_prompts} held-out prompts x "
        f"{evaluation.num_samples} samples, mean ± standard error",
        markup=False,
    )
    console.print(table)
