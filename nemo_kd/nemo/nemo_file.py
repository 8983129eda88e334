"""Reading the config of a .nemo, and writing a .nemo."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict


def read_model_config(path: str, key: str) -> DictConfig:
    """Return the model config inside a .nemo file or an unpacked .nemo directory.

    Args:
        path: The .nemo.
        key: The YAML key that named it, for the error.

    Raises:
        ValueError: There is no such file, or it is no .nemo.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    if path is None or not os.path.exists(path):
        raise ValueError(f"{key}: expected the path of a .nemo file or directory, found no {path}")
    is_nemo = (
        os.path.exists(os.path.join(path, "model_config.yaml"))
        if os.path.isdir(path)
        else tarfile.is_tarfile(path)
    )
    if not is_nemo:
        raise ValueError(f"{key}: expected a .nemo (a tar with model_config.yaml), got {path}")
    config = MegatronGPTSFTModel.restore_from(path, return_config=True)
    if not config.get("mcore_gpt", False):
        raise ValueError(f"{key}: expected a Megatron Core model (mcore_gpt: true), got {path}")
    tokenizer = config.get("tokenizer", {})
    directory = tokenizer.get("type")
    # A .nemo names a Hugging Face tokenizer by its path; one that stands beside it moved with it.
    beside = os.path.splitext(os.path.abspath(path))[0] + ".tokenizer"
    if directory and not os.path.exists(directory) and os.path.isdir(beside):
        with open_dict(config):
            config.tokenizer.type = beside
    return config


def save_nemo(model: Any, path: str) -> None:
    """Write a .nemo, on every rank of the model, by one atomic rename.

    NeMo collects the weights in the directory of the .nemo, under one name for all: two runs that
    save there at once would mix theirs.
    """
    target = Path(path).absolute()
    directory = target.parent / f".{target.name}.saving"
    directory.mkdir(parents=True, exist_ok=True)
    model.save_to(str(directory / target.name))
    if torch.distributed.get_rank() == 0:  # NeMo's save of a whole model ends in a barrier
        os.replace(directory / target.name, target)
        shutil.rmtree(directory)


def read_tokenizer(path: Path, key: str) -> Any:
    """Return NeMo's tokenizer of a .nemo, without its weights, or of a Hugging Face directory.

    Args:
        path: The .nemo, a file or unpacked, or the directory.
        key: The option that named it, for the error.

    Raises:
        ValueError: There is no such path, or it is no .nemo of Megatron Core.
    """
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    if not path.exists():
        raise ValueError(f"{key}: expected a .nemo or a directory, found no {path}")
    if path.is_dir() and not (path / "model_config.yaml").exists():
        return get_nmt_tokenizer(library="huggingface", model_name=str(path), use_fast=True)
    settings = read_model_config(str(path), key).tokenizer
    with tempfile.TemporaryDirectory() as unpacked:
        if path.is_file():
            with tarfile.open(path) as nemo:
                small = [member for member in nemo if "model_weights" not in member.name]
                nemo.extractall(unpacked, small, filter="data")
        root = path if path.is_dir() else Path(unpacked)
        # Of a file that lies in the .nemo, the config has the name with `nemo:` before it.
        files = {
            argument: str(root / name.removeprefix("nemo:")) if name.startswith("nemo:") else name
            for argument, setting in (
                ("tokenizer_model", "model"),
                ("vocab_file", "vocab_file"),
                ("merges_file", "merge_file"),
            )
            if (name := settings.get(setting))
        }
        return get_nmt_tokenizer(
            library=settings.library,
            model_name=settings.get("type"),
            use_fast=settings.get("use_fast", False),
            special_tokens=settings.get("special_tokens"),
            legacy=settings.get("sentencepiece_legacy", settings.library == "sentencepiece"),
            **files,
        )
