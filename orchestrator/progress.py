"""What a person sees while a run goes on: a live line in a terminal, plain lines in a log, a table at the end."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.evaluation import Estimate, Evaluation

_LINE_EVERY_S = 2.0
_COLUMNS = (
    ("pass rate", "reward/pass_rate", "{:.3f}"),
    ("KL", "loss/kl_to_teacher", "{:.3f}"),
    ("epsilon", "blend/epsilon", "{:.4f}"),
    ("beta", "blend/beta", "{:.3f}"),
    ("budget used", "blend/budget_used", "{:.0%}"),
    ("focal", "reward/focal_weight", "{:.2f}"),
    ("stale", "rollout/staleness", "{:.0f}"),
    ("tok/s", "time/tokens_per_s", "{:.0f}"),
)


class Progress:
    """Shows each step. In a terminal one line is redrawn; elsewhere a line is printed now and then."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._began: float | None = None
        self._steps_shown = 0
        self._last_line = -float("inf")

    def say(self, text: str) -> None:
        """Print one line, above the live one if there is one."""
        self._console.print(Text(text))

    def live(self) -> AbstractContextManager[object]:
        """Keep the live line on the screen while in this context."""
        return self._live if self._live is not None else nullcontext()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step that has just been taken."""
        now = time.monotonic()
        line = self._line(step, metrics)
        if self._live is not None:
            self._live.update(Text(line), refresh=True)
        elif now - self._last_line >= _LINE_EVERY_S or step + 1 == self._num_steps:
            self._last_line = now
            self.say(line)

    def table(self, before: Mapping[str, Estimate], after: Evaluation) -> None:
        """Print the evaluations before and after the run, side by side."""
        table = Table(
            title=f"{after.num_prompts} held-out prompts x {after.num_samples} samples, mean ± standard error",
            title_justify="left",
        )
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for name, estimate in after.estimates.items():
            table.add_row(name, str(before.get(name, "-")), str(estimate))
        self._console.print(table)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        shown = [f"{title} {form.format(metrics[key])}" for title, key, form in _COLUMNS if key in metrics]
        return " | ".join([f"step {step + 1}/{self._num_steps}", *shown, f"ETA {self._eta(step)}"])

    def _eta(self, step: int) -> str:
        """Time left at the pace of the steps since the first one shown."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return "-"
        self._steps_shown += 1
        seconds = round((now - self._began) / self._steps_shown * (self._num_steps - step - 1))
        return str(timedelta(seconds=seconds))
