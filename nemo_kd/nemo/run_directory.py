"""What a run keeps in its directory beside NeMo's checkpoints, and how a killed run leaves it.

A run resumes from the newest whole checkpoint, whichever of its files a SIGKILL left half written.
Beside the checkpoints lies settings.json, which says what the run trains: the objective, the data,
the optimizer and the student.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.model_utils import uninject_model_parallel_rank
from omegaconf import DictConfig, OmegaConf

from nemo_kd.nemo.nemo_file import fingerprint_checkpoint
from nemo_kd.student.run_record import check_record, fingerprints_of, objective_of, write_record

# Keys of `model.data.train_ds` that decide what a step sees.
_SHAPES_DATA = (
    "concat_sampling_probabilities",
    "global_batch_size",
    "max_seq_length",
    "packed_sequence",
    "seed",
)
_LAST = "-last"


def checkpoint_directory(exp_manager: DictConfig) -> Path | None:
    """Where NeMo's exp_manager puts the checkpoints; None if nothing can be resumed from there."""
    directory = (exp_manager.get("checkpoint_callback_params") or {}).get("dirpath")
    if directory is None:
        parts = [exp_manager.get("exp_dir") or "nemo_experiments", exp_manager.get("name", "")]
        directory = exp_manager.get("explicit_log_dir") or os.path.join(*parts)
        directory = os.path.join(directory, exp_manager.get("version") or "", "checkpoints")
    resumes = exp_manager.get("resume_if_exists", False) and "://" not in str(directory)
    return Path(directory) if resumes else None


def settings_of(config: DictConfig) -> dict[str, Any]:
    """What a run trains, by the keys of its config; files stand there by their content."""
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    objective = model.get("knowledge_distillation", {})
    data = model["data"]["train_ds"]
    caches = fingerprints_of(data["file_names"])
    return {
        "knowledge_distillation": objective_of(objective),
        # None as in the runs of releases that did not have it.
        "loss_reduction": "token" if model.get("loss_reduction") == "token" else None,
        "optim": model["optim"],
        "peft": model.get("peft", {}),
        "data.train_ds": {"file_names": caches, **{k: data.get(k) for k in _SHAPES_DATA}},
        "restore_from_path": fingerprint_checkpoint(model["restore_from_path"]),
    }


def prepare(
    directory: Path, settings: dict[str, Any], allow_changes: bool, given: str | None = None
) -> str:
    """Clear a run's directory of what was half written, and mark the newest whole checkpoint.

    NeMo resumes from the one checkpoint whose name ends in -last. Called on rank 0 only.

    Args:
        settings: What the run trains, see `settings_of`.
        allow_changes: Resume also a run with other settings.
        given: The checkpoint that the run starts from if it has none of its own.

    Returns:
        A line that says where the run starts.

    Raises:
        ValueError: The checkpoints are those of a run with other settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    NeMoModelCheckpoint._remove_unfinished_checkpoints(directory)
    name = _mark_newest(directory)
    if name is not None and not allow_changes:
        check_record(directory, settings, "model", "Give this run another name")
    write_record(directory, settings)
    if name is None:
        start = "at step 0" if given is None else f"from {given}"
        return f"{directory}: no whole checkpoint, the run starts {start}"
    return f"{directory}: the run resumes from {name}"


def checked_before_resuming(directory: Path) -> list[Path]:
    """The directory, or the file of each rank, of the checkpoint that NeMo resumes from."""
    return [
        path for name, paths in _paths(directory).items() if name.endswith(_LAST) for path in paths
    ]


def files_of_checkpoint(path: str) -> list[Path]:
    """The directory of a checkpoint, or the files of one of adapters, which has one for each rank.

    Raises:
        ValueError: There is none.
    """
    given = Path(path)
    files = [given] if given.exists() else sorted(given.parent.glob(f"[mt]p_rank*/{given.name}"))
    if not files or (given.is_dir() and not (given / "metadata.json").exists()):
        raise ValueError(
            f"exp_manager.resume_from_checkpoint: expected a checkpoint of a run, found none at "
            f"{path}"
        )
    return files


def what_remains(directory: Path) -> str:
    """Remove what a failed write has left half written, and say what the run can resume from."""
    if torch.distributed.get_rank() == 0:  # NeMo's function is for rank 0 only
        NeMoModelCheckpoint._remove_unfinished_checkpoints(directory)
    newest = _newest(_paths(directory))
    if newest is None:
        return "there is no checkpoint yet: free space, and call the same command again"
    return f"free space, and the same command resumes from the newest whole checkpoint, {newest}"


def _paths(directory: Path) -> dict[str, list[Path]]:
    """The directory or the files of each checkpoint, by its name."""
    paths_of = defaultdict(list)
    for path in directory.glob("*"):
        if path.is_dir() and not re.match("(mp|tp)_rank", path.name):
            paths_of[path.name].append(path)
    for path in sorted(directory.rglob("*.ckpt")):  # adapters, a file for each rank
        name = Path(uninject_model_parallel_rank(path)).name.removesuffix(".ckpt")
        paths_of[name].append(path)
    return paths_of


def _newest(names: Iterable[str]) -> str | None:
    return max(names, key=lambda name: (_place(name), name.endswith(_LAST)), default=None)


def _mark_newest(directory: Path) -> str | None:
    """Make the newest whole checkpoint the only one whose name ends in -last."""
    paths_of = _paths(directory)
    newest = _newest(paths_of)
    if newest is None:
        return None
    last = newest.removesuffix(_LAST) + _LAST
    if last not in paths_of:
        NeMoModelCheckpoint.set_checkpoint_unfinished_marker(directory / last)
        for path in paths_of[newest]:
            copy = path.with_name(path.name.replace(newest, last))
            _link(path, copy) if path.is_file() else shutil.copytree(
                path, copy, copy_function=_link
            )
        NeMoModelCheckpoint.remove_checkpoint_unfinished_marker(directory / last)
    for name in paths_of:
        if name.endswith(_LAST) and name != last:
            NeMoModelCheckpoint.set_checkpoint_unfinished_marker(directory / name)
    NeMoModelCheckpoint._remove_unfinished_checkpoints(directory)
    return newest


def _place(name: str) -> float:
    """The samples that a checkpoint's name says were consumed."""
    found = re.search(r"consumed_samples=([\d.]+\d)", name)
    return float(found[1]) if found else -1.0


def _link(source: Any, target: Any) -> None:
    """A hard link, which takes no space; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
