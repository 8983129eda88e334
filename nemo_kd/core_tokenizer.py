"""The tokenizer of Megatron Core, asked as NeMo's is asked."""

from typing import Any


class Tokenizer:
    """Core's with the names of NeMo's, so that fingerprints are equal."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.tokenizer = core._tokenizer.tokenizer  # Hugging Face's
        # As NeMo finds it. Without it the datasets drop the blank between prompt and answer.
        tokens = self.tokenizer.tokenize
        self.space_sensitive = tokens("x y") != tokens("x") + tokens("y")

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(self._core._tokenizer.ids_to_tokens(ids))

    def text_to_ids(self, text: str) -> list[int]:
        # Core 0.19 would begin each piece of a sample with the begin token.
        tokenizer = self.tokenizer
        return list(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))

    tokenize = text_to_ids  # what the datasets of Bridge 0.6 call

    def __getattr__(self, name: str) -> Any:
        if name == "_core":  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self._core, name)
