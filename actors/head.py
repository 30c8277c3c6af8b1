"""What a model's logits mean: the law over the tokens that student and teacher share, and the law drawn from.

Every engine and the learner read logits through the same two objects, so that all of them speak of one law.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Turns logits into log-probs over one shared vocabulary, with one stop event.

    Models of one tokenizer may have heads of different widths (padding), and end a completion with different tokens.
    Logits beyond the shared vocabulary have no mass. The mass of all stop tokens is moved to the first of them, before
    anything is drawn or compared (arXiv 2605.31159), so the others are never drawn.
    """

    stop_token_ids: tuple[int, ...]
    """The tokens that end a completion, of student and teacher; the first is the one that is emitted. None of them:
    only its length ends a completion."""
    vocab_size: int | None = None
    """V, how many ids both models have; None: all that a model has."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.stop_token_ids)) < len(self.stop_token_ids):
            raise ValueError(f"stop tokens must be different ids, got {list(self.stop_token_ids)}")

    @property
    def stop_token_id(self) -> int:
        """The token that ends a completion; -1 where none does."""
        return self.stop_token_ids[0] if self.stop_token_ids else -1

    def num_reported(self, support_size: int | None, vocab_size: int) -> int:
        """Return on how many ids log-probs are told where K are asked for, None for all.

        As many as can be drawn, or more, are all: there is nothing else that a spare could be drawn from.
        """
        drawable = vocab_size - len(self.stop_token_ids[1:])
        return vocab_size if support_size is None or support_size >= drawable else support_size

    def merge(self, logits: Tensor) -> Tensor:
        """Return [..., V] unnormalised logs of the shared law, from [..., at least V] logits; differentiable."""
        logits = logits[..., : self.vocab_size]
        if len(self.stop_token_ids) < 2:
            return logits
        stops = torch.tensor(self.stop_token_ids, device=logits.device)
        event = torch.logsumexp(logits.index_select(-1, stops), dim=-1, keepdim=True)
        return logits.index_fill(-1, stops, -torch.inf).index_copy(-1, stops[:1], event)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return [..., V] float32 log-probs in nats at this temperature."""
        return torch.log_softmax(self.scores(logits.float()), dim=-1)

    def scores(self, logits: Tensor) -> Tensor:
        """Return [..., V] unnormalised logs of the shared law at this temperature; differentiable."""
        return self.merge(logits if self.temperature == 1 else logits / self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a student that samples alone draws from its law; the default draws from the law itself."""

    temperature: float = 1.0
    """Of the law drawn from, on top of the head's."""
    top_k: int | None = None
    """Draw among that many likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose mass is at least this."""

    @property
    def is_plain(self) -> bool:
        """Whether the law drawn from is the model's own."""
        return self == PLAIN

    def logprobs(self, logprobs: Tensor) -> Tensor:
        """Return the log-probs [..., V] of the law drawn from, given the model's."""
        if self.is_plain:
            return logprobs
        drawn = torch.log_softmax(logprobs / self.temperature, dim=-1)
        if self.top_k is not None and self.top_k < drawn.shape[-1]:
            least = drawn.topk(self.top_k, dim=-1).values[..., -1:]
            drawn = drawn.masked_fill(drawn < least, -torch.inf)
        if self.top_p < 1:
            ordered, ids = torch.softmax(drawn, dim=-1).sort(dim=-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the first is never beyond
            drawn = drawn.masked_fill(torch.zeros_like(beyond).scatter(-1, ids, beyond), -torch.inf)
        return torch.log_softmax(drawn, dim=-1)


PLAIN = Decoding()
"""The model's own law."""
