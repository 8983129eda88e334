"""settings.json beside the checkpoints: what a run trains, so that no other run resumes from them.

Its keys are those of the run's YAML, and files stand there by their content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_kd.cache import TopKCache
from nemo_kd.cache.manifest import fingerprint_model

_NAME = "settings.json"
# Keys of `knowledge_distillation` that decide how the loss is computed, not what it is.
_SHAPES_NOTHING = ("logits_gather", "fuse_output_layer")


def objective_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of `knowledge_distillation` says what is trained."""
    return {key: value for key, value in section.items() if key not in _SHAPES_NOTHING}


def fingerprints_of(caches: Iterable[str]) -> list[str]:
    """The caches of these directories by their content."""
    return [TopKCache(path).manifest.fingerprint for path in caches]


def settings_of(config: dict[str, Any], student: str) -> dict[str, Any]:
    """What a run trains, of a YAML whose sections are named as below: those of Megatron-Bridge.

    Args:
        config: The YAML.
        student: The fingerprint of the student's files.
    """
    model, dataset, iterations = config["model"], config["dataset"], config["train"]["train_iters"]
    scheduler = config["scheduler"]
    decay = {"lr_decay_iters": scheduler["lr_decay_iters"] or iterations}
    shape = {key: model[key] for key in ("seq_length", "calculate_per_token_loss")}
    order = {key: dataset[key] for key in ("weights", "seed", "packed_sequence")}
    return {
        "knowledge_distillation": objective_of(config["knowledge_distillation"]),
        "model": {"hf_path": student, **shape},
        "dataset": {"train_caches": fingerprints_of(dataset["train_caches"]), **order},
        "train": {"global_batch_size": config["train"]["global_batch_size"]},
        "optimizer": {k: v for k, v in config["optimizer"].items() if "distributed" not in k},
        "scheduler": scheduler | decay,
        "peft": config["peft"] if config["peft"]["peft_scheme"] else {},
    }


def keep_record(config: dict[str, Any], student_files: Iterable[Path], resumes: bool) -> None:
    """Keep beside the checkpoints what a run trains. Call it on rank 0 only.

    Args:
        config: As of `settings_of`; `checkpoint` and `resume_changed` are read of it as well.
        student_files: The student as the run found it.
        resumes: Whether there is a checkpoint to resume from.

    Raises:
        ValueError: The checkpoint to resume from is of a run with other settings.
    """
    if config["train"]["train_iters"] == 0:  # validates alone
        return
    settings = settings_of(config, fingerprint_model(student_files))
    directory, loaded = config["checkpoint"]["save"], config["checkpoint"]["load"]
    if resumes and not config["resume_changed"]:
        check_record(Path(loaded or directory), settings, "", "Give it another checkpoint.save")
    if directory is not None:
        write_record(Path(directory), settings)


def check_record(directory: Path, settings: dict[str, Any], above: str, remedy: str) -> None:
    """Compare what a run trains with what the run trained that left the directory's checkpoints.

    Args:
        directory: Where the checkpoints are. One without settings.json is not checked.
        settings: What this run trains.
        above: The section of the YAML in which the settings are; "" if they are whole sections.
        remedy: What a user can do, if the run is to be another one.

    Raises:
        ValueError: They differ, which names both values of each key; or settings.json is damaged.
    """
    record = directory / _NAME
    if not record.exists():
        return
    try:
        before: dict[str, Any] = dict(json.loads(record.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{record} is damaged: it says with which settings the run began; if they are those of "
            "this command, remove it"
        ) from error
    if changed := changes(before, settings, above):
        raise ValueError(
            f"{directory} has the checkpoints of a run with other settings: {changed}. "
            f"{remedy}, or set resume_changed=true to continue with the new ones"
        )


def changes(before: dict[str, Any], settings: dict[str, Any], above: str = "") -> str:
    """Both values of each key that differs between a record and the settings of a run; or ""."""
    old, new = _flat(before, above), _flat(_as_stored(settings), above)
    return "; ".join(
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )


def write_record(directory: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f"{_NAME}.tmp"
    temporary.write_text(json.dumps(_as_stored(settings), indent=2) + "\n")
    os.replace(temporary, directory / _NAME)


def renew_optimizer(param_groups: Iterable[dict[str, Any]], settings: Any) -> None:
    """Give a resumed optimizer, in place, the settings of this run: a checkpoint has the old ones.

    Args:
        param_groups: Of Megatron's optimizer.
        settings: Megatron's OptimizerConfig of this run.
    """
    new = {
        "max_lr": settings.lr,
        "min_lr": settings.min_lr,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_eps,
    }
    for group in param_groups:
        group.update({key: value for key, value in new.items() if key in group})


def find_groups_by_kind() -> None:
    """Let an optimizer take the parameter groups of a checkpoint whose learning rate is another.

    Megatron Core 0.19 looks for a group also by its learning rates and its weight decay.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    kinds = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = kinds


def _as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True))
    return stored


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{key}.{name}" if key else name)
    return flat
