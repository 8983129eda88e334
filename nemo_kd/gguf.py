"""GGUF files: their tokenizer as they name it, and their model as a Hugging Face directory."""

from pathlib import Path
from typing import Any

import torch


def from_gguf(tokenizer: Any, source: Path) -> Any:
    """Return the tokenizer with the special tokens that the GGUF file itself names.

    transformers 4.51 takes the end token from the field of the begin token, always prepends the
    begin token, and would save the whole model file as tokenizer.model.
    """
    from gguf import GGUFReader
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields

    def token(kind: str) -> str | None:
        field = fields.get(f"tokenizer.ggml.{kind}_token_id")
        return None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))

    backend = tokenizer.backend_tokenizer
    add_bos = fields.get("tokenizer.ggml.add_bos_token")
    if add_bos is not None and not add_bos.contents():
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=tokenizer.chat_template,
    )


def gguf_to_hf(source: Path, output: Path, keep_layers: list[int] | None = None) -> None:
    """Write a GGUF file's model of the Llama family as a Hugging Face directory.

    Args:
        source: The file.
        output: The directory.
        keep_layers: The layers to keep, in this order; None for all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, torch_dtype="auto", **file)
    if keep_layers is not None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in keep_layers)
        model.config.num_hidden_layers = len(keep_layers)
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **file)
    from_gguf(tokenizer, source).save_pretrained(output)
    number = sum(parameter.numel() for parameter in model.parameters())
    layers = model.config.num_hidden_layers
    print(f"{output}: {layers} layers, {number / 1e6:.1f}M parameters, {model.dtype}")
