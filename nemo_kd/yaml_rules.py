"""What the values of the YAML files of all hosts may be, where their defaults do not say it."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_kd.config import FORMATS
from nemo_kd.values import (
    ANY,
    NULL,
    TEXT,
    TEXTS,
    Rule,
    check_values,
    either,
    list_of,
    number,
    one_of,
    whole,
)

_CONF = Path(__file__).parent / "conf"
_TEXT_OR_NULL = either(TEXT, NULL)
_SHARE = number(0, 1)
_BETA = Rule("a number from 0, below 1", lambda value: number(0, 1).holds(value) and value != 1)
_WEIGHT_INIT = one_of("xavier", "normal", "kaiming", "zero")
_METRICS = ("loss", "exact_string_match", "rouge", "accuracy", "average_precision", "f1")
_MAPPING_OR_NULL = either(NULL, Rule("a mapping {...}", lambda value: isinstance(value, dict)))
_DECAYS = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_PRECISIONS = ("bf16-mixed", "bf16", "16-mixed", "bf16-true", "16-true", "32-true", "16", "32")

_TRAINER = {
    "trainer.accelerator": one_of("gpu", "cpu"),
    "trainer.precision": one_of(*_PRECISIONS, 16, 32),
    "trainer.logger": one_of(False),
    "trainer.enable_checkpointing": one_of(False),
    "trainer.use_distributed_sampler": one_of(False),
}
# Of NeMo's SFT data, in both runs.
_DATA = {
    "file_names": TEXTS,
    "max_seq_length": whole(2),
    "num_workers": whole(0),
    "sep_id": whole(0),
    "truncation_method": one_of("left", "right"),
    "format": one_of("auto", *FORMATS),
    "train_on": one_of("all_assistant", "last_assistant"),
    "chat_template": _TEXT_OR_NULL,
    "chat_template_kwargs": _MAPPING_OR_NULL,
    "index_mapping_dir": _TEXT_OR_NULL,
    "memmap_workers": either(whole(1), NULL),
    "seed": whole(0),
}
_TRAIN = {
    "save_to": either(NULL, Rule("a path", lambda value: type(value) is str)),
    "save_checkpoint": one_of("last", "best"),
    "trainer.max_epochs": either(one_of(-1), whole(1)),
    "trainer.max_steps": whole(0),
    "trainer.val_check_interval": either(
        whole(1), Rule("a share of 1.0", lambda value: type(value) is float and 0 < value <= 1)
    ),
    "trainer.limit_val_batches": either(whole(0), _SHARE),
    "trainer.gradient_clip_val": either(number(), NULL),
    "exp_manager.explicit_log_dir": _TEXT_OR_NULL,
    "exp_manager.exp_dir": _TEXT_OR_NULL,
    "exp_manager.wandb_logger_kwargs.*": _TEXT_OR_NULL,
    "exp_manager.checkpoint_callback_params.mode": one_of("min", "max"),
    "exp_manager.checkpoint_callback_params.save_top_k": whole(-1),
    "model.seed": whole(0),
    "model.activations_checkpoint_granularity": either(one_of("selective", "full"), NULL),
    "model.activations_checkpoint_method": either(one_of("uniform", "block"), NULL),
    "model.activations_checkpoint_num_layers": either(whole(1), NULL),
    "model.activations_checkpoint_layers_per_pipeline": either(whole(0), NULL),
    "model.hidden_dropout": _SHARE,
    "model.attention_dropout": _SHARE,
    "model.sep_id": whole(0),
    "model.loss_reduction": one_of("micro_batch", "token"),
    "model.knowledge_distillation.*": ANY,  # read_settings checks them, schedules included
    "model.peft.peft_scheme": either(one_of("lora"), NULL),
    "model.peft.restore_from_path": _TEXT_OR_NULL,
    "model.peft.lora_tuning.variant": one_of("nemo", "canonical"),
    "model.peft.lora_tuning.target_modules": list_of(
        one_of(
            *("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
            *("attention", "mlp", "all"),
        )
    ),
    "model.peft.lora_tuning.alpha": either(number(), NULL),
    "model.peft.lora_tuning.adapter_dropout": _SHARE,
    "model.peft.lora_tuning.dropout_position": one_of("post", "pre"),
    "model.peft.lora_tuning.column_init_method": _WEIGHT_INIT,
    "model.peft.lora_tuning.row_init_method": _WEIGHT_INIT,
    "model.peft.lora_tuning.layer_selection": either(list_of(whole(1)), NULL),
    "model.peft.lora_tuning.position_embedding_strategy": either(
        one_of("add", "biasadd", "concat", "mlpconcat"), NULL
    ),
    "model.data.chat_prompt_tokens": _MAPPING_OR_NULL,
    "model.data.sample_weight": one_of("token", "constant"),
    "model.data.train_ds.concat_sampling_probabilities": either(list_of(number()), NULL),
    "model.data.validation_ds.names": either(TEXTS, NULL),
    "model.data.validation_ds.metric.name": one_of(*_METRICS),
    "model.data.validation_ds.metric.average": either(one_of("micro", "macro", "weighted"), NULL),
    "model.data.validation_ds.metric.num_classes": either(whole(2), NULL),
    "model.data.validation_ds.output_file_path_prefix": _TEXT_OR_NULL,
    "model.data.validation_ds.tokens_to_generate": whole(0),
    "model.optim.betas": list_of(_BETA, 2),
    "model.optim.sched.warmup_steps": whole(0),
    **{
        f"model.data.{name}.{k}": v
        for name in ("train_ds", "validation_ds")
        for k, v in _DATA.items()
    },
}
# Of the teacher run on both hosts.
_DUMP = {
    **{f"data.{key}": rule for key, rule in _DATA.items()},
    "data.chat_prompt_tokens": _MAPPING_OR_NULL,
    "data.max_unsupervised_share": _SHARE,
    "selection.*": ANY,  # read_settings checks them
    "cache.path": TEXT,
    "cache.shards": either(TEXT, whole(0), NULL),
}
_TEXTS_OR_NONE = either(TEXTS, Rule("an empty list []", lambda value: value == []))
_BRIDGE = {"device": one_of("gpu", "cpu"), "model.hf_path": TEXT}
_BRIDGE_TRAIN = {
    **_BRIDGE,
    "save_hf": _TEXT_OR_NULL,
    "model.seq_length": whole(2),
    "knowledge_distillation.*": ANY,  # read_settings checks them, schedules included
    "dataset.train_caches": TEXTS,
    "dataset.validation_caches": _TEXTS_OR_NONE,
    "dataset.validation_files": _TEXTS_OR_NONE,
    "dataset.names": either(TEXTS, NULL),
    "dataset.weights": either(list_of(number()), NULL),
    "dataset.seed": whole(0),
    "dataset.num_workers": whole(0),
    **{f"data.{key}": rule for key, rule in _DATA.items()},
    "data.chat_prompt_tokens": _MAPPING_OR_NULL,
    "peft.peft_scheme": either(one_of("lora"), NULL),
    "peft.dropout": _SHARE,
    "peft.dropout_position": one_of("pre", "post"),
    "train.train_iters": whole(0),
    "optimizer.optimizer": one_of("adam", "sgd", "muon", "dist_muon"),
    "optimizer.adam_beta1": _BETA,
    "optimizer.adam_beta2": _BETA,
    "scheduler.lr_decay_style": one_of(*_DECAYS),
    "scheduler.lr_decay_iters": either(whole(1), NULL),
    "scheduler.lr_warmup_iters": whole(0),
    "checkpoint.save": _TEXT_OR_NULL,
    "checkpoint.load": _TEXT_OR_NULL,
    "checkpoint.most_recent_k": whole(-1),
    "logger.tensorboard_dir": _TEXT_OR_NULL,
    **{f"logger.wandb_{key}": _TEXT_OR_NULL for key in ("project", "exp_name", "save_dir")},
}
_RULES = {
    "bridge/dump_teacher_topk": _BRIDGE | _DUMP,
    "bridge/train_kd_sft": _BRIDGE_TRAIN,
    "train_kd_sft": {"model.restore_from_path": TEXT, **_TRAINER, **_TRAIN},
    "dump_teacher_topk": {
        "teacher.restore_from_path": TEXT,
        **_TRAINER,
        **_DUMP,
    },
    "import_hf_llama": {
        **dict.fromkeys(("source", "output"), TEXT),
        "keep_layers": either(list_of(whole(0)), NULL),
    },
    "evaluate_students": {
        "students": Rule(
            "a list of students, or a YAML file with one",
            lambda value: isinstance(value, list) or TEXT.holds(value),
        ),
        "tasks": TEXTS,
        "output": TEXT,
        **dict.fromkeys(("data_dir", "include_path"), _TEXT_OR_NULL),
        **dict.fromkeys(("limit", "max_length"), either(whole(1), NULL)),
        "device": one_of("gpu", "cpu"),
        "dtype": one_of("auto", "bfloat16", "float16", "float32"),
    },
    "generate_answers": {
        "engine": one_of("transformers", "server"),
        "device": one_of("gpu", "cpu"),
        **dict.fromkeys(("output", "model.hf_path"), TEXT),
        "model.dtype": one_of("bfloat16", "float16", "float32"),
        **{f"data.{key}": rule for key, rule in _DATA.items()},
        "data.chat_prompt_tokens": _MAPPING_OR_NULL,
        "sampling.*": ANY,  # read_settings checks them
        "server.base_url": _TEXT_OR_NULL,
        "server.model": _TEXT_OR_NULL,
        **dict.fromkeys(("server.max_failures", "server.max_retries"), whole(0)),
        "capture.path": _TEXT_OR_NULL,
        "capture.codec": one_of("packed", "raw"),
    },
    "filter_answers": {
        "output": TEXT,
        "filters": list_of(
            Rule("a name or a mapping", lambda value: isinstance(value, dict) or TEXT.holds(value))
        ),
        **{f"data.{key}": rule for key, rule in _DATA.items()},
        **dict.fromkeys(("cache.source", "cache.path"), _TEXT_OR_NULL),
    },
    "rounds": {
        **dict.fromkeys(("teacher", "student", "output"), TEXT),
        "prompts": TEXTS,
        "device": one_of("gpu", "cpu"),
        **dict.fromkeys(("heldout_caches", "sft.caches"), _TEXTS_OR_NONE),
        "sft.share": _SHARE,
    },
    "export_hf_llama": {
        **dict.fromkeys(("source", "output"), TEXT),
        "dtype": either(one_of("bfloat16", "float16", "float32"), NULL),
    },
}


def check_yaml_values(config: Any, name: str) -> None:
    """Check every value of a run's config against conf/NAME.yaml, before anything is read.

    Raises:
        ValueError: A value is missing, or none that the run can take; names the key.
    """
    check_values(config, OmegaConf.load(_CONF / f"{name}.yaml"), _RULES[name])
