"""Every key of every YAML is known, and a misspelt one is refused, in every section."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from runs import EXAMPLES

# the config inside a .nemo: what NeMo reads without a default is always there
CHECKPOINT = OmegaConf.create(
    {"mcore_gpt": True, "num_layers": 2, "tokenizer": {"library": "huggingface", "type": "gpt2"}}
)
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
    "import_hf_llama": ["source=nowhere", "output=student.nemo"],
    "export_hf_llama": ["source=nowhere", "output=new-directory"],
}


def check_of(name: str) -> Callable[[DictConfig], Any]:
    """What refuses a key of this entry, at its start."""
    if name == "train_kd_sft":
        from nemo_kd.nemo.train import check_settings

        return partial(check_settings, student=CHECKPOINT)
    if name == "dump_teacher_topk":
        from nemo_kd.nemo.dump import check_settings

        return partial(check_settings, teacher=CHECKPOINT)

    from nemo_kd.nemo.hf_export import export_hf_llama
    from nemo_kd.nemo.hf_import import import_hf_llama

    convert = {"import_hf_llama": import_hf_llama, "export_hf_llama": export_hf_llama}[name]

    def check(config: DictConfig) -> None:
        with pytest.raises(ValueError) as error:
            convert(config)
        if "found no nowhere" not in str(error.value):
            raise error.value

    return check


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        return compose(name, [*GIVEN[name], *overrides])


def paths(section: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from paths(value, *above, key)


@pytest.mark.parametrize("name", GIVEN)
def test_a_misspelt_key_is_refused_wherever_it_stands(name: str) -> None:
    check, config = check_of(name), composed(name)
    check(config)
    found = list(paths(OmegaConf.to_container(config)))
    assert set(found) == {
        path
        for path in paths(OmegaConf.to_container(OmegaConf.load(EXAMPLES / f"conf/{name}.yaml")))
        if path[0] not in ("defaults", "hydra")
    }
    for *sections, key in found:
        misspelt = copy.deepcopy(config)
        section = OmegaConf.select(misspelt, ".".join(sections)) if sections else misspelt
        with open_dict(section):
            section[f"{key}_"] = section[key]
        path = ".".join((*sections, f"{key}_"))
        message = f"{path} is a key that nothing reads; did you mean {path.removesuffix('_')}?"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            check(misspelt)


DISTRIBUTED = ["overlap_grad_sync", "overlap_param_sync", "grad_sync_dtype"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train_kd_sft", ["+trainer.deterministic=true", "+trainer.limit_train_batches=2"]),
        ("train_kd_sft", ["exp_manager=null"]),
        (
            "train_kd_sft",
            [
                "+exp_manager.max_time_per_run=00:03:50:00",
                "+exp_manager.ema.decay=0.9",
                "+exp_manager.checkpoint_callback_params.save_last=true",
                "+exp_manager.wandb_logger_kwargs.group=kd",
                "+exp_manager.summary_writer_kwargs.flush_secs=9",
            ],
        ),
        (
            "train_kd_sft",
            [
                "+model.virtual_pipeline_model_parallel_size=2",  # of Megatron's TransformerConfig
                "+model.ub_tp_comm_overlap=true",  # NeMo's own
                "+model.dist_ckpt_format=torch_dist",  # of NeMo's checkpoints
                "+model.native_amp_init_scale=1024",  # of NeMo's trainer builder
                "+model.tokenizer.type=elsewhere",
                "+model.tokenizer.use_fast=true",
            ],
        ),
        (
            "train_kd_sft",
            ["+model.optim.eps=1e-6", "~model.optim.sched", "+model.optim.amsgrad=true"],
        ),
        ("train_kd_sft", ["+model.optim.sched.warmup_ratio=0.1"]),
        *(
            ("train_kd_sft", [f"model.optim.name={name}", *(f"+model.optim.{k}=1" for k in more)])
            for name, more in {
                "mcore_distributed_optim": [*DISTRIBUTED, "ddp_bucket_size", "delay_grad_reduce"],
                "distributed_fused_adam": [*DISTRIBUTED, "bucket_cap_mb"],
            }.items()
        ),
        ("dump_teacher_topk", ["+teacher.rotary_base=5000", "+trainer.benchmark=true"]),
    ],
)
def test_what_nemo_reads_may_be_added(name: str, overrides: list[str]) -> None:
    check_of(name)(composed(name, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer.max_stepz=1"], "did you mean trainer.max_steps?"),
        (["+trainer.strategy=ddp"], "trainer.strategy is a key that nothing reads"),  # NeMo's own
        (["+exp_manager.ema.dekay=1"], "did you mean exp_manager.ema.decay?"),
        (["+model.tokenizer.typ=x"], "did you mean model.tokenizer.type?"),
        (["+model.optim.overlap_grad_sync=true"], "a key that nothing reads"),  # not by fused_adam
        (
            ["model.optim.name=mcore_distributed_optim", "+model.optim.bucket_cap_mb=125"],
            "model.optim.bucket_cap_mb is a key that nothing reads",
        ),
        (["+model.optim.sched.max_steps=5"], "a key that nothing reads"),  # the trainer's count
        (["model.optim.name=fused_adan"], "model.optim.name: expected one of"),
        (["model.optim.sched.name=Cosine"], "model.optim.sched.name: expected one of"),
        (["+defaults=1"], "defaults is a key that nothing reads"),
    ],
)
def test_what_nothing_reads_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_of("train_kd_sft")(composed("train_kd_sft", *overrides))


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    check = check_of("train_kd_sft")
    config = composed("train_kd_sft", "exp_manager.create_wandb_logger=true")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "wandb" else find_spec(name, *more),
    )
    with pytest.raises(ValueError, match="needs the package wandb"):
        check(config)
