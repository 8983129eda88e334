"""Checks of a NeMo model's parallel layout and sequence lengths."""

from omegaconf import DictConfig

from nemo_kd.process import say


def check_layout(model: DictConfig, num_processes: int, section: str) -> int:
    """Return the data-parallel size; refuse a model that the parallel sizes do not divide.

    Raises:
        ValueError: The processes, heads, key/value groups, feed-forward size or layers do not
            divide; `section` is the place of the model's config in the YAML, for the message.
    """
    tensor_size = model.tensor_model_parallel_size
    pipeline_size = model.pipeline_model_parallel_size
    context_size = model.get("context_parallel_size", 1)
    replica_size = tensor_size * pipeline_size * context_size
    if num_processes % replica_size:
        raise ValueError(
            f"expected a number of processes divisible by tensor {tensor_size} x pipeline "
            f"{pipeline_size} x context {context_size} parallel sizes, got {num_processes}; "
            f"set trainer.devices and trainer.num_nodes, or {section}'s parallel sizes"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = model.get(name)
        if size is not None and size % tensor_size:
            raise ValueError(
                f"expected {section}.tensor_model_parallel_size to divide the model's {name}, "
                f"{size}, got {tensor_size}"
            )
    # If the config gives the stages different numbers of layers, Megatron checks them.
    uneven = ("_pipeline_stage", "_pipeline_split", "_parallel_layout")
    if not any(model[key] for key in model if key.endswith(uneven)):
        chunks = model.get("virtual_pipeline_model_parallel_size") or 1
        if model.num_layers % (pipeline_size * chunks):
            virtual = f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
            raise ValueError(
                f"expected {section}.pipeline_model_parallel_size to divide the model's "
                f"num_layers, {model.num_layers}, got {pipeline_size}{virtual}"
            )
    return num_processes // replica_size


def say_layout(model: DictConfig, num_processes: int, num_replicas: int) -> None:
    """Say how the processes divide the model and the data among themselves."""
    say(
        f"layout {num_processes} process{'es' * (num_processes > 1)}: tensor "
        f"{model.tensor_model_parallel_size} x pipeline {model.pipeline_model_parallel_size} x "
        f"context {model.get('context_parallel_size', 1)} x data {num_replicas} parallel"
    )


def check_sequence_length(model: DictConfig, section: str, max_seq_length: int, key: str) -> None:
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
