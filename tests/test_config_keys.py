"""A misspelt key is refused: by Hydra, by our own sections, or by Lightning."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict
from runs import EXAMPLES

GIVEN = {
    "train_kd_sft": [
        "model.restore_from_path=student.nemo",
        "model.data.train_ds.file_names=[cache]",
        "model.data.validation_ds.file_names=[cache]",
    ],
    "dump_teacher_topk": [
        "teacher.restore_from_path=teacher.nemo",
        "data.file_names=[train.jsonl]",
        "cache.path=cache",
    ],
    "bridge/train_kd_sft": [
        "model.hf_path=student-hf",
        "dataset.train_caches=[nowhere]",
        "save_hf=kd-hf",
    ],
    "bridge/dump_teacher_topk": [
        "model.hf_path=teacher-hf",
        "data.file_names=[train.jsonl]",
        "cache.path=cache",
    ],
    "import_hf_llama": ["source=nowhere", "output=student.nemo"],
    "export_hf_llama": ["source=nowhere", "output=new-directory"],
}


# The sections whose keys are ours. A key that + or a preset adds there is refused, too.
OWN = {
    "train_kd_sft": ["", "model.knowledge_distillation"],
    "dump_teacher_topk": ["", "data", "selection", "cache"],
    "bridge/train_kd_sft": ["", "knowledge_distillation"],
    "bridge/dump_teacher_topk": ["", "data", "selection", "cache"],
    "import_hf_llama": [""],
    "export_hf_llama": [""],
}


def check_of(name: str) -> Callable[[DictConfig], Any]:
    """The checks that an entry makes at its start."""
    if name == "train_kd_sft":
        from nemo_kd.nemo.train import check_settings

        return check_settings
    if name == "dump_teacher_topk":
        from nemo_kd.nemo.dump import check_settings

        return check_settings
    if name == "bridge/dump_teacher_topk":
        from nemo_kd.bridge.dump import check_settings as check_dump

        return check_dump

    from nemo_kd.bridge.train import check_settings as check_bridge
    from nemo_kd.nemo.hf.exporter import export_hf_llama
    from nemo_kd.nemo.hf.importer import import_hf_llama

    begin = {
        "bridge/train_kd_sft": check_bridge,
        "import_hf_llama": import_hf_llama,
        "export_hf_llama": export_hf_llama,
    }[name]

    def check(config: DictConfig) -> None:
        with pytest.raises(ValueError) as error:
            begin(config)
        if not re.search("found no(ne at)? nowhere", str(error.value)):
            raise error.value

    return check


def composed(name: str, *overrides: str) -> DictConfig:
    path = EXAMPLES / "conf" / name
    with initialize_config_dir(str(path.parent), version_base=None):
        return compose(path.name, [*GIVEN[name], *overrides])


def paths(section: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from paths(value, *above, key)


@pytest.mark.parametrize("name", GIVEN)
def test_hydra_refuses_a_misspelt_key_wherever_it_stands(name: str) -> None:
    found = list(paths(OmegaConf.to_container(composed(name))))
    assert set(found) == {
        path
        for path in paths(OmegaConf.to_container(OmegaConf.load(EXAMPLES / f"conf/{name}.yaml")))
        if path[0] not in ("defaults", "hydra")
    }
    for path in found:
        with pytest.raises(ConfigCompositionException):
            composed(name, f"{'.'.join(path)}_=1")


@pytest.mark.parametrize("name", GIVEN)
def test_an_added_key_of_our_own_sections_is_refused(name: str) -> None:
    check, config = check_of(name), composed(name)
    check(config)
    for where in OWN[name]:
        section = OmegaConf.select(config, where) if where else config
        for key in list(section):
            misspelt = copy.deepcopy(config)
            changed = OmegaConf.select(misspelt, where) if where else misspelt
            with open_dict(changed):
                changed[f"{key}_"] = changed[key]
            path = f"{where}.{key}" if where else key
            message = f"{path}_ is a key that nothing reads; did you mean {path}?"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                check(misspelt)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.optim.name=fused_adan"], "model.optim.name: expected one of"),
        (["model.optim.sched.name=Cosine"], "model.optim.sched.name: expected one of"),
        (["+defaults=1"], "defaults is a key that nothing reads"),
    ],
)
def test_what_nothing_reads_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_of("train_kd_sft")(composed("train_kd_sft", *overrides))


@pytest.mark.parametrize("name", ["distributed_fused_adam", "mcore_distributed_optim"])
def test_a_gpus_optimizer_is_known_on_a_cpu(name: str) -> None:
    check_of("train_kd_sft")(
        composed("train_kd_sft", f"model.optim.name={name}", "~model.optim.sched")
    )


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train_kd_sft", ["exp_manager.create_wandb_logger=true"]),
        (
            "bridge/train_kd_sft",
            ["logger.wandb_project=kd", "logger.tensorboard_dir=x", "logger.wandb_save_dir=x"],
        ),
    ],
)
def test_a_logger_that_is_not_installed_is_refused(
    name: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    config = composed(name, *overrides)
    if name.startswith("bridge/"):
        from nemo_kd.bridge.train import check_settings as check

        (tmp_path / "manifest.json").touch()  # as far as the checks look at a cache
        config.dataset.train_caches = [str(tmp_path)]
    else:
        from nemo_kd.nemo.train import check_settings as check
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "wandb" else find_spec(name, *more),
    )
    with pytest.raises(ValueError, match="needs the package wandb"):
        check(config)
