"""What both hosts must agree on: hosts.json has it as the NeMo host computes it.

    WRITE_REFERENCE=1 make test ARGS=tests/test_hosts.py   # writes hosts.json

tests/test_hosts.py compares the NeMo host with it, and tests/bridge/test_hosts.py the other one.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from runs import MAX_SEQ_LENGTH

from nemo_kd.cache import CacheWriter, TopKCache

REFERENCE = Path(__file__).parent / "hosts.json"
STEPS = 10
SELECTION = ("selection.k=8", f"data.max_seq_length={MAX_SEQ_LENGTH}", "data.micro_batch_size=2")


def hashes(cache: Path) -> dict[str, str]:
    """Of each file of the cache's data. shard.json names the teacher, as the hosts know it."""
    return {
        str(path.relative_to(cache)): xxhash.xxh3_64_hexdigest(path.read_bytes())
        for path in sorted(cache.glob("shard-*/*"))
        if path.name != "shard.json"
    }


def reference() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(REFERENCE.read_text())
    return value


def write_half(path: Path, source: TopKCache, drop: bool) -> Path:
    """A cache of every second sample, and of the others without their answers unless `drop`."""
    samples: list[Any] = []
    for index, sample in enumerate(source):
        if index % 2 == 0:
            samples.append(sample)
        elif not drop:
            samples.append(
                sample._replace(
                    loss_mask=np.zeros_like(sample.loss_mask),
                    topk_ids=sample.topk_ids[:0],
                    topk_log_probs=sample.topk_log_probs[:0],
                    tail_log_probs=sample.tail_log_probs[:0],
                )
            )
    manifest = replace(
        source.manifest, teacher_fingerprint=f"half, {drop}", num_samples=len(samples)
    )
    writer = CacheWriter.open(path, manifest)
    for shard in writer.missing_shards():
        with writer.shard(shard) as sink:
            for index in manifest.shard_samples(shard):
                sink.add(**samples[index]._asdict())
    return path


def measure(
    nemo: Any, teacher: Path, student: Path, jsonl: Path, directory: Path
) -> dict[str, Any]:
    """The NeMo host: the files of a dump, and the curves of a training on it.

    Args:
        nemo: `runs.run_example`.
        teacher: A .nemo.
        student: Another.
        jsonl: The data.
        directory: Where to work.
    """
    from runs import scalars

    cache = directory / "cache"
    nemo(
        "dump_teacher_topk.py",
        "trainer.accelerator=cpu",
        f"teacher.restore_from_path={teacher}",
        f"data.file_names=[{jsonl}]",
        f"cache.path={cache}",
        "data.num_workers=0",
        *SELECTION,
    )
    curves = {}
    for micro_batch_size in (4, 2):
        logs = directory / f"logs{micro_batch_size}"
        sections = [
            f"model.data.{name}.{key}={value}"
            for name in ("train_ds", "validation_ds")
            for key, value in {
                "global_batch_size": 4,
                "micro_batch_size": micro_batch_size,
                "max_seq_length": MAX_SEQ_LENGTH,
                "num_workers": 0,
            }.items()
        ]
        nemo(
            "train_kd_sft.py",
            "trainer.accelerator=cpu",
            f"trainer.max_steps={STEPS}",
            f"trainer.val_check_interval={STEPS}",
            "trainer.log_every_n_steps=1",
            f"model.restore_from_path={student}",
            f"model.data.train_ds.file_names=[{cache}]",
            f"model.data.validation_ds.file_names=[{cache}]",
            *sections,
            "model.optim.lr=1e-3",
            "model.optim.sched.min_lr=1e-3",
            "model.optim.sched.warmup_steps=0",
            f"exp_manager.explicit_log_dir={logs}",
            "exp_manager.create_checkpoint_callback=false",
        )
        found = scalars(logs)
        names = ["grad_norm"] + (["kd_loss", "sft_loss"] if micro_batch_size == 4 else [])
        curves[str(micro_batch_size)] = {name: found[name] for name in names}
    tokenizer = TopKCache(cache).manifest.tokenizer_fingerprint
    return {"cache": hashes(cache), "tokenizer": tokenizer, "curves": curves}
