"""Whether our losses are those of TRL and verl: `python -m tests.benchmarks.parity [--json]`.

The same random tensors go through their own functions and ours: advantages, losses, and the gradients of the losses to
the logits, in float64 where the peer's code keeps it. `difference` is the largest over the peer's largest number. The
exit status is 1 if one is above its `bound`. TRL's policy losses are called on a stand-in for the trainer that holds
what they read; its advantages come from a real trainer.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.advantages import group_advantages
from learner.aggregation import token_weights
from learner.config import PolicyGradientObjective
from learner.distillation import FullDistillation
from learner.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from learner.laws import Laws
from learner.losses import Loss, Tokens
from learner.policy_losses import ReferenceKL, build_policy_loss
from tests.benchmarks.peers import Worker, load_arrays, save_arrays
from tests.benchmarks.step import make_model

NUM_GROUPS, GROUP_SIZE, LENGTH, VOCAB = 6, 8, 12, 23
SETTINGS = {
    "group_size": GROUP_SIZE, "clip_low": 0.2, "clip_high": 0.28, "gspo_low": 3e-4, "gspo_high": 4e-4,
    "cispo_cap": 1.5, "kl_coef": 0.04,
}  # fmt: skip
DOUBLE, SINGLE = 1e-6, 1e-5
COLUMNS = ("quantity", "peer", "loss or value", "gradient", "bound", "note")
NOTES = {
    "trl/grpo/advantage": "std_ddof 1, tiny 1e-4; TRL computes in float32",
    "trl/dr_grpo/advantage": "TRL computes in float32",
    "trl/rloo/advantage": "TRL computes in float32",
    "verl/grpo/advantage": "std_ddof 1, tiny 1e-6",
    "trl/cispo": "TRL's epsilon_high is the cap itself, ours is 1 + clip_high; neither has a lower bound here",
    "trl/gspo": "TRL's sequence form, our token form",
    "trl/rloo on-policy": "TRL's ratio is that of the whole rollout: where the policy is the sampler the gradient is "
    "the same (fixed aggregation over 1 token); the values differ by design and are not compared",
    "verl/grpo": "dual clip off; verl adds 1e-8 to a rollout's length",
    "verl/dr_grpo": "dual clip off",
    "verl/dapo": "dual clip off",
    "verl/rloo": "dual clip off",
    "verl/gspo": "verl adds 1e-8 to a rollout's length",
    "trl chunked/jsd 0": "TRL computes in float32",
    "trl chunked/jsd 0.5": "TRL computes in float32",
    "trl chunked/jsd 1": "TRL computes in float32",
    "verl/jsd 0": "top-k of the whole vocabulary; verl sums in float32",
}


def problem() -> dict[str, Tensor]:
    """Return rollouts of different lengths whose sampler is not the policy, and one group of equal rewards."""
    generator = torch.Generator().manual_seed(0)
    num_rollouts = NUM_GROUPS * GROUP_SIZE

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = 2 * noise(num_rollouts, LENGTH, VOCAB)
    ids = torch.randint(VOCAB, (num_rollouts, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (num_rollouts, 1), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    rewards = noise(NUM_GROUPS, GROUP_SIZE)
    rewards[0] = 1.0
    rewards[1] = (rewards[1] > 0).double()
    return {
        "logits": logits,
        "ids": ids,
        "mask": (torch.arange(LENGTH) < lengths).long(),
        "old": logprobs + 0.3 * noise(*logprobs.shape),
        "reference": logprobs + 0.3 * noise(*logprobs.shape),
        "rewards": rewards,
        "advantages": group_advantages(rewards, method="grpo", focal_gamma=0.0).flatten(),
        "flat_logits": 2 * noise(num_rollouts, VOCAB),
        "teacher_logits": 2 * noise(num_rollouts, VOCAB),
    }


def policy_loss(
    inputs: Mapping[str, Tensor], loss: Loss, *, aggregation: str, aggregation_tokens: int = LENGTH, old: Tensor
) -> tuple[Tensor, Tensor]:
    """Return one of our losses of the whole batch and its gradient to the logits [R, T, V]."""
    mask = inputs["mask"].bool()
    lengths = mask.sum(1)
    weights = token_weights(
        lengths.numpy(), np.ones(len(mask), bool), method=aggregation, aggregation_tokens=aggregation_tokens
    )
    rollouts = torch.arange(len(mask)).repeat_interleave(lengths)
    logits = inputs["logits"].clone().requires_grad_()
    logprobs = logits.detach().log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    tokens = Tokens(
        token_ids=inputs["ids"][mask], weights=torch.from_numpy(weights)[rollouts], rollouts=rollouts,
        behaviour_logprobs=old[mask], advantages=inputs["advantages"][rollouts],
        sequence_log_ratios=((logprobs - old) * mask).sum(1)[rollouts], sequence_lengths=lengths[rollouts],
        reference_logprobs=inputs["reference"][mask],
    )  # fmt: skip
    total = (loss(Laws(logits[mask]), tokens).per_token * tokens.weights).sum()
    return total.detach(), torch.autograd.grad(total, logits)[0]


def divergence(inputs: Mapping[str, Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """Return our mean divergence on the whole vocabulary and its gradient to the logits."""
    ends: dict[float, Divergence] = {0.0: ForwardKL(), 1.0: ReverseKL()}
    loss = FullDistillation(divergence=ends.get(beta) or JensenShannon(jsd_beta=beta), teacher_logprob_floor=-1e4)
    logits = inputs["flat_logits"].clone().requires_grad_()
    n = len(logits)
    tokens = Tokens(
        token_ids=torch.zeros(n, dtype=torch.int64), weights=torch.full((n,), 1 / n, dtype=torch.float64),
        rollouts=torch.arange(n), behaviour_logprobs=torch.zeros(n), advantages=torch.zeros(n),
        support_ids=torch.arange(VOCAB).expand(n, VOCAB).contiguous(),
        support_teacher_logprobs=inputs["teacher_logits"].log_softmax(-1),
    )  # fmt: skip
    total = (loss(Laws(logits), tokens).per_token * tokens.weights).sum()
    return total.detach(), torch.autograd.grad(total, logits)[0]


def objective(method: str, **changes: Any) -> Loss:
    """Return a policy loss as a recipe would build it."""
    bounds = {"clip_low": SETTINGS["clip_low"], "clip_high": SETTINGS["clip_high"]}
    return build_policy_loss(PolicyGradientObjective.model_validate({"method": method, **bounds, **changes}))


def ours(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same quantities as the peers', with each peer's conventions."""
    s, old = SETTINGS, inputs["old"]
    cispo = objective("cispo", clip_low=1.0, clip_high=s["cispo_cap"] - 1)
    gspo = objective("gspo", clip_low=s["gspo_low"], clip_high=s["gspo_high"])
    logprobs = inputs["logits"].log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    pairs = {
        "grpo": policy_loss(inputs, objective("grpo"), aggregation="sequence_mean", old=old),
        "grpo with kl_coef": policy_loss(
            inputs, objective("grpo", kl_coef=s["kl_coef"]), aggregation="sequence_mean", old=old
        ),
        "dr_grpo": policy_loss(inputs, objective("dr_grpo"), aggregation="fixed", old=old),
        "dapo": policy_loss(inputs, objective("dapo"), aggregation="token_mean", old=old),
        "rloo": policy_loss(inputs, objective("rloo"), aggregation="token_mean", old=old),
        "rloo on-policy": policy_loss(
            inputs, objective("rloo"), aggregation="fixed", aggregation_tokens=1, old=logprobs
        ),
        "cispo": policy_loss(inputs, cispo, aggregation="token_mean", old=old),
        "gspo": policy_loss(inputs, gspo, aggregation="sequence_mean", old=old),
        **{f"jsd {beta:g}": divergence(inputs, beta) for beta in (0.0, 0.5, 1.0)},
    }
    found = {f"{peer}/{name}/loss": loss for name, (loss, _) in pairs.items() for peer in PEERS}
    found |= {f"{peer}/{name}/gradient": gradient for name, (_, gradient) in pairs.items() for peer in PEERS}
    flat = Tokens(
        token_ids=inputs["ids"].flatten(), weights=torch.ones(old.numel()), rollouts=torch.zeros(old.numel()),
        behaviour_logprobs=old.flatten(), advantages=torch.zeros(old.numel()),
        reference_logprobs=inputs["reference"].flatten(),
    )  # fmt: skip
    k3 = ReferenceKL()(Laws(inputs["logits"].flatten(0, 1)), flat).per_token.reshape(old.shape)
    found["verl/k3/value"] = k3
    for peer, tiny in {"trl": 1e-4, "verl": 1e-6}.items():
        for method in ("grpo", "dr_grpo", "rloo"):
            made = group_advantages(inputs["rewards"], method=method, focal_gamma=0.0, std_ddof=1, tiny=tiny)
            found[f"{peer}/{method}/advantage"] = made
    return found


PEERS = ("trl", "verl", "trl gkd", "trl chunked")


def compare(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return a row for each quantity and peer."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in theirs.items():
        peer, quantity, part = key.split("/")
        name = f"{peer}/{quantity}" if part in ("loss", "gradient") else key
        note = NOTES.get(name, "")
        row = rows.setdefault(
            name, {"quantity": quantity if part in ("loss", "gradient") else f"{quantity} {part}", "peer": peer,
                   "value": None, "gradient": None, "bound": SINGLE if "float32" in note else DOUBLE, "note": note}
        )  # fmt: skip
        if name == "trl/rloo on-policy" and part == "loss":
            continue
        row["gradient" if part == "gradient" else "value"] = float(
            (ours[key].double() - value.double()).abs().max() / value.double().abs().max()
        )
    return list(rows.values())


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        figures = ("" if r[name] is None else f"{r[name]:.0e}" for name in ("value", "gradient", "bound"))
        lines.append("| " + " | ".join((r["quantity"], r["peer"], *figures, r["note"])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compare all; with --json stdout holds one JSON list alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inputs = problem()
    with (
        redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory(prefix="parity") as name,
        Worker("parity", ("trl",), peer=True) as worker,
    ):
        folder = Path(name)
        model = make_model(folder / "model", 64, hidden_size=32, num_hidden_layers=1, seed=0)
        save_arrays(folder / "inputs.npz", inputs)
        files = {"inputs": str(folder / "inputs.npz"), "outputs": str(folder / "outputs.npz")}
        worker.ask({**SETTINGS, **files, "model": model, "scratch": str(folder / "scratch")})
        theirs = {key.replace("|", "/"): value for key, value in load_arrays(folder / "outputs.npz").items()}
    rows = compare(theirs, ours(inputs))
    print(json.dumps(rows) if options.json else as_table(rows))
    figures = [(row[name], row["bound"]) for row in rows for name in ("value", "gradient") if row[name] is not None]
    if not all(difference <= bound for difference, bound in figures):
        sys.exit("parity: a difference is above its bound (see the table).")


if __name__ == "__main__":
    main()
