"""Opens a .nemo, a file or an unpacked directory, and writes one."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from nemo_kd.cache.manifest import fingerprint_model
from nemo_kd.nemo.disk import one_line_if_full
from nemo_kd.nemo.integrity import check_files, one_line, seal_nemo


def read_model_config(path: str, key: str) -> DictConfig:
    """Return the model config inside a .nemo file or an unpacked .nemo directory.

    Raises:
        ValueError: There is no such file, it is no .nemo, or what it has beside its weights is
            damaged; `key` is the YAML key that named it, for the message.
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
    check_files(path, key, weights=False)
    with one_line(path, key):
        config = MegatronGPTSFTModel.restore_from(path, return_config=True)
    if not config.get("mcore_gpt", False):
        raise ValueError(f"{key}: expected a Megatron Core model (mcore_gpt: true), got {path}")
    named = config.get("tokenizer", {}).get("type")
    # A .nemo names a Hugging Face tokenizer by its path. If the .nemo has moved, the tokenizer that
    # hf/importer.py wrote beside it has moved too.
    beside = os.path.splitext(os.path.abspath(path))[0] + ".tokenizer"
    if named and not os.path.exists(named) and os.path.isdir(beside):
        with open_dict(config):
            config.tokenizer.type = beside
    return config


def is_checkpoint(path: str) -> bool:
    """Whether this is a checkpoint of a run, a directory that NeMo wrote, and no .nemo."""
    return os.path.exists(os.path.join(path, ".metadata"))


def read_checkpoint_config(path: str, key: str) -> DictConfig:
    """Return the model config that Lightning keeps in a checkpoint of a run.

    Raises:
        ValueError: The checkpoint is damaged, or keeps no config of a Megatron Core model.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    check_files(path, key, weights=False)
    with one_line(path, key):
        config = load_common_state_dict(path).get("hyper_parameters", {}).get("cfg")
    if config is None or not config.get("mcore_gpt", False):
        raise ValueError(f"{key}: expected a checkpoint of train_kd_sft.py, got {path}")
    return config


def load_weights(path: str, scratch: str) -> dict[str, torch.Tensor]:
    """Return a model's weights by Megatron's names, on the CPU, whatever layout wrote them.

    Args:
        path: A .nemo, or a checkpoint of a run, whose optimizer is not read.
        scratch: A directory on a disk that holds the weights of a .nemo once more.

    Raises:
        ValueError: It is damaged, or holds no distributed checkpoint.
    """
    from megatron.core.dist_checkpointing import load, load_tensors_metadata

    check_files(path, "source")
    with tempfile.TemporaryDirectory(dir=scratch) as unpacked:
        directory = path
        if os.path.isfile(path):
            directory = unpacked
            with tarfile.open(path) as nemo:
                members = [member for member in nemo if "model_weights/" in member.name]
                shown = tqdm(members, "unpacking", unit="file", disable=None)
                nemo.extractall(unpacked, shown, filter="data")
        weights = directory if is_checkpoint(path) else os.path.join(directory, "model_weights")
        if not os.path.isdir(weights):
            raise ValueError(
                f"source: expected a distributed checkpoint of a whole model (model_weights/) in "
                f"{path}, found none: adapters alone, or a .nemo of an older NeMo, which NeMo "
                "reads and saves anew"
            )
        if not torch.distributed.is_initialized():  # Megatron asks for a group, if only of one
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        with one_line(path, "source"):
            listed = load_tensors_metadata(weights)
            wanted = {k: v for k, v in listed.items() if not k.startswith("optimizer.")}
            # Megatron's check is for ranks that load a part each; this process loads all.
            tensors = load(wanted, weights, validate_access_integrity=False)
    return {name.removeprefix("model."): tensors[name] for name in wanted}  # not the run's counts


def save_nemo(model: Any, path: str, remains: str = "") -> None:
    """Write a .nemo, with checksums, by one atomic rename. Every rank of the model calls it.

    NeMo collects the weights in the directory of the .nemo, under the same name for every .nemo.
    Two runs that save into one directory would mix their weights, so that each has its own here.

    Args:
        model: NeMo's model.
        path: The .nemo.
        remains: What to say of what is left if the disk is full.

    Raises:
        OSError: It cannot be written; what stood at `path` stays.
    """
    target = Path(path).absolute()
    directory = target.parent / f".{target.name}.saving"

    def clear() -> str:
        if torch.distributed.get_rank() == 0:  # another rank's failure ends this one too
            shutil.rmtree(directory, ignore_errors=True)
        return f"what stood there before is as it was. {remains}".rstrip()

    clear()  # what a killed run has left there would go into the .nemo
    torch.distributed.barrier()  # before another rank writes into it
    with one_line_if_full(target, clear):
        directory.mkdir(parents=True, exist_ok=True)
        before, tempfile.tempdir = tempfile.tempdir, str(directory)  # NeMo's copy, else in /tmp
        try:
            model.save_to(str(directory / target.name))
        finally:
            tempfile.tempdir = before
        # NeMo's save of a whole model ends in a barrier, so that the other ranks are done by now.
        if torch.distributed.get_rank() == 0:
            seal_nemo(directory / target.name)
            os.replace(directory / target.name, target)
            shutil.rmtree(directory)


def fingerprint_checkpoint(name: str, settings: str = "") -> str:
    """Hash a .nemo, a file or a directory, after `settings`.

    Of each file the size and some blocks are read, so that 700 GB take no longer than 1 GB.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return fingerprint_model(files, settings)


def check_target(path: Any, source: str) -> None:
    """Try that a .nemo can be written, before a run that ends with it.

    Args:
        path: The .nemo, `save_to` of the YAML.
        source: The model that the run starts from.

    Raises:
        ValueError: It has another suffix, is a directory or the source, or cannot be written.
    """
    target = Path(str(path)).absolute()
    if target.suffix != ".nemo":
        raise ValueError(f"save_to: expected a path that ends in .nemo, got {path!r}")
    if target.is_dir():
        raise ValueError(f"save_to: expected a file to write, got the directory {path}")
    if target.exists() and os.path.exists(source) and target.samefile(source):
        raise ValueError(f"save_to: expected another file than model.restore_from_path, {path}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            free_bytes = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ValueError(f"save_to: cannot write {path}: {error.strerror}") from error
    # NeMo collects the weights beside the .nemo that it makes of them.
    if os.path.isfile(source) and free_bytes < 2 * os.path.getsize(source):
        raise ValueError(
            f"save_to: expected {2 * os.path.getsize(source) / 1e9:.3g} GB free beside {path}, "
            f"twice the size of model.restore_from_path, found {free_bytes / 1e9:.3g} GB"
        )


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
    return tokenizer_of(read_model_config(str(path), key), path)


def tokenizer_of(config: DictConfig, path: Path) -> Any:
    """Return the tokenizer that NeMo will have for a .nemo, without its weights.

    Args:
        config: The model's config, with the run's changes.
        path: The .nemo, a file or unpacked, that holds the tokenizer's files.
    """
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    settings = config.tokenizer
    library = settings["library"]
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
            library=library,
            model_name=settings.get("type"),
            use_fast=settings.get("use_fast", False),
            special_tokens=settings.get("special_tokens"),
            legacy=settings.get("sentencepiece_legacy", library == "sentencepiece"),
            **files,
        )
