"""A .nemo or a checkpoint becomes a Hugging Face model: the inverse of importer.py."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo_kd.config import refuse_unknown_keys
from nemo_kd.nemo.console import quiet_host
from nemo_kd.nemo.disk import one_line_if_full
from nemo_kd.nemo.hf.configs import KEPT, hf_config
from nemo_kd.nemo.hf.families import Family, family_of_nemo
from nemo_kd.nemo.hf.weights import to_hf
from nemo_kd.nemo.nemo_file import (
    is_checkpoint,
    load_weights,
    read_checkpoint_config,
    read_model_config,
)
from nemo_kd.yaml_rules import check_yaml_values


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


def read_source_config(source: str) -> DictConfig:
    """Return the model config of a .nemo, or of a checkpoint of a run.

    Raises:
        ValueError: It is neither, or has adapters alone.
    """
    if is_checkpoint(source):
        return read_checkpoint_config(source, "source")
    if source.endswith(".ckpt"):
        raise ValueError(
            f"source: expected a .nemo or the directory of a checkpoint, got {source}; NeMo writes "
            "such files of adapters alone, and merge.py adds the .nemo of adapters to its model"
        )
    return read_model_config(source, "source")


def kept_fields(nemo: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """Return what the import kept of the source's config, and its generation_config.

    If the .nemo is another tool's, or a run took another tokenizer, the ids are the tokenizer's.
    """
    kept: Any = OmegaConf.to_container(nemo.get("hugging_face", OmegaConf.create()))
    if kept.pop("tokenizer_eos", "none kept") == tokenizer.eos_token_id:
        return dict(kept)
    rows = max(kept.get("vocab_size", 0), len(tokenizer))
    return {"vocab_size": rows, **{name: getattr(tokenizer, name) for name in KEPT[1:]}}


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `output` at the end, and is removed on an error."""
    saving = output.with_name(f".{output.name}.saving")
    shutil.rmtree(saving, ignore_errors=True)  # a killed export may have left it
    try:
        with one_line_if_full(output, lambda: "nothing of it is left"):
            saving.mkdir(parents=True)
            yield saving
            os.replace(saving, output)  # last, so that what stands there is whole
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def export_hf_llama(config: DictConfig) -> None:
    """Write `config.output` from `config.source`: see conf/export_hf_llama.yaml.

    Raises:
        ValueError: A key or a path does not fit, or the source is damaged or not a model of a
            known family.
        OSError: The disk is full.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_yaml_values(config, "export_hf_llama")
    refuse_unknown_keys(config, ("source", "output", "dtype"))
    output = Path(config.output).absolute()
    if output.exists():
        raise ValueError(f"output: expected a new directory, but {config.output} exists")
    quiet_host()
    nemo = read_source_config(config.source)
    tokenizer = load_tokenizer(nemo)
    kept = kept_fields(nemo, tokenizer)
    generation = kept.pop("generation_config", None)
    family = family_of_nemo(nemo)
    model_config = hf_config(nemo, family, kept)
    with torch.device("meta"):  # the names and shapes, without memory for the weights
        model = AutoModelForCausalLM.from_config(model_config)

    with published(output) as saving:
        # The unpacked .nemo goes before the converted model needs the same space again.
        with tempfile.TemporaryDirectory(dir=saving) as unpacked:
            weights = load_weights(config.source, unpacked)
        state = convert(weights, family, model, config.dtype)
        num_parameters = sum(tensor.numel() for tensor in state.values())
        model.to(next(iter(state.values())).dtype)
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(saving, state_dict=state)
        if generation is not None:  # as it was published; transformers would refuse some
            (saving / "generation_config.json").write_text(json.dumps(generation, indent=2))
        tokenizer.save_pretrained(saving)
    print(
        f"{config.output}: {model_config.model_type}, {model_config.num_hidden_layers} layers, "
        f"{num_parameters / 1e6:.1f}M parameters, {model.dtype}"
    )


def convert(
    weights: dict[str, torch.Tensor], family: Family, model: Any, dtype: str | None
) -> dict[str, torch.Tensor]:
    """Return the state dict of a Hugging Face model out of Megatron's weights, which it consumes.

    Args:
        weights: Named as to_hf takes them.
        family: Of the model.
        model: The Hugging Face model. Only its names and shapes are read.
        dtype: None keeps the dtype of the weights.

    Raises:
        ValueError: A parameter is missing or has another shape, or a weight is left over.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    pairs = to_hf(weights, family, shapes, model.config.num_key_value_heads)
    state = {
        name: tensor.to(getattr(torch, dtype) if dtype else tensor.dtype)
        for name, tensor in tqdm(
            pairs, "converting", total=len(shapes), unit="matrix", disable=None
        )
    }
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    problems = [f"lacks {name}" for name in sorted(shapes.keys() - tied - state.keys())]
    problems += [
        f"has {name}, which a {family.name} lacks" for name in weights if "_extra_state" not in name
    ]
    problems += [
        f"has {name} of shape {tuple(tensor.shape)} instead of {tuple(shapes[name])}"
        for name, tensor in state.items()
        if tensor.shape != shapes[name]
    ]
    if problems:
        raise ValueError(f"source: the model {problems[0]} ({len(problems)} such differences)")
    return state
