"""What TRL's and verl's own code makes of given tensors; runs in the peers' environment.

Settings: inputs and outputs (.npz files), model (a tiny model's folder), scratch (a folder), group_size, clip_low,
clip_high, gspo_low, gspo_high, cispo_cap, kl_coef. TRL's policy losses are methods of its trainers: they are called on
a stand-in that holds the attributes they read and hands them the log-probs. Its advantages are made within a whole
rollout, so a real trainer makes one of the tiny model, with the given rewards.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import serve
from torch import Tensor

Results = dict[str, Tensor]


def trl_loss(inputs: Results, settings: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of GRPOTrainer and its gradient to the logits."""
    from trl import GRPOTrainer

    logits = inputs["logits"].clone().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="token", beta=0.0, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        epsilon_low=settings["clip_low"], epsilon_high=settings["clip_high"], model=torch.nn.Identity(),
        max_completion_length=logprobs.shape[1], accelerator=Alone(), _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    vars(trainer).update(changes)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, trl_inputs(inputs))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def trl_rloo_loss(inputs: Results) -> tuple[Tensor, Tensor]:
    """Return the loss of RLOOTrainer where the policy is the one that sampled, and its gradient to the logits."""
    from trl import RLOOTrainer

    logits = inputs["logits"].clone().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, model=torch.nn.Identity(), accelerator=Alone(),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    old = (logprobs.detach() * inputs["mask"]).sum(1)
    loss = RLOOTrainer._compute_loss(trainer, trainer.model, {**trl_inputs(inputs), "old_logps": old})
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


class Alone:
    """An accelerator of one process."""

    num_processes = 1

    def gather(self, values: Tensor) -> Tensor:
        """Return what one process has."""
        return values

    def reduce(self, values: Tensor, **_: Any) -> Tensor:
        """Return what one process has."""
        return values


def trl_inputs(inputs: Results) -> dict[str, Tensor]:
    """Return a batch as TRL's trainers name it."""
    ids, mask = inputs["ids"], inputs["mask"]
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": mask, "advantages": inputs["advantages"], "old_per_token_logps": inputs["old"],
        "ref_per_token_logps": inputs["reference"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def trl_advantages(kind: str, inputs: Results, settings: Any, **changes: Any) -> Tensor:
    """Return the advantages that a real trainer gives rollouts of the tiny model with the given rewards."""
    import trl
    from datasets import Dataset

    rewards, group_size = inputs["rewards"].flatten().tolist(), settings["group_size"]
    dataset = Dataset.from_list([{"prompt": f"{i}+1:"} for i in range(len(rewards) // group_size)])
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=settings["scratch"], use_cpu=True, bf16=False, report_to="none", num_generations=group_size,
        per_device_train_batch_size=len(rewards), max_completion_length=2, beta=0.0, **changes,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=settings["model"], reward_funcs=lambda completions, **_: rewards, train_dataset=dataset, args=arguments
    )
    rows = [row for row in dataset for _ in range(group_size)]
    made = trainer._generate_and_score_completions(rows)
    return made["advantages"].reshape(-1, group_size)


def verl_loss(name: str, inputs: Results, *, mode: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return a policy loss of verl and its gradient to the logits; dual clipping is set beyond every ratio."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=1e9
    )
    logits = inputs["logits"].clone().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    advantages = inputs["advantages"][:, None] * inputs["mask"]
    function = getattr(core_algos, f"compute_policy_loss_{name}")
    loss = function(inputs["old"], logprobs, advantages, inputs["mask"], loss_agg_mode=mode, config=config)[0]
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def verl_advantages(name: str, inputs: Results, **options: Any) -> Tensor:
    """Return verl's advantages of the rewards, [P, G]."""
    from verl.trainer.ppo import core_algos

    rewards = inputs["rewards"]
    groups = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    scores, mask = rewards.flatten()[:, None], torch.ones(rewards.numel(), 1, dtype=rewards.dtype)
    made = getattr(core_algos, f"compute_{name}_outcome_advantage")(scores.clone(), mask, groups, **options)[0]
    return made.reshape(rewards.shape)


def trl_jsd(inputs: Results, beta: float) -> tuple[Tensor, Tensor]:
    """Return the mean divergence of GKDTrainer and its gradient to the student's logits."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits = inputs["flat_logits"].clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(logits, inputs["teacher_logits"], beta=beta)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def trl_chunked(inputs: Results, beta: float) -> tuple[Tensor, Tensor]:
    """Return the same of DistillationTrainer: the logits are the hidden states, the output heads unit matrices."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    logits = inputs["flat_logits"].clone().requires_grad_()
    unit, mask = torch.eye(logits.shape[1], dtype=logits.dtype), torch.ones(1, len(logits))
    loss = _chunked_divergence_loss(logits[None], inputs["teacher_logits"][None], unit, unit, mask, beta)[0]
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def verl_top_k(inputs: Results) -> tuple[Tensor, Tensor]:
    """Return verl's forward KL with the whole vocabulary as the likeliest ids."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk

    logits = inputs["flat_logits"].clone().requires_grad_()
    teacher = inputs["teacher_logits"].log_softmax(-1)
    ids = torch.arange(logits.shape[1]).expand(logits.shape)
    nested = [torch.nested.as_nested_tensor([each.contiguous()], layout=torch.jagged) for each in (teacher, ids)]
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
    loss = compute_forward_kl_topk(logits[None], *nested, config, "thd")["distillation_losses"].mean()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def results(inputs: Results, settings: Any) -> Results:
    """Return all values and gradients by peer and quantity."""
    from verl.trainer.ppo.core_algos import kl_penalty_forward

    s, sequences = settings, {"importance_sampling_level": "sequence"}
    bounds = {"low": s["clip_low"], "high": s["clip_high"]}
    gspo = {"epsilon_low": s["gspo_low"], "epsilon_high": s["gspo_high"]}
    pairs = {
        "trl/grpo": trl_loss(inputs, s, loss_type="grpo"),
        "trl/grpo with kl_coef": trl_loss(inputs, s, loss_type="grpo", beta=s["kl_coef"]),
        "trl/dr_grpo": trl_loss(inputs, s, loss_type="dr_grpo"),
        "trl/dapo": trl_loss(inputs, s, loss_type="dapo"),
        "trl/cispo": trl_loss(inputs, s, loss_type="cispo", epsilon_high=s["cispo_cap"]),
        "trl/gspo": trl_loss(inputs, s, loss_type="grpo", **sequences, **gspo),
        "trl/rloo on-policy": trl_rloo_loss(inputs),
        "verl/grpo": verl_loss("vanilla", inputs, mode="seq-mean-token-mean", **bounds),
        "verl/dr_grpo": verl_loss("vanilla", inputs, mode="seq-mean-token-sum-norm", **bounds),
        "verl/dapo": verl_loss("vanilla", inputs, mode="token-mean", **bounds),
        "verl/rloo": verl_loss("vanilla", inputs, mode="token-mean", **bounds),
        "verl/cispo": verl_loss("cispo", inputs, mode="token-mean", low=1.0, high=s["cispo_cap"] - 1),
        "verl/gspo": verl_loss("gspo", inputs, mode="seq-mean-token-mean", low=s["gspo_low"], high=s["gspo_high"]),
        **{f"trl gkd/jsd {beta:g}": trl_jsd(inputs, beta) for beta in (0.0, 0.5, 1.0)},
        **{f"trl chunked/jsd {beta:g}": trl_chunked(inputs, beta) for beta in (0.0, 0.5, 1.0)},
        "verl/jsd 0": verl_top_k(inputs),
    }
    found = {f"{name}/loss": loss for name, (loss, _) in pairs.items()}
    found |= {f"{name}/gradient": gradient for name, (_, gradient) in pairs.items()}
    logprobs = inputs["logits"].log_softmax(-1).gather(-1, inputs["ids"][..., None])[..., 0]
    return {
        **found,
        "verl/k3/value": kl_penalty_forward(logprobs, inputs["reference"], "k3"),
        "trl/grpo/advantage": trl_advantages("GRPO", inputs, s),
        "trl/dr_grpo/advantage": trl_advantages("GRPO", inputs, s, scale_rewards="none"),
        "trl/rloo/advantage": trl_advantages("RLOO", inputs, s),
        "verl/grpo/advantage": verl_advantages("grpo", inputs),
        "verl/dr_grpo/advantage": verl_advantages("grpo", inputs, norm_adv_by_std_in_grpo=False),
        "verl/rloo/advantage": verl_advantages("rloo", inputs),
    }


def run(settings: Any) -> Any:
    """Read the inputs and write the outputs."""
    torch.set_num_threads(1)
    with np.load(settings["inputs"]) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    found = results(inputs, settings)
    np.savez(settings["outputs"], **{name.replace("/", "|"): value.numpy() for name, value in found.items()})
    return {}


if __name__ == "__main__":
    serve(run)
