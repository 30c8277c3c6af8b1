"""Time of the trust-region solver against a float64 bisection: `python -m tests.benchmarks.solver [--json]`.

One thread. Rows are heavy-tailed: the student's logits follow Student's t with 3 degrees of freedom, cut at 20, and so
does, halved, what the teacher adds to them. The implementations take turns, and the best of several repeats counts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.trust_region import blend, solve_beta

SHAPES = [(128, 17), (64, 4_096), (64, 32_768), (64, 151_936)]
EPSILON = 0.02
BISECTION_STEPS = 40
COLUMNS = ("V", "rows", "implementation", "ms", "speed", "over_budget", "least_used")


def bisection(student_logprobs: Tensor, teacher_logprobs: Tensor, epsilon: float) -> Tensor:
    """The textbook solution in float64: halve [0, 1], keep the feasible end. Buffers are used again and again."""
    student = student_logprobs.double()
    student -= torch.logsumexp(student, dim=-1, keepdim=True)
    tilt = teacher_logprobs.double()
    tilt -= torch.logsumexp(tilt, dim=-1, keepdim=True)
    tilt -= student
    path = torch.empty_like(student)

    def spent(beta: Tensor) -> Tensor:
        torch.addcmul(student, beta[:, None], tilt, out=path)
        log_normaliser = torch.logsumexp(path, dim=-1, keepdim=True)
        mean = path.sub_(log_normaliser).exp_().mul_(tilt).sum(-1)
        return beta * mean - log_normaliser[:, 0]

    low, high = torch.zeros(len(student), dtype=torch.float64), torch.ones(len(student), dtype=torch.float64)
    whole = spent(high) <= epsilon
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        feasible = spent(middle) <= epsilon
        low, high = torch.where(feasible, middle, low), torch.where(feasible, high, middle)
    return torch.where(whole, 1.0, low)


def heavy_tailed_rows(rows: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher, [rows, vocab] float32 log-probs."""
    torch.manual_seed(seed)
    noise = torch.distributions.StudentT(3.0)
    student = noise.sample((rows, vocab)).clamp(-20, 20)
    return student.log_softmax(-1), (student + 0.5 * noise.sample((rows, vocab)).clamp(-20, 20)).log_softmax(-1)


def budget_use(student: Tensor, teacher: Tensor, beta: Tensor, epsilon: float) -> tuple[float, float]:
    """Worst excess over the budget, relative, and least share used where 0 < beta < 1, both in float64 at beta."""
    shares = []
    for s, t, b in zip(student, teacher, beta.double(), strict=True):
        own, other = s.double().log_softmax(-1), t.double().log_softmax(-1)
        mu = ((1 - b) * own + b * other).log_softmax(-1)
        shares.append((mu.exp() * (mu - own)).sum() / epsilon)
    share = torch.stack(shares)
    inside = (beta > 0) & (beta < 1)
    return max(float(share.max()) - 1, 0.0), float(share[inside].min()) if bool(inside.any()) else 1.0


def timed(calls: dict[str, Callable[[], Any]], budget_s: float = 4.0) -> dict[str, float]:
    """Return the best time of each call in seconds; they take turns, forwards and backwards, from 3 to 50 times."""
    best = dict.fromkeys(calls, float("inf"))
    order, begun = list(calls), time.perf_counter()
    for turn in range(50):
        for name in order:
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], time.perf_counter() - start)
        order.reverse()
        if turn >= 2 and time.perf_counter() - begun > budget_s:
            break
    return best


def measure(rows: int, vocab: int) -> list[dict[str, Any]]:
    """Return one record for each implementation."""
    student, teacher = heavy_tailed_rows(rows, vocab, seed=vocab)
    solvers: dict[str, Callable[[], Tensor]] = {
        "solve_beta": lambda: solve_beta(student, teacher, EPSILON),
        "blend": lambda: blend(student, teacher, EPSILON).beta,
        "bisection": lambda: bisection(student, teacher, EPSILON),
    }
    seconds = timed({**solvers, "reading both": lambda: (student.sum(), teacher.sum())})
    records = []
    for name, best in seconds.items():
        record = {"V": vocab, "rows": rows, "implementation": name, "ms": best * 1e3}
        record["speed"] = seconds["bisection"] / best
        if name in solvers:
            use = budget_use(student, teacher, solvers[name](), EPSILON)
            record["over_budget"], record["least_used"] = use
        records.append(record)
    return records


def as_table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in records:
        use = (f"{r['over_budget']:.1e}", f"{r['least_used']:.6f}") if "over_budget" in r else ("", "")
        cells = (f"{r['V']:,}", str(r["rows"]), r["implementation"], f"{r['ms']:.2f}", f"{r['speed']:.1f}x", *use)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all shapes; with --json stdout holds one JSON list alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list of records")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    records = []
    for rows, vocab in SHAPES:
        print(f"{rows} rows of {vocab}", file=sys.stderr)
        records += measure(rows, vocab)
    print(json.dumps(records) if as_json else as_table(records))


if __name__ == "__main__":
    main()
