"""Any value of any key of any YAML is refused in one sentence that names the key, or is taken."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from runs import EXAMPLES
from test_config_keys import GIVEN, composed, paths

VALUES = {
    "null": None,
    "text": "abc",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "1e30": 1e30,
    "[]": [],
    "{}": {},
}


def check_of(name: str) -> Callable[[DictConfig], None]:
    """What an entry does with its settings before it reads a model."""
    if name == "train_kd_sft":
        return check_training
    if name == "dump_teacher_topk":
        from nemo_kd.nemo.dump import check_settings

        return check_settings
    if name.startswith("bridge/"):
        from nemo_kd.bridge import dump, train

        return dump.check_settings if "dump" in name else train.check_settings
    from nemo_kd.nemo.hf.exporter import export_hf_llama
    from nemo_kd.nemo.hf.importer import import_hf_llama

    return {"import_hf_llama": import_hf_llama, "export_hf_llama": export_hf_llama}[name]


def check_training(config: DictConfig) -> None:
    """The checks, and then Lightning's and NeMo's own: the trainer, its callbacks and loggers."""
    from nemo_kd.nemo.resume import start_exp_manager
    from nemo_kd.nemo.train import check_settings
    from nemo_kd.nemo.trainer import build_trainer, prepare_accelerator

    check_settings(config)
    if config.trainer.accelerator == "cpu":
        prepare_accelerator(config)
        config.trainer.devices = config.trainer.num_nodes = 1
        start_exp_manager(build_trainer(config), config.exp_manager)


def leaves(name: str) -> Iterator[str]:
    config = composed(name)
    for path in paths(OmegaConf.to_container(config)):
        if not isinstance(OmegaConf.select(config, ".".join(path)), DictConfig):
            yield ".".join(path)


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    """exp_manager is called in a process group. A model of an earlier test may have left one."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def outcome(name: str, check: Callable[[DictConfig], Any], key: str, value: Any) -> str:
    """ "" for a value that is taken, or the error's one line; any other error is raised."""
    # On a CPU the trainer can be made as well.
    makes_trainer = name == "train_kd_sft" and key.startswith(("name", "trainer", "exp_manager"))
    config = composed(name, *(["trainer.accelerator=cpu"] if makes_trainer else []))
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    try:
        check(config)
    except (ValueError, HydraException) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", GIVEN)
def test_any_value_of_any_key(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "bridge/train_kd_sft":  # as far as its checks look at a cache
        (tmp_path / "nowhere").mkdir()
        (tmp_path / "nowhere" / "manifest.json").touch()
    check, taken = check_of(name), []
    for key in leaves(name):
        line = outcome(name, check, key, VALUES[value])
        assert "\n" not in line, line
        if not line:
            taken.append(key)
        elif "found no nowhere" not in line:
            section = key.rpartition(".")[0]
            assert section in line or key in line, f"{key}={value}: {line}"
    mappings = {"data.chat_prompt_tokens", "model.data.chat_prompt_tokens"}
    for section in "data", "model.data.validation_ds":
        mappings.add(f"{section}.chat_template_kwargs")
    no_sets = {"dataset.validation_caches", "dataset.validation_files"}
    wrong = {"{}": mappings, "[]": no_sets}
    if value in wrong:
        assert {key for key in taken if "knowledge_distillation" not in key} <= wrong[value]


@pytest.mark.parametrize("name", GIVEN)
def test_a_missing_value_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_dir

    path = EXAMPLES / "conf" / name
    with initialize_config_dir(str(path.parent), version_base=None):
        config = compose(path.name)
    first = GIVEN[name][0].partition("=")[0]
    with pytest.raises(ValueError, match=f"^{first}: expected a text, got nothing$"):
        check_of(name)(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.data.train_ds.file_names=cache", "expected a list [...] of one or more values"),
        ("trainer.devices=0", "trainer.devices: expected an integer of at least 1, got 0"),
        ("trainer.val_check_interval=-1", "trainer.val_check_interval: expected an integer of"),
        ("exp_manager.checkpoint_callback_params.monitor=val_los", "expected one of validation_"),
        ("model.optim.betas=[0.9]", "model.optim.betas: expected a list [...] of 2 values"),
        (
            "model.loss_reduction=sum",
            "model.loss_reduction: expected one of 'micro_batch', 'token'",
        ),
        ("trainer=5", "trainer: expected a section of keys, got 5"),
    ],
)
def test_what_was_a_traceback(override: str, message: str) -> None:
    config = composed("train_kd_sft")
    key, _, value = override.partition("=")
    OmegaConf.update(config, key, OmegaConf.create(f"x: {value}").x, merge=False)
    with pytest.raises(ValueError) as error:
        check_of("train_kd_sft")(config)
    assert message in str(error.value)


def test_every_preset_has_values_that_are_taken() -> None:
    from nemo_kd.nemo.train import check_monitor
    from nemo_kd.yaml_rules import check_yaml_values

    presets = sorted(path.stem for path in (EXAMPLES / "conf/experiment").glob("*.yaml"))
    assert presets
    for preset in presets:
        name = "dump_teacher_topk" if preset.endswith("_dump") else "train_kd_sft"
        config = composed(name, f"+experiment={preset}")
        check_yaml_values(config, name)
        if name == "train_kd_sft":
            check_monitor(config)
    assert os.environ.get("HYDRA_FULL_ERROR") != "1"
