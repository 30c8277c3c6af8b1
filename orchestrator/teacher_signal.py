"""Which form of the teacher's law travels to the learner, and what that costs for each token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from learner.config import DistillationSection
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from actors.teacher_signal import SignalSpec

Kind = Literal["support", "sampled", "full", "hidden"]
Kept = int | Literal["full"]
"""`rollouts.support_size`."""

_ID_BYTES = _LOGPROB_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalPlan:
    """The signal of a run."""

    kind: Kind
    """`auto` is decided."""
    support: Literal["student", "teacher", "union"]
    """Of the signal `support`, whose likeliest ids."""
    support_size: int
    """Of the signal `support`, K of each of them."""
    bytes_per_token: int
    """Of the teacher's part of a token as Arrow, without the offsets of its lists (4 or 8 a column)."""
    line: str
    """Says so to the user."""


def plan(
    section: DistillationSection,
    *,
    vocab_size: int,
    hidden_size: int,
    hidden_bytes: Literal[2, 4],
    blend_support_size: Kept,
    engine_type: Literal["torch", "vllm"],
) -> SignalPlan:
    """Decide what travels: `auto` is whichever exact signal is cheaper, or the support where neither is allowed.

    Args:
        section: what the recipe says of the signal.
        vocab_size: V, of the teacher.
        hidden_size: H, of the teacher.
        hidden_bytes: of one number of a hidden state: 4 for float32, 2 for bfloat16.
        blend_support_size: `rollouts.support_size`.
        engine_type: whether the teacher's engine tells more than log-probs at given ids, as torch does.

    Raises:
        UserError: if the signal takes more bytes than the recipe allows, or the engine cannot give it.
    """
    bytes_of = _bytes_of(section, vocab_size=vocab_size, hidden_size=hidden_size, hidden_bytes=hidden_bytes)
    limit = section.max_bytes_per_token
    impossible = _impossible(section, blend_support_size) if engine_type == "vllm" else {}
    exact: tuple[Kind, ...] = ("hidden", "full")
    allowed = [name for name in exact if name not in impossible and (limit is None or bytes_of[name] <= limit)]
    cheapest: Kind = min(allowed, key=bytes_of.__getitem__) if allowed else "support"
    kind: Kind = cheapest if section.signal == "auto" else section.signal
    if kind in impossible:
        raise UserError(impossible[kind])
    if limit is not None and bytes_of[kind] > limit:
        raise UserError(
            f"max_bytes_per_token must be at least {bytes_of[kind]} for the signal {_named(kind, section)}, got "
            f"{limit}; raise it, or choose another signal ({_listed(bytes_of, section)}) in the distillation section"
        )
    others = {name: size for name, size in bytes_of.items() if name != kind}
    line = (
        f"teacher signal: {_named(kind, section)}, {bytes_of[kind]} B/token{_exactness(kind)} "
        f"({_listed(others, section)}); limit {'none' if limit is None else f'{limit} B'}"
    )
    return SignalPlan(
        kind=kind, support=section.support, support_size=section.support_size, bytes_per_token=bytes_of[kind], line=line
    )


def signal_spec(section: DistillationSection | None, blend_support_size: Kept) -> "SignalSpec":
    """Return what samplers are told of a section whose `auto` is decided; without one, what rollouts have anyway."""
    # Imported here: it takes seconds, and a recipe is checked without it.
    from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec

    if section is None:
        return STUDENTS_SUPPORT
    assert section.signal != "auto", "auto is decided before samplers are built"
    if section.signal != "support":
        return SignalSpec(kind=section.signal)
    has_it_all = section.support == "student" and section.support_size == blend_support_size
    return SignalSpec(support=section.support, support_size=None if has_it_all else section.support_size)


def _bytes_of(section: DistillationSection, *, vocab_size: int, hidden_size: int, hidden_bytes: int) -> dict[Kind, int]:
    """Bytes of each signal for one token. The ids of a whole vocabulary, and the drawn one, need not be told."""
    size = min(vocab_size, section.support_size)
    num_ids = min(vocab_size, 2 * size) if section.support == "union" else size
    return {
        "hidden": hidden_size * hidden_bytes,
        "full": vocab_size * _LOGPROB_BYTES,
        "support": num_ids * (_ID_BYTES + _LOGPROB_BYTES) + _LOGPROB_BYTES,
        "sampled": _LOGPROB_BYTES,
    }


def _impossible(section: DistillationSection, blend_support_size: Kept) -> dict[Kind, str]:
    """What an engine cannot give that only tells log-probs at the student's ids, and why."""
    reason = "engine must be torch where the teacher's signal is {}, got vllm; change either one"
    cannot: dict[Kind, str] = {"hidden": reason.format("hidden")}
    if blend_support_size != "full":
        cannot["full"] = (
            f"rollouts.support_size must be full where the teacher's signal is full and the engine vllm, got "
            f"{blend_support_size}"
        )
    if section.support != "student":
        cannot["support"] = reason.format(f"the support {section.support}")
    return cannot


def _named(kind: Kind, section: DistillationSection) -> str:
    if kind != "support":
        return kind
    whose = {"student": "the student's", "teacher": "the teacher's", "union": "both models'"}[section.support]
    return f"support of {whose} {section.support_size} ids"


def _exactness(kind: Kind) -> str:
    return " exact" if kind in ("hidden", "full") else ""


def _listed(bytes_of: dict[Kind, int], section: DistillationSection) -> str:
    return ", ".join(f"{_named(kind, section)} {size}" for kind, size in bytes_of.items())
