"""The command `tutelage`."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from orchestrator.errors import RunError, UserError
from orchestrator.models import check_models, has_config
from orchestrator.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from orchestrator.run_folder import RunFolder

_USER_MISTAKE, _FAILURE, _INTERRUPTED = 2, 1, 130

_COUNT = click.IntRange(min=1)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tutelage")
def commands() -> None:
    """Post-train a language model with a teacher (TRB distillation) or with verifiable rewards (F-GRPO), on Ray.

    A run is described by a recipe, a YAML file; deploy/recipes/ has some to begin with. Any setting can be changed on
    the command line: `tutelage train RECIPE training.num_steps=50 students.num_actors=2`.
    """


@commands.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@OVERRIDES
def train(recipe: str, overrides: Sequence[str]) -> None:
    """Train as RECIPE says, and write a run folder.

    Starts a Ray cluster on this machine and stops it at the end, unless RAY_ADDRESS or the recipe's cluster.address
    names one that runs.
    """
    loaded = load_recipe(recipe, overrides)
    check_models(loaded)
    _check_data(loaded)
    from orchestrator.run_folder import RunFolder

    _train(loaded, RunFolder.create(loaded), resume=False)


@commands.command()
@click.argument("run_folder", type=click.Path(file_okay=False))
def resume(run_folder: str) -> None:
    """Continue the run in RUN_FOLDER from its newest checkpoint, in the same folder."""
    from orchestrator.checkpoints import latest_checkpoint
    from orchestrator.run_folder import RunFolder

    folder = RunFolder.open(run_folder)
    loaded = folder.recipe()
    check_models(loaded)
    latest_checkpoint(folder)
    _train(loaded, folder, resume=True)


@commands.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@OVERRIDES
def check(recipe: str, overrides: Sequence[str]) -> None:
    """Check RECIPE and print it resolved, every default filled in; nothing is started."""
    loaded = load_recipe(recipe, overrides)
    lines = check_models(loaded)
    _check_data(loaded)
    if loaded.teachers is None or has_config(loaded.teachers.model):
        from orchestrator.launch_plan import hints, with_planned_signal

        loaded, planned = with_planned_signal(loaded)
        lines += [*planned, *hints(loaded)]
    click.echo(json.dumps(loaded.model_dump(mode="json"), indent=2))
    for line in lines:
        click.echo(line, err=True)
    click.echo(f"{recipe} is in order", err=True)


@commands.command("eval")
@click.argument("checkpoint")
@click.option("--task", required=True, help="Which task's held-out prompts and grader: addition, countdown, or math.")
@click.option("--data", type=click.Path(dir_okay=False), help="Prompts (.jsonl or .parquet); math needs them.")
@click.option("--prompts", "num_prompts", type=_COUNT, default=256, show_default=True, help="Held-out prompts.")
@click.option("--samples", "num_samples", type=_COUNT, default=8, show_default=True, help="Completions of each prompt.")
@click.option("--pass-at", default="1,8", show_default=True, help="The k of pass@k, none above --samples.")
@click.option("--max-new-tokens", type=_COUNT, default=128, show_default=True, help="Longest completion.")
@click.option("--seed", default=0, show_default=True, help="Of prompts and samples.")
@click.option("--engine", type=click.Choice(["torch", "vllm"]), default="torch", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def evaluate_checkpoint(
    checkpoint: str, task: str, data: str | None, num_prompts: int, num_samples: int, pass_at: str,
    max_new_tokens: int, seed: int, engine: str, device: str,
) -> None:  # fmt: skip
    """Print pass@1 and unbiased pass@k of CHECKPOINT, a Hugging Face folder (or tiny:NAME, hub:NAME)."""
    from orchestrator.failures import sentence
    from orchestrator.offline_evaluation import EvaluationRequest, print_evaluation

    request = EvaluationRequest(
        checkpoint=checkpoint, task=task, data=data, num_prompts=num_prompts, num_samples=num_samples,
        pass_at=pass_at, max_new_tokens=max_new_tokens, seed=seed, engine=engine, device=device,
    )  # fmt: skip
    try:
        print_evaluation(request)
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"{checkpoint} could not be evaluated: {sentence(error)}") from error


def main() -> None:
    """Run the command; a user's mistake ends it with its sentences and exit code 2, never with a traceback."""
    try:
        sys.exit(commands.main(standalone_mode=False) or 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _complain("stopped")
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(_USER_MISTAKE)
    except (UserError, RunError) as error:
        _complain(error)
        sys.exit(_USER_MISTAKE if isinstance(error, UserError) else _FAILURE)


def _train(recipe: Recipe, folder: "RunFolder", *, resume: bool) -> None:
    """Run the loop; whatever ends it, say so in one sentence, where the run folder is and how to go on."""
    # Until the loop listens itself, these end the command and all that it started, as Ctrl-C does; but not under nohup.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    from actors.failures import root_cause
    from orchestrator.checkpoints import has_checkpoint
    from orchestrator.failures import sentence
    from orchestrator.interruption import Interruption
    from orchestrator.loop import train as loop
    from orchestrator.progress import Progress
    from orchestrator.run import started

    progress, stop, code = Progress(recipe.training.num_steps), Interruption(), 0
    progress.say(f"run folder: {folder.path}")
    try:
        with (
            started(recipe, folder, progress, stop, resume=resume) as run,
            progress.live(),
            stop.listening(progress.say),
        ):
            loop(run)
    except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of SIGTERM
        stop.requested = True
    except Exception as error:  # noqa: BLE001 - the boundary to the user: one sentence; error.log has the traceback
        _complain(sentence(error))
        code = _USER_MISTAKE if isinstance(root_cause(error), UserError) else _FAILURE
    if stop.requested and not code:
        progress.say("stopped")
        code = _INTERRUPTED
    progress.say(f"run folder: {folder.path}")
    if code and has_checkpoint(folder):
        progress.say(f"continue with: tutelage resume {shlex.quote(str(folder.path))}")
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. Python's own way out sometimes ends in a segmentation fault, in threads that Ray leaves behind when
    # it is interrupted while starting.
    os._exit(code)


def _check_data(recipe: Recipe) -> None:
    """Read the recipe's prompt files, if it has any, so that a broken one is found before anything starts."""
    from orchestrator.prompts import build_source

    build_source(recipe.data, recipe.seed)


def _complain(message: object) -> None:
    for line in str(message).splitlines():
        click.echo(f"tutelage: {line}", err=True)


if __name__ == "__main__":
    main()
