"""Time and memory of full-vocabulary distillation losses: `python -m tests.benchmarks.losses [--json] [--quick]`.

From last hidden states [T, 256] and output heads [V, 256] of student and teacher, float32, to the gradients of the
student's. beta is TRL's: 1 the reverse KL, 0 the forward KL, between them the generalised JSD. Each figure is that of a
process of its own (a fork of one that has only imported the library) with one thread; the implementations take turns,
the order alternates, and of the repeats the best time and the highest memory count. `extra_mib` is the peak of resident
memory (VmHWM) over what was resident before: models and hidden states are not in it, gradients are. `max_grad_error` is
the largest difference of a gradient (hidden states, weight) to float64 autograd of the plain formula, over its largest
number; all tokens enter.

verl has no loss on the whole vocabulary: `verl top-k` is its forward KL on the teacher's 64 likeliest ids, with those
ids and their log-probs given, and so another loss, compared with float64 of its own formula.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import Worker

VOCABS = (4_096, 32_768, 151_936)
NUM_TOKENS = (1_024, 512, 2_048)
OTHER_BETAS_AT = 1_024
REPEATS = 2
LIMIT_GIB = 9.0
"""A process that is expected to take more is left out."""
COPIES = {"plain": (6, 10), "trl gkd": (9, 16)}
"""How many [T, V] float32 tensors an implementation holds, with beta 0 or 1, and between."""
IMPLEMENTATIONS = ("tutelage", "plain", "trl chunked", "trl gkd", "verl top-k")
OURS = ("tutelage", "plain")
OUR_MODULES = ("learner.distillation", "learner.tiles")
PEER_MODULES = (
    "trl.trainer.distillation_trainer",
    "trl.experimental.gkd.gkd_trainer",
    "verl.trainer.distillation.fsdp.losses",
)
COLUMNS = ("implementation", "T", "V", "beta", "cpu_s", "extra_mib", "max_grad_error")


def shapes(*, quick: bool) -> Iterator[tuple[int, int, float]]:
    """Yield T, V and beta: beta 1 everywhere, the others at one T."""
    if quick:
        yield from ((512, 4_096, beta) for beta in (1.0, 0.0, 0.5))
        return
    for num_tokens in NUM_TOKENS:
        for vocab in VOCABS:
            for beta in (1.0, 0.0, 0.5) if num_tokens == OTHER_BETAS_AT else (1.0,):
                yield num_tokens, vocab, beta


def entrants(num_tokens: int, vocab: int, beta: float) -> list[str]:
    """Return the implementations that have this loss and fit the memory."""
    names = []
    for name in IMPLEMENTATIONS:
        if name == "verl top-k" and beta != 0:
            continue
        copies = COPIES.get(name, (0, 0))[0 < beta < 1]
        gib = copies * num_tokens * vocab * 4 / 2**30
        if gib > LIMIT_GIB:
            print(f"left out: {name} T {num_tokens} V {vocab} beta {beta}, about {gib:.0f} GiB", file=sys.stderr)
            continue
        names.append(name)
    return names


def measure(
    num_tokens: int, vocab: int, beta: float, folder: Path, workers: Mapping[bool, Worker]
) -> list[dict[str, Any]]:
    """Return a row for each implementation; `workers` are this environment's (True) and the peers'."""
    names = entrants(num_tokens, vocab, beta)
    common = {"tokens": num_tokens, "vocab": vocab, "beta": beta}
    references = {name: folder / f"{'top-k' if name == 'verl top-k' else 'full'}.npz" for name in names}
    for path in set(references.values()):
        workers[True].ask({**common, "implementation": f"reference {path.stem}", "reference": str(path)})
    best: dict[str, dict[str, Any]] = {}
    for repeat in range(REPEATS):
        for name in names if repeat % 2 == 0 else names[::-1]:
            reference = str(references[name]) if repeat == 0 else None
            found = workers[name in OURS].ask({**common, "implementation": name, "reference": reference})
            row = best.setdefault(name, found)
            row["cpu_s"] = min(row["cpu_s"], found["cpu_s"])
            row["extra_mib"] = max(row["extra_mib"], found["extra_mib"])
    return [{"implementation": name, "T": num_tokens, "V": vocab, "beta": beta, **best[name]} for name in names]


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        figures = (f"{r['cpu_s']:.2f}", f"{r['extra_mib']:,.0f}", f"{r['max_grad_error']:.0e}")
        lines.append(
            "| " + " | ".join((r["implementation"], str(r["T"]), f"{r['V']:,}", f"{r['beta']:g}", *figures)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all shapes; with --json stdout holds one JSON list alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="losses") as folder,
        Worker("distillation", OUR_MODULES, peer=False) as ours,
        Worker("distillation", PEER_MODULES, peer=True) as peers,
    ):
        workers = {True: ours, False: peers}
        for num_tokens, vocab, beta in shapes(quick=options.quick):
            found = measure(num_tokens, vocab, beta, Path(folder), workers)
            print("\n".join(as_table(found).splitlines()[2:]), file=sys.stderr)
            rows += found
    print(json.dumps(rows) if options.json else as_table(rows))


if __name__ == "__main__":
    main()
