"""The teacher run: SFT jsonl -> NeMo's dataset -> forward through Megatron -> rows -> cache.

Each data-parallel replica of the teacher, of this job and of any other on the same cache, claims a
missing shard, fills it and claims the next. Within a shard, samples go through in windows; a
window's samples are sorted by length, so that the micro batches waste little on padding, and
written in their own order. So every micro batch depends on the shard and the manifest alone.
"""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from nemo_kd.cache import CacheWriter, Manifest
from nemo_kd.config import CacheConfig, DataConfig, read_settings, refuse_unknown_keys
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.dataset import tokenizer_fingerprint
from nemo_kd.nemo.known_keys import model_keys, trainer_keys
from nemo_kd.nemo.layout import check_layout, check_sequence_length
from nemo_kd.nemo.nemo_file import read_model_config
from nemo_kd.nemo.sources import build_samples, check_source, cut_sample, fingerprint_teacher
from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel, prepare_accelerator
from nemo_kd.process import exit_stopped, shield_workers
from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows

# Micro batches that are sorted by length together; their rows wait in the host's memory.
_MICRO_BATCHES_PER_WINDOW = 16
_TOKENS_PER_SELECTION = 256
# How long replicas wait for each other's shards.
_PATIENCE = timedelta(days=7)
# Seconds between looks at what other jobs have left: each is a few operations a claim.
_POLL_S = 5
# In the place of a shard's number: the leader was asked to stop while it waited.
_STOP = -1
# Settings of `data` that say where and how to read, not what the tokens are.
_NOT_IN_MANIFEST = (
    "file_names",
    "hf_dataset",
    "index_mapping_dir",
    "memmap_workers",
    "min_seq_length",
    "num_workers",
)


def dump_teacher_topk(config: DictConfig) -> None:
    """Fill the cache that `config` describes: see examples/conf/dump_teacher_topk.yaml.

    Raises:
        ValueError: A setting, the data, the teacher or an existing cache does not fit; what the
            cache held stays.
    """
    teacher = read_model_config(config.teacher.restore_from_path, "teacher.restore_from_path")
    data, selection, cache = check_settings(config, teacher)
    prepare_accelerator(config)
    teacher_config = _merge_teacher_config(config, teacher, data)
    run = OmegaConf.create(
        {
            "trainer": config.trainer,
            "model": teacher_config,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )
    trainer = build_trainer(run)
    num_replicas = check_layout(teacher_config, trainer.world_size, "teacher")
    check_sequence_length(teacher_config, "teacher", data.max_seq_length, "data.max_seq_length")
    with open_dict(teacher_config):  # NeMo's count of micro batches; this run does not use it
        teacher_config.global_batch_size = data.micro_batch_size * num_replicas
    initialize_model_parallel(trainer, teacher_config)
    # gloo, whose time-out is this job's own: NCCL's is shorter than a long file takes to read, or
    # than the wait for a shard that another job holds.
    everyone = torch.distributed.new_group(timeout=_PATIENCE, backend="gloo")
    # Before the weights are read: a broken line costs seconds, not the loading of a teacher.
    sources = _on_rank_zero(
        lambda: [check_source(path, data) for path in data.file_names], everyone
    )
    teacher_fingerprint = _on_rank_zero(lambda: fingerprint_teacher(config), everyone)
    model = MegatronGPTSFTModel.restore_from(
        config.teacher.restore_from_path,
        override_config_path=teacher_config,
        trainer=trainer,
    )
    if selection.kind != "sample" and selection.k > model.tokenizer.vocab_size:
        raise ValueError(
            f"expected selection.k of at most the vocabulary's {model.tokenizer.vocab_size}, got "
            f"{selection.k}; lower selection.k"
        )
    samples = build_samples(model, data, sources)
    manifest = Manifest(
        selection=_selection_settings(selection),
        codec=cache.codec,
        vocab_size=model.tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(model.tokenizer),
        teacher_fingerprint=teacher_fingerprint,
        sources=tuple(sources),
        dataset={
            name: value for name, value in asdict(data).items() if name not in _NOT_IN_MANIFEST
        },
        num_samples=len(samples),
        samples_per_shard=cache.samples_per_shard,
    )
    shards = parse_shards(cache.shards, manifest.num_shards)
    writer = _on_rank_zero(lambda: CacheWriter.open(cache.path, manifest), everyone)
    replica = _Replica()
    try:
        _fill(writer, shards, replica, _Teacher(model, selection, replica), samples, data)
        torch.distributed.barrier(everyone)
    except RuntimeError:  # gloo's: what this rank waits for has ended, maybe by SIGTERM too
        replica.stop_if_asked_alone()
        raise
    if torch.distributed.get_rank() == 0:
        missing = writer.missing_shards()
        state = f"{len(missing)} of {manifest.num_shards} shards are still missing"
        print(f"{writer.path}: {state if missing else 'the cache is whole'}")


def check_settings(
    config: DictConfig, teacher: DictConfig
) -> tuple[DataConfig, SelectionConfig, CacheConfig]:
    """Read the sections that are this package's own, and refuse keys that nothing reads.

    Args:
        config: The run's, as it was given.
        teacher: The config inside the teacher's .nemo.

    Raises:
        ValueError: There is such a key, or a setting does not fit.
    """
    known = {
        "teacher": model_keys(teacher) | {"restore_from_path": None},
        "trainer": trainer_keys(),
        "data": None,  # the three check their own
        "selection": None,
        "cache": None,
    }
    refuse_unknown_keys(config, known)
    return (
        read_settings(DataConfig, config.data, "data"),
        read_settings(SelectionConfig, config.selection, "selection"),
        read_settings(CacheConfig, config.cache, "cache"),
    )


def parse_shards(text: str | int | None, num_shards: int) -> list[int]:
    """Return the shards of "0-99", 7 or "0-3,8"; all of them for None.

    Raises:
        ValueError: Another form, or a shard that the cache does not have.
    """
    if text is None:
        return list(range(num_shards))
    shards: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f'cache.shards: expected 0-99, 7 or "0-3,8", got {text!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_shards:
            raise ValueError(
                f"cache.shards: expected shards from 0 to {num_shards - 1}, got {part.strip()}"
            )
        shards += range(first, last + 1)
    return shards


class _Replica:
    """This process's replica of the teacher: its ranks go through the same shards in step.

    The leader, the one rank of the last pipeline stage that writes, claims for all of them.

    SIGTERM, with which Slurm preempts, ends all ranks at one place, or those that are left would
    wait in a collective without end. An exit raised by the handler itself could fall between a
    file and the note of whose it is, and leave the file behind.
    """

    def __init__(self) -> None:
        ranks = torch.distributed.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self.leads = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, (ranks, self.leads))
        self._leader = next(rank for rank in ranks if told[rank][1])
        for replica in sorted({tuple(other) for other, _ in told}):
            # every rank takes part in the making of every group
            group = torch.distributed.new_group(replica, timeout=_PATIENCE, backend="gloo")
            if list(replica) == ranks:
                self._group = group
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def claim_shards(self, writer: CacheWriter, shards: list[int]) -> Iterator[int]:
        """The shards that this replica is to fill; ends when all of `shards` are there."""
        with closing(writer.claim_shards(shards, wait=self._wait)) as claims:
            while True:
                shard = [self._next(claims)]
                torch.distributed.broadcast_object_list(shard, self._leader, self._group)
                if shard[0] == _STOP:
                    self._stop()
                if shard[0] is None:
                    return
                yield shard[0]

    def stop_if_asked(self) -> None:
        """End all ranks if any was asked to: unwinding removes the open shard and its claim."""
        asked = torch.tensor(int(self._asked))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        if asked:
            self._stop()

    def stop_if_asked_alone(self) -> None:
        """The same, where the other ranks can no longer be told."""
        if self._asked:
            self._stop()

    def _stop(self) -> NoReturn:
        exit_stopped(
            "stopped by SIGTERM; the finished shards stay, and the same command goes on from them"
            if self.leads
            else None
        )

    def _next(self, claims: Iterator[int]) -> int | None:
        """On the leader the next shard, if there is one, or _STOP."""
        if not self.leads:
            return None
        try:
            return next(claims, None)
        except InterruptedError:
            return _STOP

    def _wait(self) -> None:
        """Pass some seconds, while other jobs are at work on what is left."""
        for _ in range(_POLL_S):
            if self._asked:
                raise InterruptedError
            time.sleep(1)


class _Teacher:
    """The model, forward only: a list of samples to the rows of each."""

    def __init__(self, model: Any, selection: SelectionConfig, replica: _Replica) -> None:
        self._replica = replica
        # Stages of a pipeline are at different micro batches, and agree between windows alone.
        self._has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
        (self._module,) = model.get_model_module_list()
        self._model = model.model
        self._selection = selection
        self._vocab_size = model.tokenizer.vocab_size
        self._device = next(self._module.parameters()).device
        self._rows: TeacherRows | None = None
        self._batch: dict[str, Tensor] = {}
        self._module.eval()
        # Micro batches have their own lengths, and pipeline stages must tell each other. Set here:
        # a config that says so is refused for a mixture-of-experts key that a dense model ignores.
        self._module.config.variable_seq_lengths = True
        # The one place where Megatron has the bare logits; without labels it would copy them.
        self._module.compute_language_model_loss = self._select

    def rows(self, batches: Sequence[dict[str, Any]]) -> list[TeacherRows]:
        """The rows of each micro batch's supervised positions, sample by sample, on the CPU.

        Empty but on the last pipeline stage.
        """
        if self._has_stages:
            self._replica.stop_if_asked()
        with torch.no_grad():
            collected: list[TeacherRows] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(batches),
                model=self._model,
                num_microbatches=len(batches),
                seq_length=max(batch["tokens"].shape[1] for batch in batches),
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        return collected

    def _forward_step(self, batches: Iterator[dict[str, Any]], model: Any) -> Any:
        if not self._has_stages:
            self._replica.stop_if_asked()
        names = ("tokens", "position_ids", "labels", "loss_mask", "sample_numbers")
        batch = next(batches)
        self._batch = {name: batch[name].to(self._device, non_blocking=True) for name in names}
        output = model(
            input_ids=self._batch["tokens"],
            position_ids=self._batch["position_ids"],
            attention_mask=None,
            labels=self._batch["labels"],
        )
        return output, lambda _, non_loss_data: self._rows

    def _select(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Take the rows out of logits [S, B, Vp]; the loss [B, S] that Megatron asks for is 0."""
        item, position = self._batch["loss_mask"].nonzero(as_tuple=True)
        index = position * logits.shape[1] + item
        # What a row's draws are seeded with: no layout, order or restart changes it.
        keys = self._batch["sample_numbers"][item] << 32 | position
        flat = logits.flatten(0, 1)
        parts = [
            select_teacher_rows(
                flat[index[chunk]],
                self._selection,
                self._vocab_size,
                parallel_state.get_tensor_model_parallel_group(),
                keys[chunk],
            )
            for chunk in torch.arange(len(index), device=index.device).split(_TOKENS_PER_SELECTION)
        ]
        self._rows = TeacherRows(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        return torch.zeros(labels.shape, device=labels.device)


def _fill(
    writer: CacheWriter,
    shards: list[int],
    replica: _Replica,
    teacher: _Teacher,
    samples: ConcatDataset[Any],
    data: DataConfig,
) -> None:
    rank = parallel_state.get_data_parallel_rank()
    missing = writer.missing_shards(shards)
    with (
        tqdm(
            desc=f"{writer.path.name}: {len(missing)} of {writer.manifest.num_shards} shards",
            total=sum(len(writer.manifest.shard_samples(shard)) for shard in missing),
            unit="sample",
            disable=not (replica.leads and rank == 0 and missing),
            mininterval=1,
        ) as bar,
        closing(replica.claim_shards(writer, shards)) as claims,
    ):
        num_tokens, start = 0, time.monotonic()
        for shard in claims:
            num_tokens += _fill_shard(writer, shard, teacher, samples, data, replica.leads)
            # The bar is one replica's, and counts what the others have published meanwhile.
            done = len(missing) - len(writer.missing_shards(missing))
            bar.set_postfix_str(
                f"{num_tokens / (time.monotonic() - start):,.0f} tokens/s a replica",
                refresh=False,
            )
            bar.update(min(bar.total, done * writer.manifest.samples_per_shard) - bar.n)


def _fill_shard(
    writer: CacheWriter,
    shard: int,
    teacher: _Teacher,
    samples: ConcatDataset[Any],
    data: DataConfig,
    writes: bool,
) -> int:
    """Fill one shard, on the leader also its files; return its tokens."""
    num_tokens = 0
    indices = writer.manifest.shard_samples(shard)
    with writer.shard(shard) if writes else nullcontext() as sink:
        for first, items in _windows(samples, indices, data):
            num_tokens += _fill_window(sink, first, items, teacher, samples.datasets[0], data)
    return num_tokens


def _windows(
    samples: ConcatDataset[Any], indices: range, data: DataConfig
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A shard's samples, tokenised, window by window: the number of the first, and all of them."""
    size = data.micro_batch_size * _MICRO_BATCHES_PER_WINDOW
    windows = [indices[start : start + size] for start in range(0, len(indices), size)]
    loader = DataLoader(
        samples,
        batch_sampler=windows,
        num_workers=data.num_workers,
        collate_fn=list,
    )
    shield_workers(loader)
    return ((window[0], items) for window, items in zip(windows, loader, strict=True))


def _fill_window(
    sink: Any,
    first: int,
    items: list[dict[str, Any]],
    teacher: _Teacher,
    dataset: Any,
    data: DataConfig,
) -> int:
    """Add a window's samples and their rows to `sink`, if there is one; return its tokens."""
    longest_first = sorted(range(len(items)), key=lambda index: -len(items[index]["input_ids"]))
    micro_batches = [
        longest_first[start : start + data.micro_batch_size]
        for start in range(0, len(items), data.micro_batch_size)
    ]
    batches = [
        dataset.collate_fn([items[i] for i in indices])
        | {"sample_numbers": first + torch.tensor(indices)}
        for indices in micro_batches
    ]
    rows_of: dict[int, TeacherRows] = {}
    for indices, batch, rows in zip(micro_batches, batches, teacher.rows(batches), strict=False):
        counts = batch["loss_mask"].sum(1).tolist()
        parts = zip(*(tensor.split(counts) for tensor in rows), strict=True)
        rows_of |= {i: TeacherRows(*part) for i, part in zip(indices, parts, strict=True)}
    num_tokens = 0
    for index, item in enumerate(items):
        tokens, loss_mask, context_length = cut_sample(item, dataset)
        num_tokens += len(tokens)
        if sink is not None:
            sink.add(
                tokens,
                loss_mask,
                context_length,
                *(tensor.numpy() for tensor in rows_of[index]),
            )
    return num_tokens


def _merge_teacher_config(
    config: DictConfig, model_config: DictConfig, data: DataConfig
) -> DictConfig:
    """The .nemo's config, changed in place to what the run asks for and a forward pass needs."""
    overrides = {key: value for key, value in config.teacher.items() if key != "restore_from_path"}
    with open_dict(model_config):
        model_config.update(overrides)
        model_config.precision = config.trainer.precision
        model_config.micro_batch_size = data.micro_batch_size
        model_config.answer_only_loss = data.answer_only_loss
        model_config.sep_id = data.sep_id
        model_config.data = {"chat": data.chat, "chat_prompt_tokens": data.chat_prompt_tokens}
        model_config.optim = {"name": "adamw", "lr": 0.0}  # NeMo asks for its name
        model_config.gradient_as_bucket_view = False  # and for this, with a GPU
        # of the run that wrote the .nemo; a forward pass over whole sequences has no use for them
        model_config.context_parallel_size = 1
        model_config.virtual_pipeline_model_parallel_size = None
        model_config.use_cpu_initialization = False
        for key in ("granularity", "method", "num_layers", "layers_per_pipeline"):
            model_config[f"activations_checkpoint_{key}"] = None
    if config.trainer.accelerator == "cpu":
        cpu_backend.prepare_model_config(model_config, "teacher")
    return model_config


def _selection_settings(selection: SelectionConfig) -> dict[str, Any]:
    """The fields that shape the rows of this kind."""
    names = {"top_k": ("k",), "top_p": ("k", "p"), "sample": ("num_draws", "seed")}
    return {
        name: getattr(selection, name) for name in ("kind", "temperature", *names[selection.kind])
    }


def _on_rank_zero(function: Any, group: Any) -> Any:
    """Call it on global rank 0 and return its result on every rank.

    An exception of rank 0 is raised on every rank, so that none waits for the others.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
