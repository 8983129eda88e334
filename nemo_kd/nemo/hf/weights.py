"""Weights as Hugging Face and as Megatron Core lay them out, in both directions.

With h the hidden size, d the head size, g the key/value groups and q the query heads a group:

    linear_qkv  [g * (q + 2) * d, h]  by group: its q query heads, its key head, its value head
    linear_fc1  [2 * ffn, h]          gate rows, then up rows; [ffn, h] where there is no gate

Everything else is one matrix in both. families.py has the names.
"""

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_kd.nemo.hf.families import Family

VOCAB_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded in Megatron


def to_megatron(
    source: Mapping[str, Tensor],
    family: Family,
    num_groups: int,
    layers: list[int],
    padded_vocab_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield Megatron's weights, named as `whole` and `decoder.layers.<n>.<layer>` of the family.

    Args:
        source: A Hugging Face state dict.
        family: Of the model.
        num_groups: Key/value groups.
        layers: The source's layers to take, in this order.
        padded_vocab_size: Rows of the embedding; those past the source's own are zero, and so are
            their logits.
    """
    for name, hf_name in family.whole.items():
        if hf_name not in source:
            continue
        tensor = source[hf_name]
        if name in VOCAB_ROWS:
            tensor = pad(tensor, (0, 0, 0, padded_vocab_size - len(tensor)))
        yield name, tensor
    for new, old in enumerate(layers):
        for name, hf_names in family.layer.items():
            full_names = [f"model.layers.{old}.{hf_name}" for hf_name in hf_names]
            if full_names[0] in source:
                parts = [source[full_name] for full_name in full_names]
                yield f"decoder.layers.{new}.{name}", _join(parts, _num_groups(name, num_groups))


def to_hf(
    weights: MutableMapping[str, Tensor],
    family: Family,
    shapes: dict[str, torch.Size],
    num_groups: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face state dict; each of `weights` is removed from it when it is used.

    Args:
        weights: Megatron's, named as `whole` and `decoder.layers.<layer>` of the family, the latter
            with the layers along the first axis.
        family: Of the model.
        shapes: Of each Hugging Face parameter: the vocabulary's rows past it are padding.
        num_groups: Key/value groups.
    """
    for name, hf_name in family.whole.items():
        if name in weights:
            yield hf_name, weights.pop(name)[: shapes[hf_name][0]]
    for name, hf_names in family.layer.items():
        stacked = weights.pop(f"decoder.layers.{name}", None)
        for layer, tensor in enumerate(() if stacked is None else stacked.unbind()):
            full_names = [f"model.layers.{layer}.{hf_name}" for hf_name in hf_names]
            sizes = [shapes[hf_name][0] for hf_name in full_names]
            parts = _split(tensor, sizes, _num_groups(name, num_groups))
            yield from zip(full_names, parts, strict=True)


def _num_groups(name: str, num_groups: int) -> int:
    """Into how many parts each matrix of linear_qkv is cut; the others stay whole."""
    return num_groups if "linear_qkv" in name else 1


def _join(parts: list[Tensor], num_groups: int) -> Tensor:
    """Matrices [rows, ...] -> one, group by group."""
    if len(parts) == 1:
        return parts[0]
    grouped = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split(tensor: Tensor, sizes: list[int], num_groups: int) -> list[Tensor]:
    """The inverse of _join, for matrices of these numbers of rows, in memory of their own."""
    if len(sizes) == 1:
        return [tensor.clone()]
    grouped = tensor.reshape(num_groups, -1, *tensor.shape[1:])
    parts = torch.split(grouped, [size // num_groups for size in sizes], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]
