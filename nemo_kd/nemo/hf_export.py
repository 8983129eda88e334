"""A .nemo of the Llama family becomes a Hugging Face checkpoint: hf_import's inverse."""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from nemo_kd.config import refuse_unknown_keys
from nemo_kd.nemo.hf_llama import hf_config, to_hf
from nemo_kd.nemo.nemo_file import read_model_config
from nemo_kd.nemo.trainer import drop_noise

TOKENS = ("bos", "eos", "pad")
DTYPES = {
    None: None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_weights(source: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return Megatron's weights, on the CPU, whatever the layout that wrote them.

    Args:
        source: A .nemo file, or the directory of an unpacked one.
        scratch: An empty directory on a disk that holds the weights once more.

    Raises:
        ValueError: It holds no distributed checkpoint.
    """
    from megatron.core.dist_checkpointing import load_plain_tensors

    directory = source
    if source.is_file():
        with tarfile.open(source) as nemo:
            members = [member for member in nemo if "model_weights/" in member.name]
            for member in tqdm(members, "unpacking", unit="file", disable=None):
                nemo.extract(member, scratch, filter="data")
        directory = scratch
    weights = directory / "model_weights"
    if not weights.is_dir():
        raise ValueError(
            f"source: expected a distributed checkpoint of a whole model (model_weights/) in "
            f"{source}, found none: adapters alone, or a .nemo of an older NeMo, which NeMo reads "
            "and saves anew"
        )
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    tensors = load_plain_tensors(str(weights))
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load_tokenizer(nemo: DictConfig) -> Any:
    """Return the model's Hugging Face tokenizer.

    Raises:
        ValueError: It has another kind, or its files are not there.
    """
    from transformers import AutoTokenizer

    settings = nemo.tokenizer
    if settings.get("library") != "huggingface":
        raise ValueError(
            f"source: expected a tokenizer with library: huggingface, got {settings.get('library')}"
        )
    try:
        return AutoTokenizer.from_pretrained(settings.type)
    except OSError as error:
        raise ValueError(f"source: found no tokenizer at {settings.type}: {error}") from error


def export_hf_llama(config: DictConfig) -> None:
    """Write `config.output` from `config.source`: see conf/export_hf_llama.yaml."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    refuse_unknown_keys(config, ("source", "output", "dtype"))
    output = Path(config.output).absolute()
    if output.exists():
        raise ValueError(f"output: expected a new directory, but {config.output} exists")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected null, bfloat16, float16 or float32, got {config.dtype}")
    dtype = DTYPES[config.dtype]
    drop_noise()
    nemo = read_model_config(config.source, "source")
    tokenizer = load_tokenizer(nemo)
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in TOKENS}
    model_config = hf_config(nemo, len(tokenizer), tokens)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    saving = output.with_name(f".{output.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        scratch = saving / "unpacked"
        weights = load_weights(Path(config.source), scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        state = {
            name: tensor.to(dtype or tensor.dtype)
            for name, tensor in tqdm(
                to_hf(weights, shapes, model_config.num_key_value_heads),
                "converting",
                total=len(shapes),
                unit="matrix",
                disable=None,
            )
        }
        check_complete(state, shapes, weights, model_config.tie_word_embeddings)
        model.to(next(iter(state.values())).dtype)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        num_parameters = sum(tensor.numel() for tensor in state.values())
        model.save_pretrained(saving, state_dict=state)
        tokenizer.save_pretrained(saving)
        os.replace(saving, output)
    finally:
        shutil.rmtree(saving, ignore_errors=True)
    print(
        f"{config.output}: {model_config.model_type}, {model_config.num_hidden_layers} layers, "
        f"{num_parameters / 1e6:.1f}M parameters, {model.dtype}"
    )


def check_complete(
    state: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    left: dict[str, torch.Tensor],
    tied: bool,
) -> None:
    """Raise a ValueError unless each parameter is there, in its shape, and no weight is left."""
    expected = shapes.keys() - ({"lm_head.weight"} if tied else set())
    problems = [f"lacks {name}" for name in sorted(expected - state.keys())]
    problems += [f"has {name}, which a Llama lacks" for name in left if "_extra_state" not in name]
    problems += [
        f"has {name} of shape {tuple(tensor.shape)} instead of {tuple(shapes[name])}"
        for name, tensor in state.items()
        if tensor.shape != shapes[name]
    ]
    if problems:
        raise ValueError(f"source: the model {problems[0]} ({len(problems)} such differences)")
