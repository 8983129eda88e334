"""Which keys of the YAML are read, and which misspelt: asked of NeMo, Megatron and Lightning.

Each function returns keys as refuse_unknown_keys takes them: a mapping is a section whose own keys
are known, any other value a key that is read whatever it holds. Lists of our own would rot.
"""

import functools
import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from omegaconf import DictConfig

from nemo_kd.nemo.cpu_backend import GPU_OPTIMIZERS

Keys = dict[str, Any]

# Of NeMo's YAML for distributed_fused_adam; Apex, which reads them, is not everywhere to be asked.
_APEX_OPTIM_KEYS = {"bucket_cap_mb", "contiguous_param_buffer"}


def trainer_keys() -> Keys:
    """Of `trainer`: the arguments of Lightning's Trainer that NeMo's builder does not give it."""
    from lightning.pytorch import Trainer

    return dict.fromkeys(_arguments(Trainer) - {"callbacks", "plugins", "strategy"})


def exp_manager_keys() -> Keys:
    """Of `exp_manager`: its dataclass's fields, and what its loggers take."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from nemo.utils.exp_manager import ExpManagerConfig

    keys = _fields(ExpManagerConfig)
    keys["wandb_logger_kwargs"] = dict.fromkeys(_arguments(WandbLogger))
    if importlib.util.find_spec("wandb") is not None:
        import wandb

        keys["wandb_logger_kwargs"] |= dict.fromkeys(_arguments(wandb.init))
    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = _arguments(TensorBoardLogger) | _arguments(SummaryWriter)
        keys["summary_writer_kwargs"] = dict.fromkeys(writer)
    return keys


def model_keys(checkpoint: DictConfig) -> Keys:
    """Of a model: the config inside its .nemo, what NeMo's classes ask a config for, and the
    fields of Megatron's TransformerConfig, to which NeMo passes on the keys of their names.
    """
    from megatron.core.transformer import TransformerConfig
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

    names = (
        set(checkpoint)
        | {field.name for field in fields(TransformerConfig)}
        | _asked_for(MegatronGPTSFTModel, r"_?cfg")
        | _asked_for(MegatronTrainerBuilder, r"cfg\.model")
        | _asked_for(DistributedCheckpointIO, "model_cfg")
    )
    tokenizer = set(checkpoint.get("tokenizer", {})) | _asked_for(
        MegatronGPTSFTModel, r"_?cfg\.tokenizer"
    )
    return dict.fromkeys(names) | {"tokenizer": dict.fromkeys(tokenizer)}


def optim_keys(optim: Mapping[str, Any]) -> Keys:
    """Of `model.optim`: the arguments of the optimizer and of the scheduler that it names.

    Raises:
        ValueError: It names none that NeMo has.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    name, optimizers = optim.get("name"), sorted({*AVAILABLE_OPTIMIZERS, *GPU_OPTIMIZERS})
    if name not in optimizers:
        raise ValueError(f"model.optim.name: expected one of {', '.join(optimizers)}; got {name!r}")
    if name == "mcore_distributed_optim":  # which NeMo gives what it picks, and refuses no other
        keys = _asked_for(MegatronGPTSFTModel, r"optim(?:_config)?")
    else:
        # on a CPU torch's AdamW stands in for the GPU's
        keys = _arguments(AVAILABLE_OPTIMIZERS.get(name, torch.optim.AdamW)) - {"params"}
    if name == "distributed_fused_adam":
        keys |= _asked_for(MegatronGPTSFTModel, r"optim(?:_config|_kwargs)?") | _APEX_OPTIM_KEYS
    sched = optim.get("sched") or {}
    schedulers = {None: None, **AVAILABLE_SCHEDULERS}
    if sched.get("name") not in schedulers:
        raise ValueError(
            f"model.optim.sched.name: expected one of {', '.join(AVAILABLE_SCHEDULERS)}; got "
            f"{sched.get('name')!r}"
        )
    scheduler = schedulers[sched.get("name")]
    # max_steps is always the trainer's
    sched_keys = _arguments(scheduler) - {"optimizer", "max_steps"} if scheduler else set()
    return dict.fromkeys(keys | {"name", "lr"}) | {
        "sched": dict.fromkeys(sched_keys | {"name", "monitor"})
    }


def _arguments(function: Any) -> set[str]:
    """The named arguments of a function or class, and of its bases where it passes on the rest."""
    names: set[str] = set()
    for base in inspect.getmro(function) if inspect.isclass(function) else (function,):
        parameters = inspect.signature(base).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _fields(cls: type) -> Keys:
    """The fields of a dataclass and of those inside it."""
    keys: Keys = {}
    for name, hint in get_type_hints(cls).items():
        inside = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        keys[name] = _fields(inside[0]) if inside else None
    return keys


@functools.cache
def _asked_for(cls: type, config: str) -> set[str]:
    """The keys that the source of a class and its bases reads with .get("key") or ["key"].

    Args:
        cls: The class, of NeMo's.
        config: What the source calls the config, as a regular expression.
    """
    modules = {
        inspect.getmodule(base) for base in cls.__mro__ if base.__module__.startswith("nemo.")
    }
    source = "\n".join(inspect.getsource(module) for module in modules)
    return set(re.findall(rf"(?<!\w){config}(?:\.get\(|\[)\s*['\"](\w+)", source))
