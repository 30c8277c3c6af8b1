"""The student's tokenizer, loaded without the rest of transformers: seconds less in every process that needs one."""

from typing import Any

from transformers import PreTrainedTokenizerFast


def load_tokenizer(model: str) -> Any:
    """Return the fast tokenizer of a Hugging Face folder or a model on the Hub.

    Raises:
        OSError: if there is none.
    """
    return PreTrainedTokenizerFast.from_pretrained(model)
