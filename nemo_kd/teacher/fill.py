"""From the samples and the teacher that a host has built to a filled cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils.data import ConcatDataset

from nemo_kd.cache import CacheWriter, Manifest, TopKCache
from nemo_kd.cache.inspection import unsupervised
from nemo_kd.chat.samples import cut_sample
from nemo_kd.config import CacheConfig, DataConfig
from nemo_kd.process import say
from nemo_kd.ranks import on_rank_zero
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.plan import parse_shards
from nemo_kd.teacher.replica import Replica
from nemo_kd.teacher.run import TeacherRun

# Some seconds of tokenising. The share of unsupervised samples is then known to 2 percent.
_NUM_CHECKED_SAMPLES = 1024


def fill_cache(
    manifest: Manifest,
    cache: CacheConfig,
    data: DataConfig,
    samples: ConcatDataset[Any],
    everyone: ProcessGroup,
    *,
    start: Callable[[], tuple[Replica, Teacher]],
    is_first_replica: bool,
    log_to: Callable[[str], None] | None = None,
) -> None:
    """Fill the cache's missing shards, together with all other replicas, and say what it holds.

    Args:
        manifest: As `plan_cache` has made it.
        cache: The settings of the cache.
        data: The settings of the samples.
        samples: Of all files in their order; `samples.datasets[0]` collates.
        everyone: A gloo group of all ranks, which waits as long as other jobs work.
        start: Makes this process's part in the work, once everything is checked.
        is_first_replica: Whether this rank is of the replica that shows the progress.
        log_to: Opens a log file beside the cache, on rank 0.

    Raises:
        ValueError: The files have changed, too few samples are supervised, or the cache does not
            fit; what the cache held stays.
    """
    if len(samples) != manifest.num_samples:
        raise ValueError(
            f"{list(data.file_names)}: expected {manifest.num_samples} samples, found "
            f"{len(samples)}: a file has changed since this run began"
        )
    on_rank_zero(lambda: _check_supervision(samples, data.max_unsupervised_share), everyone)
    shards = parse_shards(cache.shards, manifest.num_shards)

    def open_cache() -> CacheWriter:
        writer = CacheWriter.open(cache.path, manifest)
        if log_to is not None:
            log_to(f"{writer.path}.log")
        return writer

    # Rank 0 creates the cache or refuses it before any other rank looks into it.
    writer = on_rank_zero(open_cache, everyone)
    replica, teacher = start()
    run = TeacherRun(writer, replica, teacher, samples, data)
    num_truncated = _run_all(run, shards, is_first_replica, everyone)
    if num_truncated:
        say(
            f"truncated samples in this run: {num_truncated} (data.max_seq_length="
            f"{data.max_seq_length}; they end after a turn of the assistant if one fits)"
        )
    if torch.distributed.get_rank() == 0:
        _report(writer, data)


def _run_all(
    run: TeacherRun, shards: list[int], is_first_replica: bool, everyone: ProcessGroup
) -> int:
    """Fill `shards` with all replicas, and return how many samples were truncated."""
    replica = run.replica
    try:
        run.fill(shards, replica.leads and is_first_replica)
        num_truncated = torch.tensor(run.num_truncated if replica.leads else 0)
        # A sum over the replicas. It also keeps each rank until all shards are there: a rank that
        # ended would take the job's process group from those that still fill a shard.
        torch.distributed.all_reduce(num_truncated, group=everyone)
    except RuntimeError:  # gloo's, when a rank that this one waits for has ended, maybe by SIGTERM
        replica.stop_if_asked_alone()
        raise
    return int(num_truncated)


def _check_supervision(samples: ConcatDataset[Any], max_share: float) -> None:
    """Tokenise some samples, before the teacher computes anything for samples that teach nothing.

    Raises:
        ValueError: More than `max_share` of them have no supervised token, or all of them.
    """
    indices = range(0, len(samples), -(-len(samples) // _NUM_CHECKED_SAMPLES))
    dataset = samples.datasets[0]
    number = sum(not cut_sample(samples[index], dataset)[1].any() for index in indices)
    _refuse_share(number, len(indices), max_share)


def _report(writer: CacheWriter, data: DataConfig) -> None:
    """Print what the cache holds now; refuse a whole one with too few supervised tokens."""
    num_samples = writer.manifest.num_samples
    if missing := writer.missing_shards():
        state = f"{len(missing)} of {writer.manifest.num_shards} shards are still missing"
    else:
        number = TopKCache(writer.path).num_unsupervised_samples()
        _refuse_share(number, num_samples, data.max_unsupervised_share)
        state = f"the cache is whole; {unsupervised(number, num_samples)}"
    print(f"{writer.path}: {state}")


def _refuse_share(number: int, num_samples: int, max_share: float) -> None:
    """Raise a ValueError if `number` of `num_samples` samples without supervision are too many."""
    if number == num_samples or number > max_share * num_samples:
        raise ValueError(
            f"{unsupervised(number, num_samples)}, expected at most a share of {max_share}: their "
            "answers are truncated or empty. Raise data.max_seq_length, or have "
            "data.truncation_field name the prompt's keys"
            + ("" if number == num_samples else ", or raise data.max_unsupervised_share")
        )
