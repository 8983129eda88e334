"""Checks of a Megatron model's parallel layout and sequence lengths."""

from collections.abc import Mapping
from typing import Any

from nemo_kd.process import say

_NEMOS = "trainer.devices and trainer.num_nodes"


def check_layout(
    model: Mapping[Any, Any],
    num_processes: int,
    section: str,
    set_by: str = _NEMOS,
    shares_groups: bool = False,
) -> int:
    """Return the data-parallel size; refuse a model that the parallel sizes do not divide.

    Args:
        model: The model's settings, by Megatron's names.
        num_processes: Of the whole job.
        section: The place of the settings in the YAML, for the message.
        set_by: What sets the number of processes, for the message.
        shares_groups: Whether the host's Megatron lets several ranks have one key/value group.

    Raises:
        ValueError: The processes, heads, key/value groups, feed-forward sizes, experts or layers do
            not divide.
    """
    tensor_size = model["tensor_model_parallel_size"]
    pipeline_size = model["pipeline_model_parallel_size"]
    context_size = model.get("context_parallel_size") or 1
    replica_size = tensor_size * pipeline_size * context_size
    names = ["num_attention_heads", "num_query_groups", "ffn_hidden_size"]
    if model.get("num_moe_experts"):
        names += ["moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"]
    for name in names:
        size = model.get(name)
        is_shared = shares_groups and name == "num_query_groups" and size
        if size is not None and size % tensor_size and not (is_shared and tensor_size % size == 0):
            raise ValueError(
                f"expected {section}.tensor_model_parallel_size to divide the model's {name}, "
                f"{size}, got {tensor_size}"
            )
    # If the config gives the stages different numbers of layers, Megatron checks them.
    uneven = ("_pipeline_stage", "_pipeline_split", "_parallel_layout")
    if not any(model[key] for key in model if key.endswith(uneven)):
        chunks = model.get("virtual_pipeline_model_parallel_size") or 1
        if model["num_layers"] % (pipeline_size * chunks):
            virtual = f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
            raise ValueError(
                f"expected {section}.pipeline_model_parallel_size to divide the model's "
                f"num_layers, {model['num_layers']}, got {pipeline_size}{virtual}"
            )
    if num_processes % replica_size:
        raise ValueError(
            f"expected a number of processes divisible by tensor {tensor_size} x pipeline "
            f"{pipeline_size} x context {context_size} parallel sizes, got {num_processes}; "
            f"set {set_by}, or {section}'s parallel sizes"
        )
    _check_experts(model, num_processes, section)
    num_replicas: int = num_processes // replica_size
    return num_replicas


def check_replica(model: Mapping[Any, Any], section: str) -> None:
    """Refuse a layout that the teacher run does not have.

    Experts on fewer ranks than the other layers are one: the ranks that work on one micro batch
    would not be those of one group of Megatron's.

    Raises:
        ValueError: The layout is such a one.
    """
    for key, only in ("context_parallel_size", 1), ("virtual_pipeline_model_parallel_size", None):
        if model[key] != only:
            raise ValueError(f"{section}.{key}: the teacher run has none, got {model[key]}")
    tensor_size = model["tensor_model_parallel_size"]
    own_size = model.get("expert_tensor_parallel_size") or tensor_size
    expert_ranks = own_size * (model.get("expert_model_parallel_size") or 1)
    if model.get("num_moe_experts") and expert_ranks % tensor_size:
        raise ValueError(
            f"expected {section}.expert_tensor_parallel_size x expert_model_parallel_size to be a "
            f"multiple of tensor_model_parallel_size {tensor_size} in a teacher run, got "
            f"{expert_ranks}"
        )


def _check_experts(model: Mapping[Any, Any], num_processes: int, section: str) -> None:
    expert_size = model.get("expert_model_parallel_size") or 1
    if expert_size == 1:
        return
    key, num_experts = f"{section}.expert_model_parallel_size", model.get("num_moe_experts")
    if not num_experts:
        raise ValueError(f"expected {key}=1 for a model without experts, got {expert_size}")
    if num_experts % expert_size:
        raise ValueError(
            f"expected {key} to divide the model's num_moe_experts, {num_experts}, got "
            f"{expert_size}"
        )
    own_tensor_size = model.get("expert_tensor_parallel_size")
    tensor_size = own_tensor_size or model["tensor_model_parallel_size"]
    stage_size = num_processes // model["pipeline_model_parallel_size"]
    if stage_size % (expert_size * tensor_size):
        raise ValueError(
            f"expected {key} x tensor {tensor_size} parallel sizes to divide the {stage_size} "
            f"processes of a pipeline stage, got {expert_size}"
        )


def check_expert_training(model: Mapping[Any, Any], section: str) -> None:
    """Refuse what Megatron refuses at the first step of a training, once the weights are read.

    Raises:
        ValueError: A model with experts is tensor-parallel and not sequence-parallel.
    """
    tensor_size = model["tensor_model_parallel_size"]
    if model.get("num_moe_experts") and tensor_size > 1 and not model.get("sequence_parallel"):
        raise ValueError(
            f"expected {section}.sequence_parallel=true to train a model with experts at "
            f"{section}.tensor_model_parallel_size={tensor_size}, got false"
        )


def say_layout(model: Mapping[Any, Any], num_processes: int, num_replicas: int) -> None:
    """Say how the processes divide the model and the data among themselves."""
    expert_size = model.get("expert_model_parallel_size") or 1
    say(
        f"layout {num_processes} process{'es' * (num_processes > 1)}: tensor "
        f"{model['tensor_model_parallel_size']} x pipeline {model['pipeline_model_parallel_size']} "
        f"x context {model.get('context_parallel_size') or 1} x data {num_replicas} parallel"
        + f", experts {expert_size}"
        * (expert_size > 1)
    )


def check_slices(model: Mapping[Any, Any], max_seq_length: int, key: str) -> None:
    """Refuse a length that context and sequence parallelism cannot divide; `key` is its place.

    Raises:
        ValueError: They do not divide it.
    """
    context_size = model.get("context_parallel_size") or 1
    num_slices = 2 * context_size if context_size > 1 else 1
    if model.get("sequence_parallel"):
        num_slices *= model["tensor_model_parallel_size"]
    if max_seq_length % num_slices:
        raise ValueError(
            f"expected {key} divisible by {num_slices}, the slices of a sequence in context and "
            f"sequence parallelism, got {max_seq_length}"
        )


def check_sequence_length(
    model: Mapping[Any, Any], section: str, max_seq_length: int, key: str
) -> None:
    """Refuse sequences that are longer than the model's positions.

    A model with learned positions has no more of them. A model with rotary positions computes more,
    but was trained on no longer sequence.

    Args:
        model: The model's config.
        section: Its place in the YAML, for the message.
        max_seq_length: The longest sequence of the data, in tokens.
        key: The place of that in the YAML.

    Raises:
        ValueError: They are longer.
    """
    names = ("encoder_seq_length", "max_position_embeddings")
    sizes = [model[name] for name in names if model.get(name) is not None]
    if model.get("position_embedding_type") in (None, "learned_absolute"):
        positions, otherwise = min(sizes, default=None), ""
    else:
        positions = max(sizes, default=None)
        otherwise = (
            f", or set +{section}.encoder_seq_length={max_seq_length} for a model that extrapolates"
        )
    if positions is not None and max_seq_length > positions:
        raise ValueError(
            f"expected {key} of at most the model's {positions} positions, got {max_seq_length}; "
            f"lower it{otherwise}"
        )
