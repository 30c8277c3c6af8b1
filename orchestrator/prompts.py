"""Prompts by index: the i-th prompt of a run follows from the recipe alone, so resuming needs only a position."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import AdditionData, CountdownData, DataSection, FileData
from orchestrator.errors import UserError
from orchestrator.faults import shown
from rewards import addition, countdown
from rewards.grade import Status
from rewards.graders import EXACT_CHECKERS
from rewards.problem import Problem, is_held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt before the tokenizer: chat messages, or plain text where `messages` is empty."""

    prompt_id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    task: str
    reference: str
    source: str = ""
    """Where it came from, for messages to the user."""


class PromptSource(Protocol):
    """Training prompts without end, and held-out ones."""

    def training(self, start: int, count: int) -> list[PromptText]:
        """Return the training prompts with indices start … start + count - 1."""

    def held_out(self, count: int) -> list[PromptText]:
        """Return up to `count` prompts that are never trained on; the same ones every time."""

    def everything(self) -> Iterator[PromptText]:
        """The prompts that can be checked before a run; none for generated ones."""


def build_source(section: DataSection, seed: int) -> PromptSource:
    """Return the source that the recipe names.

    Raises:
        UserError: if a prompt file cannot be read; names the file and the line.
    """
    if isinstance(section, FileData):
        return FilePrompts(section, seed)
    return GeneratedPrompts(section, seed)


class GeneratedPrompts:
    """Problems drawn from (seed, index); whether one is held out follows from its text."""

    def __init__(self, section: AdditionData | CountdownData, seed: int) -> None:
        self._section, self._seed = section, seed

    def training(self, start: int, count: int) -> list[PromptText]:
        """Return the training prompts with those indices."""
        return [self._draw("train", index, held_out=False) for index in range(start, start + count)]

    def held_out(self, count: int) -> list[PromptText]:
        """Return that many held-out prompts, all different."""
        found: dict[str, PromptText] = {}
        for index in range(100 * count):
            prompt = self._draw("held-out", index, held_out=True)
            found.setdefault(prompt.messages[0].content, prompt)
            if len(found) == count:
                break
        return list(found.values())

    def everything(self) -> Iterator[PromptText]:
        """Generated prompts need no check."""
        return iter(())

    def _draw(self, split: str, index: int, *, held_out: bool) -> PromptText:
        task = self._section.type
        rng = random.Random(f"{self._seed}/{task}/{split}/{index}")
        problem = next(p for p in (self._problem(rng) for _ in count()) if is_held_out(p.prompt) == held_out)
        return PromptText(
            prompt_id=f"{task}-{split}-{index}",
            messages=(Message(role="user", content=problem.prompt),),
            task=task,
            reference=problem.reference,
        )

    def _problem(self, rng: random.Random) -> Problem:
        if isinstance(self._section, AdditionData):
            return addition.make_problem(rng, self._section.max_digits)
        return countdown.make_problem(rng)


class FilePrompts:
    """Rows of JSONL or Parquet files, in an order of their own in each epoch."""

    def __init__(self, section: FileData, seed: int) -> None:
        self._section, self._seed = section, seed
        self._rows = read_prompts("data.path", section.path, section)
        held_out = section.held_out_path
        self._held_out = read_prompts("data.held_out_path", held_out, section) if held_out is not None else []
        self._epoch, self._rows_in_order = -1, list[int]()

    def training(self, start: int, count: int) -> list[PromptText]:
        """Return the training prompts with those indices; the file begins anew when it is used up."""
        return [self._at(*divmod(index, len(self._rows))) for index in range(start, start + count)]

    def held_out(self, count: int) -> list[PromptText]:
        """Return the first rows of the held-out file."""
        return self._held_out[:count]

    def everything(self) -> Iterator[PromptText]:
        """Every row of both files."""
        yield from self._rows
        yield from self._held_out

    def _at(self, epoch: int, position: int) -> PromptText:
        row = self._rows[self._order(epoch)[position]]
        return PromptText(
            prompt_id=f"{row.prompt_id}/{epoch}",
            messages=row.messages,
            text=row.text,
            task=row.task,
            reference=row.reference,
            source=row.source,
        )

    def _order(self, epoch: int) -> Sequence[int]:
        """The rows of an epoch; the last epoch's are kept, since one after the other is asked for."""
        if epoch != self._epoch:
            self._epoch, self._rows_in_order = epoch, list(range(len(self._rows)))
            if self._section.shuffle:
                random.Random(f"{self._seed}/order/{epoch}").shuffle(self._rows_in_order)
        return self._rows_in_order


def read_prompts(setting: str, path: str, section: FileData) -> list[PromptText]:
    """Read a whole prompt file; `setting` is how an error names it.

    Raises:
        UserError: if it is missing, unreadable, empty, or a row is not of the form that `FileData` says.
    """
    file = Path(path)
    if file.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{setting} must name a .jsonl or .parquet file, got {path!r}")
    try:
        rows = list(_parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file))
    except OSError as error:
        came = (error.strerror or str(error)).splitlines()[0]
        raise UserError(f"{setting} must be a readable file, got {path!r}: {came}") from None
    if not rows:
        raise UserError(f"{setting} must hold at least one prompt, got none in {path!r}")
    prompts: dict[str, PromptText] = {}
    for index, (where, row) in enumerate(rows):
        prompt = _prompt(row, where, index, section)
        # Random draws and pass@k go by the id, so two prompts of one id would be taken for one.
        first = prompts.setdefault(prompt.prompt_id, prompt)
        if first is not prompt:
            raise UserError(f"{where}: `id` must differ from every other, got {shown(prompt.prompt_id)}, as in "
                            f"{first.source}; without `id` a prompt's is its number, from 0")  # fmt: skip
    return list(prompts.values())


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: a prompt must be one JSON object per line, got: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            # Other columns may be large, or hold what Python has no value for.
            for batch in table.iter_batches(columns=["id", "prompt", "messages", "reference"]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{file}: must be a whole Parquet file, got: {str(error).splitlines()[0]}") from None


def _prompt(row: Any, where: str, index: int, section: FileData) -> PromptText:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a prompt must be an object, got {type(row).__name__}")
    text, messages, reference = row.get("prompt"), row.get("messages"), row.get("reference")
    if not isinstance(reference, str) or not reference:
        raise UserError(f"{where}: `reference` must be a non-empty string, got {shown(reference)}")
    checker = EXACT_CHECKERS.get(section.task)
    if checker is not None and (grade := checker("", reference)).status is Status.REFUSED:
        raise UserError(f"{where}: {grade.detail}, got {shown(reference)}")
    if (text is None) == (messages is None):
        came = "both" if text is not None else "neither"
        raise UserError(f"{where}: exactly one of `prompt` and `messages` must be given, got {came}")
    if messages is None:
        if not isinstance(text, str) or not text:
            raise UserError(f"{where}: `prompt` must be a non-empty string, got {shown(text)}")
        messages = [{"role": "user", "content": text}] if section.system_prompt else []
    elif not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list of at least one message, got {shown(messages)}")
    turns = [_message(turn, where) for turn in messages]
    if section.system_prompt:
        turns.insert(0, Message(role="system", content=section.system_prompt))
    prompt_id = row.get("id")
    if prompt_id is not None and (isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int)):
        raise UserError(f"{where}: `id` must be a string or a whole number, got {shown(prompt_id)}")
    _check_unicode(where, str(prompt_id), text or "", reference, *(turn.content for turn in turns))
    return PromptText(
        prompt_id=str(index if prompt_id is None else prompt_id),
        messages=tuple(turns),
        text=text or "",
        task=section.task,
        reference=reference,
        source=where,
    )


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
        return Message(role=turn["role"], content=turn["content"])
    raise UserError(f"{where}: each of `messages` must have a `role` and a `content`, both strings, got {shown(turn)}")


def _check_unicode(where: str, *texts: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: text must be valid Unicode, got half a surrogate pair: {error.reason}") from None
