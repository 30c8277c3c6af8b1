"""The composition root: builds what the loop needs from a recipe, and takes it down again."""

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.behaviours import Behaviour, StudentAlone
from actors.head import Head
from actors.weights import PolicyWeights
from learner.batcher import Batcher, TrainBatch
from learner.errors import NonFiniteLossError
from learner.group import LearnerGroup
from learner.rank import StepReport
from orchestrator.checkpoints import Checkpoints
from orchestrator.cluster import check_room, connected
from orchestrator.evaluation import Evaluation, evaluate
from orchestrator.experience_queue import Experience, ExperienceQueue
from orchestrator.interruption import Interruption
from orchestrator.launch_plan import hints, with_planned_signal
from orchestrator.models import check_models, located, make_models, model_location
from orchestrator.progress import Progress
from orchestrator.recipe import Recipe
from orchestrator.rollout_metrics import rollout_metrics
from orchestrator.run_folder import RunFolder
from orchestrator.schedules import behaviour_plan
from orchestrator.sinks import Sinks


class Queue:
    """The driver's end of the queue actor."""

    def __init__(self, recipe: Recipe) -> None:
        actor_class: Any = ray.remote(ExperienceQueue)
        self._actor = actor_class.options(name="experience-queue", num_cpus=0).remote("experience-queue", recipe)
        self._requests: dict[int, Any] = {}
        self.head: Head = ray.get(self._actor.start.remote())
        """How student and teacher are read as laws."""

    def request(self, index: int, weights: PolicyWeights, behaviour: Behaviour) -> None:
        """Send batch `index` to be sampled; returns at once."""
        self._requests[index] = self._actor.request.remote(index, weights, behaviour)

    def compare_models(self, weights: PolicyWeights) -> str:
        """Say how near student and teacher are."""
        line: str = ray.get(self._actor.compare_models.remote(weights))
        return line

    def take(self, index: int) -> Experience:
        """Wait for batch `index`."""
        taken = self._actor.take.remote(index)
        ray.get(self._requests.pop(index))
        experience: Experience = ray.get(taken)
        return experience

    def evaluate(self, weights: PolicyWeights) -> Experience:
        """Sample and grade the held-out prompts."""
        experience: Experience = ray.get(self._actor.evaluate.remote(weights))
        return experience

    def close(self) -> None:
        """End the queue and all its actors."""
        with suppress(RayError):  # an actor that is busy or dead is ended all the same, and its own with it
            ray.get(self._actor.close.remote(), timeout=10)
        ray.kill(self._actor)


class Evaluator:
    """Evaluates the student before, between and after, as the recipe says."""

    def __init__(self, recipe: Recipe, queue: Queue, sinks: Sinks, progress: Progress) -> None:
        self._recipe, self._queue, self._sinks, self._progress = recipe, queue, sinks, progress
        self._is_on = recipe.evaluation.num_prompts > 0 and (
            recipe.data.type != "file" or recipe.data.held_out_path is not None
        )

    def before(self, num_steps: int, weights: PolicyWeights) -> None:
        """Evaluate the untrained student; a run that is resumed has done so."""
        if self._is_on and num_steps == 0:
            self._evaluate(num_steps, weights)

    def run_if_due(self, num_steps: int, weights: PolicyWeights) -> None:
        """Evaluate after that many optimizer steps, if the recipe says so."""
        every, last = self._recipe.evaluation.every_steps, self._recipe.training.num_steps
        if self._is_on and every and num_steps % every == 0 and num_steps != last:
            self._evaluate(num_steps, weights)

    def after(self, num_steps: int, weights: PolicyWeights) -> None:
        """Evaluate where the run ends, and print both ends."""
        if self._is_on:
            last = self._evaluate(num_steps, weights)
            self._progress.table(last.earlier(self._sinks.first_evaluation()), last)

    def _evaluate(self, num_steps: int, weights: PolicyWeights) -> Evaluation:
        experience = self._queue.evaluate(weights)
        has_scores = self._recipe.teachers is not None and self._recipe.rollouts.support_size != 0
        shards = ray.get(list(experience.shards)) if has_scores else []
        evaluation = evaluate(experience.summaries, self._recipe.evaluation.pass_at, shards)
        self._sinks.write_evaluation(num_steps, {**evaluation.metrics(), "time/evaluation_s": experience.sampling_s})
        summary = ", ".join(f"{name} {estimate}" for name, estimate in evaluation.estimates.items())
        self._progress.say(f"held out, after {num_steps} steps: {summary}")
        return evaluation


class Run:
    """One training run. The loop (orchestrator/loop.py) calls its parts; nothing here decides what the algorithm is."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, progress: Progress, stop: Interruption, *, resume: bool
    ) -> None:
        """Start the actors on the connected cluster; `resume` continues from the folder's newest checkpoint."""
        self.recipe, self.folder, self.progress, self._stop = recipe, folder, progress, stop
        self._closing = ExitStack()
        try:
            self._start(resume=resume)
        except BaseException:
            self.close()
            raise

    def _start(self, *, resume: bool) -> None:
        recipe, began = self.recipe, time.monotonic()
        check_room(recipe)
        self.queue = Queue(located(recipe))
        self._closing.callback(self.queue.close)
        self.learner = LearnerGroup(
            recipe.learner,
            model_folder=model_location(recipe.students.model),
            rollouts_per_step=recipe.rollouts.rollouts_per_step,
            num_steps=recipe.training.num_steps,
            namespace=ray.get_runtime_context().namespace,
            head=self.queue.head,
            signal="support" if recipe.distillation is None else recipe.distillation.signal,
            teacher_folder=model_location(recipe.teachers.model) if recipe.teachers is not None else None,
            teacher_dtype=recipe.engine.dtype,
        )
        self._closing.callback(self.learner.close)
        self.checkpoints = Checkpoints(self.folder, recipe.checkpoints, self.learner)
        self.first_step = self.checkpoints.load_latest() if resume else 0
        self.folder.forget_after(self.first_step)
        self._steps_taken = self.first_step
        self._requested = self.first_step
        self.behaviour = behaviour_plan(recipe.blending, recipe.rollouts)
        self._batcher = Batcher(objective=recipe.learner.objective, max_new_tokens=recipe.rollouts.max_new_tokens)
        self.sinks = Sinks(self.folder, self.folder.path.name, self.first_step)
        self._closing.callback(self.sinks.close)
        self.evaluator = Evaluator(recipe, self.queue, self.sinks, self.progress)
        self._changeover_told = resume and not self._blends(self.first_step)
        self.progress.say(f"actors ready in {time.monotonic() - began:.0f} s")
        if recipe.teachers is not None and recipe.rollouts.support_size != 0 and not resume:
            self.progress.say(self.queue.compare_models(PolicyWeights(policy_version=0, buckets=())))

    def steps(self) -> Iterator[int]:
        """Yield the steps still to be taken, until the last or until the run is told to stop."""
        while self._steps_taken < self.recipe.training.num_steps and not self._stop.requested:
            self._step_began = time.monotonic()
            yield self._steps_taken
            self._steps_taken += 1

    def admitted(self, step: int) -> Iterator[int]:
        """Yield the batches that the staleness bound admits at a step and that were not requested yet."""
        last = min(step + self.recipe.rollouts.max_staleness, self.recipe.training.num_steps - 1)
        while self._requested <= last:
            yield self._requested
            self._requested += 1

    def pack(self, step: int, experience: Experience) -> tuple[TrainBatch, Mapping[str, float]]:
        """Return the batch of a step and the metrics of its grades."""
        batch, metrics = self._batcher.pack(
            step, experience.learned, experience.summaries, blended=self._blends(step), padding=experience.padding
        )
        return batch, {**metrics, **experience.sampling}

    def learn(self, step: int, batch: TrainBatch, experience: Experience) -> StepReport:
        """Take the optimizer step; where a loss or gradient is not finite, write down which rollouts it was."""
        try:
            return self.learner.step(batch)
        except NonFiniteLossError as error:
            self.folder.write_rollouts(step, ray.get(list(experience.shards)))
            file = self.folder.write_refused(step, str(error), error.rollouts)
            raise NonFiniteLossError(f"{error}; {file} lists them", error.rollouts) from error

    def record(self, step: int, experience: Experience, grades: Mapping[str, float], report: StepReport) -> None:
        """Write down a step: rollouts, metrics, progress."""
        shards = ray.get(list(experience.shards))
        self.folder.write_rollouts(step, shards)
        step_s = time.monotonic() - self._step_began
        metrics = {
            **grades,
            **rollout_metrics(shards, step),
            **{f"loss/{name}": value for name, value in report.metrics.items()},
            "loss/mean": report.loss,
            "learner/grad_norm": report.grad_norm,
            "learner/learning_rate": report.learning_rate,
            "learner/policy_version": float(report.policy_version),
            "failures/shards_sampled_again": float(experience.num_retries),
            "time/step_s": step_s,
            "time/sampling_s": experience.sampling_s,
            "time/tokens_per_s": report.num_tokens / step_s,
        }
        if experience.changeover_s is not None and not self._blends(step) and not self._changeover_told:
            self._changeover_told = True
            metrics["time/changeover_s"] = experience.changeover_s
            self.progress.say(
                "the warmup is over: plain student rollouts from here on, changed over in "
                f"{experience.changeover_s:.1f} s"
            )
        self.sinks.write_step(step, metrics)
        self.progress.step(step, metrics)

    def finish(self, weights: PolicyWeights) -> None:
        """Save, and evaluate unless the run was told to stop."""
        saved = self.checkpoints.save(self._steps_taken)
        if not self._stop.requested:
            self.evaluator.after(self._steps_taken, weights)
        self.progress.say(f"model: {saved / 'model'}")

    def _blends(self, step: int) -> bool:
        """Whether the batch of a step is sampled from a blend of student and teacher."""
        return not isinstance(self.behaviour(step), StudentAlone)

    def close(self) -> None:
        """End all actors; what was written stays."""
        self._closing.close()


@contextmanager
def started(
    recipe: Recipe, folder: RunFolder, progress: Progress, stop: Interruption, *, resume: bool = False
) -> Iterator[Run]:
    """Connect to the cluster, start a run and take both down again; what fails is written to the folder's error.log."""
    try:
        for line in check_models(recipe):
            progress.say(line)
        make_models(recipe.students.model, *([recipe.teachers.model] if recipe.teachers else []))
        recipe, lines = with_planned_signal(recipe)
        for line in (*lines, *hints(recipe)):
            progress.say(line)
        with connected(recipe.cluster, f"tutelage-{folder.path.name}", log_to_driver=False) as dashboard:
            if dashboard:
                progress.say(f"dashboard: http://{dashboard}")
            run = Run(recipe, folder, progress, stop, resume=resume)
            try:
                yield run
            finally:
                run.close()
    except Exception:
        with suppress(OSError):  # a full disk may be what failed
            (folder.path / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        raise
