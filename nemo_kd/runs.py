"""The commands of nemo-kd that run what the scripts in examples/ run, with the same keys."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

CONF = Path(__file__).parent / "conf"


class Run(NamedTuple):
    """A command whose arguments are a YAML's keys."""

    name: str  # of its YAML in CONF, and of its function
    module: str  # the function's, in the package of the host, or without a host in nemo_kd
    text: str  # of --help
    hosts: tuple[str, ...] = ()  # the first of them without --host


RUNS = {
    "dump": Run(
        "dump_teacher_topk",
        "dump",
        "run the teacher once: a cache of its top-K",
        ("nemo", "bridge"),
    ),
    "train": Run("train_kd_sft", "train", "train a student on a cache", ("nemo", "bridge")),
    "evaluate": Run(
        "evaluate_students", "evaluate.run", "judge students by tasks: MMLU, HumanEval, MBPP, ..."
    ),
    "import-hf": Run(
        "import_hf_llama",
        "hf.importer",
        "turn a Hugging Face checkpoint into a .nemo",
        ("nemo",),
    ),
    "export-hf": Run(
        "export_hf_llama",
        "hf.exporter",
        "turn a .nemo into a Hugging Face checkpoint",
        ("nemo",),
    ),
    "generate": Run("generate_answers", "generate.run", "let a model write answers to prompts"),
    "filter": Run(
        "filter_answers", "filters.run", "leave out answers that are cut, repeated or wrong"
    ),
}


def run(command: str, overrides: list[str]) -> None:
    """Call a run's function with its YAML and the overrides, as the example of its name does."""
    import hydra
    from omegaconf import DictConfig

    from nemo_kd.process import announce, answer_help, user_errors

    name, module, *_ = RUNS[command]
    host = _taken_host(command, overrides)
    conf = CONF / "bridge" if host == "bridge" else CONF

    @hydra.main(version_base=None, config_path=str(conf), config_name=name)
    def call(config: DictConfig) -> None:
        with user_errors():
            announce(config)
            if command == "import-hf":  # as in examples/import_hf_llama.py
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            found = _of_host(host, module) if host else importlib.import_module(f"nemo_kd.{module}")
            getattr(found, name)(config)

    sys.argv = [f"nemo-kd {command}", *overrides]  # Hydra reads its arguments there
    answer_help(conf / f"{name}.yaml")
    call()


def installed_host() -> Any:
    """The module of this environment's host that makes samples and reads tokenizers.

    Raises:
        ValueError: This environment has no host.
    """
    if find_spec("nemo") is not None or find_spec("megatron.bridge") is None:
        samples = _of_host("nemo", "samples")
        from nemo_kd.nemo.console import quiet_host

        quiet_host()
        return samples
    import torch

    from nemo_kd.bridge import console, cpu_backend

    console.quiet_host()
    if not torch.cuda.is_available():
        cpu_backend.enable()
    return _of_host("bridge", "dataset")


def _of_host(host: str, module: str) -> Any:
    """A module of a host.

    Raises:
        ValueError: This environment has not got that host.
    """
    needed, make = {"nemo": ("nemo", "setup"), "bridge": ("megatron.bridge", "setup-bridge")}[host]
    if find_spec(needed) is None:
        raise ValueError(
            f"this environment has no {needed}, which is needed here; call it in the environment "
            f"of that host (make {make}), or for dump and train choose --host"
        )
    return importlib.import_module(f"nemo_kd.{host}.{module}")


def _taken_host(command: str, overrides: list[str]) -> str | None:
    """Take `--host HOST` out of a run's arguments; without it the host is the run's first."""
    hosts = RUNS[command].hosts
    if "--host" not in overrides:
        return hosts[0] if hosts else None
    place = overrides.index("--host")
    host = "".join(overrides[place + 1 : place + 2])
    if host not in hosts or len(hosts) == 1:
        sys.exit(
            f"nemo-kd {command}: expected --host nemo or --host bridge with dump or train, got "
            f"--host {host}"
        )
    del overrides[place : place + 2]
    return host
