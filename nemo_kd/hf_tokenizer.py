"""The tokenizer of a Hugging Face directory, asked as the hosts' tokenizers are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class HfTokenizer:
    """What fingerprints and samples need of a host's tokenizer, without a host.

    Args:
        path: The directory.
        key: The setting that named it, for the errors.

    Raises:
        ValueError: The directory has no tokenizer that transformers reads.
    """

    def __init__(self, path: str, key: str) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        if not Path(path).is_dir():
            raise ValueError(f"{key}: expected a Hugging Face directory, found no {path}")
        try:
            own: Any = AutoTokenizer.from_pretrained(path)
        except Exception as error:  # transformers raises what it likes
            raise ValueError(
                f"{key}: expected a tokenizer in {path}: {type(error).__name__}: {error}"
            ) from error
        self.tokenizer = own
        self.vocab_size, self.eos_id, self.bos_id = len(own), own.eos_token_id, own.bos_token_id
        # As NeMo finds it. Without it the datasets drop the blank between prompt and answer.
        self.space_sensitive = own.tokenize("x y") != own.tokenize("x") + own.tokenize("y")
        ends: Any = None
        if (Path(path) / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(path).eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        # A chat model often ends its turns otherwise than a text.
        self.end_ids = sorted({each for each in (*ends, self.eos_id) if each is not None})

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))

    def text_to_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text)))

    def ids_to_text(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text, by default with the special tokens in it."""
        own = self.tokenizer
        return str(own.decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False))


def cut_at(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of `stops`."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
