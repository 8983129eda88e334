"""The teacher run on NeMo 2.4: checks and builds settings, data and model, and fills the cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.cache import CacheWriter, Manifest, TopKCache
from nemo_kd.cache.inspection import unsupervised
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.chat import Renderer, as_jsonl
from nemo_kd.config import CacheConfig, DataConfig, read_settings, refuse_unknown_keys
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import forget_short_fields, log_to, report_short_fields
from nemo_kd.nemo.integrity import restore_model
from nemo_kd.nemo.layout import check_layout, check_sequence_length, say_layout
from nemo_kd.nemo.lines import check_lines, check_tokens
from nemo_kd.nemo.nemo_file import read_model_config, tokenizer_of
from nemo_kd.nemo.rendered import renderer_of
from nemo_kd.nemo.sources import (
    build_samples,
    cut_sample,
    fingerprint_source,
    fingerprint_teacher,
    index_directory,
    with_found_format,
)
from nemo_kd.nemo.trainer import (
    build_trainer,
    initialize_model_parallel,
    on_rank_zero,
    prepare_accelerator,
)
from nemo_kd.nemo.values import check_yaml_values
from nemo_kd.process import say
from nemo_kd.selection import SelectionConfig
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.replica import PATIENCE, Replica
from nemo_kd.teacher.run import TeacherRun, check_supervision, parse_shards, refuse_share

# Settings of `data` that say where and how to read, and do not change the tokens. After an
# out-of-memory error a cache is resumed with a smaller micro batch: as with another TP or PP, its
# rows then agree to rounding.
_NOT_IN_MANIFEST = (
    "chat_template",
    "chat_template_kwargs",
    "file_names",
    "format",
    "hf_dataset",
    "index_mapping_dir",
    "max_unsupervised_share",
    "memmap_workers",
    "micro_batch_size",
    "num_workers",
    "train_on",
)
# Settings of `data` that shape the samples which this package renders.
_SHAPES_RENDERED = ("format", "train_on", "chat_template_kwargs", "max_seq_length", "add_eos")
# Settings of `selection` that shape the rows of each kind.
_SHAPES_ROWS = {"top_k": ("k",), "top_p": ("k", "p"), "sample": ("num_draws", "seed")}


def dump_teacher_topk(config: DictConfig) -> None:
    """Fill the cache that `config` describes: see examples/conf/dump_teacher_topk.yaml.

    Raises:
        ValueError: A setting, the data, the teacher or an existing cache does not fit; what the
            cache held stays.
    """
    data, selection, cache = check_settings(config)
    data = with_found_format(data)
    stored = read_model_config(config.teacher.restore_from_path, "teacher.restore_from_path")
    prepare_accelerator(config)
    teacher = _merge_teacher_config(config, stored, data)
    trainer = _start_megatron(config, teacher, data)
    # NCCL's time-out is shorter than the reading of a long file, or the wait for a shard that
    # another job fills; this group of gloo's has its own.
    everyone = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
    # Checked before the weights are read, so that a broken line costs seconds.
    manifest = on_rank_zero(lambda: _plan_cache(config, teacher, data, selection, cache), everyone)
    path = config.teacher.restore_from_path
    model = restore_model(MegatronGPTSFTModel, path, "teacher.restore_from_path", teacher, trainer)
    samples = build_samples(model, data, manifest.sources)
    if len(samples) != manifest.num_samples:
        raise ValueError(
            f"{list(data.file_names)}: expected {manifest.num_samples} samples, found "
            f"{len(samples)}: a file has changed since this run began"
        )
    on_rank_zero(
        lambda: check_supervision(samples, cut_sample, data.max_unsupervised_share), everyone
    )
    forget_short_fields()
    shards = parse_shards(cache.shards, manifest.num_shards)
    # Rank 0 creates the cache or refuses it before any other rank looks into it.
    writer = on_rank_zero(lambda: _open_cache(cache.path, manifest), everyone)
    replica, forward = _replica_and_forward(model, selection)
    shows_progress = replica.leads and parallel_state.get_data_parallel_rank() == 0
    try:
        run = TeacherRun(writer, replica, forward, samples, data, cut_sample)
        run.fill(shards, shows_progress)
        num_truncated = torch.tensor(run.num_truncated if replica.leads else 0)
        # A sum over the replicas. It also keeps each rank until all shards are there: a rank that
        # ended would take the job's process group from those that still fill a shard.
        torch.distributed.all_reduce(num_truncated, group=everyone)
    except RuntimeError:  # gloo's, when a rank that this one waits for has ended, maybe by SIGTERM
        replica.stop_if_asked_alone()
        raise
    if torch.distributed.get_rank() == 0:
        if num_truncated:
            say(
                f"truncated samples: {num_truncated} (data.max_seq_length="
                f"{data.max_seq_length}; each ends after the last turn of the assistant that fits)"
            )
        _report(writer, data)


def _plan_cache(
    config: DictConfig,
    teacher: DictConfig,
    data: DataConfig,
    selection: SelectionConfig,
    cache: CacheConfig,
) -> Manifest:
    """Check data, tokenizer and cache, and return what the cache will say of itself.

    Raises:
        ValueError: A line, a token, `selection.k`, `cache.shards` or what lies at `cache.path` does
            not fit.
    """
    tokenizer = tokenizer_of(teacher, Path(config.teacher.restore_from_path))
    renderer = renderer_of(data, tokenizer)
    sources = tuple(map(fingerprint_source, data.file_names))
    directory = index_directory(data.index_mapping_dir, sources)
    num_samples = sum(
        check_lines(as_jsonl(path, directory), data, "data", renderer) for path in data.file_names
    )
    check_tokens(data, tokenizer, "data")
    manifest = Manifest(
        selection=_shaping_selection(selection),
        dataset=shaping_data(data, renderer),
        codec=cache.codec,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher_fingerprint=fingerprint_teacher(config),
        sources=sources,
        num_samples=num_samples,
        samples_per_shard=cache.samples_per_shard,
    )
    parse_shards(cache.shards, manifest.num_shards)
    CacheWriter.check(cache.path, manifest)
    return manifest


def _report(writer: CacheWriter, data: DataConfig) -> None:
    """Print what the cache holds now; refuse a whole one with too few supervised tokens."""
    report_short_fields()
    num_samples = writer.manifest.num_samples
    if missing := writer.missing_shards():
        state = f"{len(missing)} of {writer.manifest.num_shards} shards are still missing"
    else:
        number = TopKCache(writer.path).num_unsupervised_samples()
        refuse_share(number, num_samples, data.max_unsupervised_share)
        state = f"the cache is whole; {unsupervised(number, num_samples)}"
    print(f"{writer.path}: {state}")


def _shaping_selection(selection: SelectionConfig) -> dict[str, Any]:
    """The settings that shape the rows, as the manifest has them."""
    row_settings = ("kind", "temperature", *_SHAPES_ROWS[selection.kind])
    return {name: getattr(selection, name) for name in row_settings}


def shaping_data(data: DataConfig, renderer: Renderer | None) -> dict[str, Any]:
    """The settings that shape the tokens, as the manifest has them."""
    if renderer is None:
        return {name: value for name, value in asdict(data).items() if name not in _NOT_IN_MANIFEST}
    return {
        **{name: getattr(data, name) for name in _SHAPES_RENDERED},
        "chat": True,  # as NeMo's chat samples, the answers of these keep their end token
        "chat_template_xxh3": renderer.fingerprint,
    }


def _open_cache(path: str, manifest: Manifest) -> CacheWriter:
    """Open it, and log beside it what the terminal does not show."""
    writer = CacheWriter.open(path, manifest)
    log_to(f"{writer.path}.log")
    return writer


def _start_megatron(config: DictConfig, teacher: DictConfig, data: DataConfig) -> Any:
    """Return the trainer, once Megatron's groups are up and the teacher fits them."""
    run = OmegaConf.create(
        {
            "trainer": config.trainer,
            "model": teacher,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )
    trainer = build_trainer(run)
    num_replicas = check_layout(teacher, trainer.world_size, "teacher")
    say_layout(teacher, trainer.world_size, num_replicas)
    check_sequence_length(teacher, "teacher", data.max_seq_length, "data.max_seq_length")
    with open_dict(teacher):  # NeMo's count of micro batches; this run does not use it
        teacher.global_batch_size = data.micro_batch_size * num_replicas
    initialize_model_parallel(trainer, teacher)
    return trainer


def _replica_and_forward(model: Any, selection: SelectionConfig) -> tuple[Replica, Teacher]:
    """This process's part in the teacher run, out of NeMo's model and Megatron's groups."""
    is_last_stage = parallel_state.is_pipeline_last_stage()
    replica = Replica(
        parallel_state.get_model_parallel_group(),
        leads=is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0,
    )
    (module,) = model.get_model_module_list()
    forward = Teacher(
        model.model,
        module,
        selection=selection,
        vocab_size=model.tokenizer.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        has_stages=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        replica=replica,
    )
    return replica, forward


def check_settings(config: DictConfig) -> tuple[DataConfig, SelectionConfig, CacheConfig]:
    """Read the sections that are this package's own.

    Raises:
        ValueError: There is a key that nothing reads, or a setting does not fit.
    """
    check_yaml_values(config, "dump_teacher_topk")
    refuse_unknown_keys(config, ("teacher", "data", "selection", "cache", "trainer"))
    return (
        read_settings(DataConfig, config.data, "data"),
        read_settings(SelectionConfig, config.selection, "selection"),
        read_settings(CacheConfig, config.cache, "cache"),
    )


def _merge_teacher_config(
    config: DictConfig, model_config: DictConfig, data: DataConfig
) -> DictConfig:
    """The .nemo's config, changed in place to what the run asks for and a forward pass needs."""
    with open_dict(model_config):
        model_config.update({k: v for k, v in config.teacher.items() if k != "restore_from_path"})
        model_config.precision = config.trainer.precision
        model_config.micro_batch_size = data.micro_batch_size
        model_config.answer_only_loss = data.answer_only_loss
        model_config.sep_id = data.sep_id
        model_config.data = {"chat": data.chat, "chat_prompt_tokens": data.chat_prompt_tokens}
        model_config.optim = {"name": "adamw", "lr": 0.0}  # NeMo reads its name
        model_config.gradient_as_bucket_view = False  # read on a GPU
        # What the run that wrote the .nemo had, and a forward pass over whole sequences has not.
        model_config.context_parallel_size = 1
        model_config.virtual_pipeline_model_parallel_size = None
        model_config.use_cpu_initialization = False
        model_config.update(dict.fromkeys(cpu_backend.CHECKPOINTED_ACTIVATIONS))
    if config.trainer.accelerator == "cpu":
        cpu_backend.prepare_model_config(model_config, "teacher")
    return model_config
