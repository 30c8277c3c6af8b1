"""Laws that can be enumerated: random models of 8 tokens, every short sequence with its probability in float64."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.trust_region import blend

VOCABULARY, STOP = 8, 2
PROMPT = (1, 5, 3, 7)
NUM_TOKENS = 4
FALSE_ALARM = 6.0
"""Standard deviations: a false-alarm rate of 1e-9 for each comparison."""

NextLaw = Callable[[Tensor], Tensor]
"""Prompts and what follows them [M, length] -> log-probs of the next token [M, V], float64."""


def make_model(folder: Path, *, seed: int, hidden_size: int, tied: bool, scale: float) -> Qwen3ForCausalLM:
    """Save a random model in float32, with a tokenizer, and return it in float64."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
            tie_word_embeddings=tied, initializer_range=scale, pad_token_id=0, bos_token_id=1, eos_token_id=STOP,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": STOP, "<unk>": 3, "a": 4, "b": 5, "c": 6, "d": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return model.double().eval()


def law_of(model: Qwen3ForCausalLM, temperature: float = 1.0) -> NextLaw:
    """The model's own law."""

    @torch.no_grad()
    def next_law(ids: Tensor) -> Tensor:
        return torch.log_softmax(model(ids).logits[:, -1] / temperature, dim=-1)

    return next_law


def blend_of(student: NextLaw, teacher: NextLaw, epsilon: float) -> NextLaw:
    """mu on the full vocabulary."""
    return lambda ids: blend(student(ids), teacher(ids), epsilon).logprobs


def truncated(student: Tensor, teacher: Tensor, epsilon: float, support_size: int) -> Tensor:
    """mu on the student's top ids and one tail outcome, whose inner law is the student's: [M, V] -> [M, V]."""
    ids = student.topk(support_size, dim=-1).indices
    tails = [torch.logsumexp(law.scatter(-1, ids, -torch.inf), -1, keepdim=True) for law in (student, teacher)]
    coarse = [torch.cat([law.gather(-1, ids), tail], -1) for law, tail in zip((student, teacher), tails, strict=True)]
    mu = blend(coarse[0], coarse[1], epsilon).logprobs
    return (student - tails[0] + mu[..., -1:]).scatter(-1, ids, mu[..., :-1])


def truncated_blend_of(student: NextLaw, teacher: NextLaw, epsilon: float, support_size: int) -> NextLaw:
    """mu on a truncated support."""
    return lambda ids: truncated(student(ids), teacher(ids), epsilon, support_size)


@torch.no_grad()
def laws_along(model: Qwen3ForCausalLM, prompt: Sequence[int], completion: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    """The law at each of the T positions, [T, V]."""
    ids = torch.tensor([[*prompt, *completion.tolist()]])
    return torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], dim=-1)


def probabilities_of_sequences(next_law: NextLaw) -> dict[tuple[int, ...], float]:
    """Every sequence of up to NUM_TOKENS tokens that ends there or with the stop token, with its probability."""
    finished: dict[tuple[int, ...], float] = {}
    open_sequences: dict[tuple[int, ...], float] = {(): 1.0}
    while open_sequences:
        laws = next_law(torch.tensor([[*PROMPT, *sequence] for sequence in open_sequences])).exp().tolist()
        grown: dict[tuple[int, ...], float] = {}
        for (sequence, probability), law in zip(open_sequences.items(), laws, strict=True):
            for token, share in enumerate(law):
                longer = (*sequence, token)
                ends = token == STOP or len(longer) == NUM_TOKENS
                (finished if ends else grown)[longer] = probability * share
        open_sequences = grown
    return finished


def surprise(sequences: Sequence[tuple[int, ...]], next_law: NextLaw) -> float:
    """Pearson's chi-square of the counts against the law, as a standard normal (Wilson and Hilferty).

    Sequences expected fewer than 10 times are counted together.
    """
    counts, law = Counter(sequences), probabilities_of_sequences(next_law)
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    assert set(counts) <= set(law)
    total = len(sequences)
    often = {s: total * p for s, p in law.items() if total * p >= 10}
    seen = [counts[s] for s in often] + [total - sum(counts[s] for s in often)]
    expected = [*often.values(), total - sum(often.values())]
    statistic = sum((n - e) ** 2 / e for n, e in zip(seen, expected, strict=True))
    freedom = len(expected) - 1
    assert freedom > 30, "too few sequences are frequent enough to tell laws apart"
    return (((statistic / freedom) ** (1 / 3)) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
