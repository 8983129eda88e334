"""A Hugging Face checkpoint becomes a .nemo.

The .nemo is written at tensor and pipeline parallel size 1; NeMo restores it at any other.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import apply_factories
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo_kd.chat.render import begin_token
from nemo_kd.config import refuse_unknown_keys
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import quiet_host
from nemo_kd.nemo.disk import one_line_if_full
from nemo_kd.nemo.hf.configs import nemo_config
from nemo_kd.nemo.hf.families import MODEL_TYPES
from nemo_kd.nemo.hf.source import Source, open_source, read_json
from nemo_kd.nemo.hf.weights import to_megatron
from nemo_kd.nemo.nemo_file import save_nemo
from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel
from nemo_kd.yaml_rules import check_yaml_values


def for_spec(name: str, names: set[str]) -> str:
    """Return `name` as the built model has it; only Transformer Engine's layers fuse the norms."""
    if name in names:
        return name
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def import_hf_llama(config: DictConfig) -> None:
    """Write `config.output` from `config.source`: see conf/import_hf_llama.yaml.

    Raises:
        ValueError: A key or a path does not fit, or the source is not a model of a known family.
        OSError: The disk is full.
    """
    check_yaml_values(config, "import_hf_llama")
    refuse_unknown_keys(config, ("source", "output", "keep_layers"))
    output = Path(config.output).absolute()
    if output.suffix != ".nemo":
        raise ValueError(f"output: expected a path that ends in .nemo, got {config.output}")
    source = open_source(Path(config.source))
    tokenizer, num_layers = source.tokenizer, source.config.num_hidden_layers
    layers = list(range(num_layers) if config.keep_layers is None else config.keep_layers)
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"keep_layers: expected layers from 0 to {num_layers - 1}, got {layers}")
    tokenizer_directory = output.with_suffix(".tokenizer")
    model_config = OmegaConf.create(
        nemo_config(source.config, str(tokenizer_directory), len(layers), len(tokenizer))
    )
    model_config.hugging_face.tokenizer_eos = tokenizer.eos_token_id
    generation = Path(config.source, "generation_config.json")
    if generation.exists():
        model_config.hugging_face.generation_config = read_json(generation)
    for name in source.weights:
        if re.search(r"(o|gate|up|down)_proj.bias", name):
            raise ValueError(f"source: expected biases on q, k and v alone, got {name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tokenizer_directory, ignore_errors=True)  # no file of another tokenizer may stay
    tokenizer.save_pretrained(tokenizer_directory)
    model = build_model(model_config)
    (module,) = model.get_model_module_list()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        with one_line_if_full(output, lambda: "what stood there before is as it was"):
            fill_model(module, source, layers, Path(scratch))
        cpu_backend.drop_overrides(model.cfg)
        model.sharded_state_dict = partial(_unshared, model.sharded_state_dict, Path(scratch))
        save_nemo(model, str(output))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{output}: {len(layers)} of {num_layers} layers, {num_parameters / 1e6:.1f}M parameters, "
        f"{source.dtype}; tokenizer in {tokenizer_directory}"
    )
    if begin := begin_token(tokenizer):
        print(f"the model expects {begin} before each text: use data.add_bos=true")


def build_model(model_config: DictConfig) -> Any:
    """Return a MegatronGPTSFTModel of this config, whose weights have no memory.

    It has the layers of a machine without a GPU, whose weights have the same names in a .nemo.
    """
    cpu_backend.enable()
    cpu_backend.prepare_model_config(model_config)
    run = OmegaConf.create(
        {
            "trainer": {"accelerator": "cpu", "devices": 1, "precision": 32, "logger": False},
            "model": model_config,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )

    # After cpu_backend.enable, which NeMo's modules need on a machine without a GPU.
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    trainer = build_trainer(run)
    quiet_host()
    initialize_model_parallel(trainer, model_config)
    with torch.device("meta"):
        return MegatronGPTSFTModel(model_config, trainer)


def fill_model(module: Any, source: Source, layers: list[int], scratch: Path) -> None:
    """Give Megatron's module the source's weights, of these layers, one matrix at a time.

    Each is written to a file that is mapped into memory, so that the memory in use does not grow
    with the model: the system writes the pages out where it needs room.

    Args:
        module: The GPTModel, without memory for its weights.
        source: The Hugging Face model.
        layers: Its layers to take, in this order.
        scratch: A directory on a disk with room for the weights.

    Raises:
        ValueError: The two models do not have the same weights.
    """
    names = {name for name, _ in module.named_parameters()}
    num_rows = len(module.embedding.word_embeddings.weight)
    config = source.config
    family = MODEL_TYPES[config.model_type]
    num_groups = config.num_key_value_heads or config.num_attention_heads
    pairs = to_megatron(source.weights, family, num_groups, layers, num_rows)
    weights = {}
    for name, tensor in tqdm(pairs, "converting", total=len(names), unit="matrix", disable=None):
        weights[for_spec(name, names)] = _mapped(tensor.to(source.dtype), scratch)
    if set(weights) != names:
        raise ValueError(
            f"source: its weights differ from NeMo's model in {sorted(set(weights) ^ names)}"
        )
    module.load_state_dict(weights, strict=False, assign=True)


def _unshared(make: Callable[[], Any], scratch: Path) -> Any:
    """Megatron's sharded state dict, without two tensors that share a file.

    Megatron cuts gates and up projections apart, and would save such parts by way of memory.
    """
    state = make()
    apply_factories(state)

    def unshare(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor):
            data = entry.data
            if data.untyped_storage().nbytes() != data.nbytes:
                entry.data = _mapped(data, scratch)
        return entry

    dict_list_map_inplace(unshare, state)
    return state


def _mapped(tensor: torch.Tensor, scratch: Path) -> torch.Tensor:
    """A copy in a file without a name, which is gone when nothing refers to it."""
    path = scratch / "weight"
    with open(path, "wb") as file:
        # Its room on the disk at once: a write into a map that finds none would kill the process.
        os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(
        tensor.shape
    )
    path.unlink()
    return mapped.copy_(tensor)
