"""What distillation adds to the runs themselves, measured on the demo's models and data.

    make demo && PYTHONPATH=examples:tests python benchmarks/models.py [--small]

teacher run    all of examples/dump_teacher_topk.py's work on a shard (tokens, forward, selection,
               packing, writing) beside the bare forward pass of the same micro batches, window by
               window
packed rows    the loss of the demo's trained student, computed from the cache's rows and from the
               float32 rows that were packed into it; and its gradient, in the norm over all weights
training step  examples/train_kd_sft.py with KD and with kd_loss_weight=0, in turn: NeMo's own
               train_step_timing, the median over the steps, of one thread
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from demo import OUT, PROMPT
from distributed import run_distributed
from hydra import compose, initialize_config_dir
from nemo_models import restore
from runs import run_example, scalars

from nemo_kd.cache import TopKCache
from nemo_kd.cache.writer import ShardWriter
from nemo_kd.loss import KDLossConfig, vocab_parallel_kd_sft_loss
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import quiet_host

ROOT = Path(__file__).parent.parent
MAX_SEQ_LENGTH = 128
OBJECTIVES = {
    "renormalize": KDLossConfig(tail="renormalize", sft_loss_weight=0),
    "bucket": KDLossConfig(sft_loss_weight=0, tail="bucket"),
    "label": KDLossConfig(sft_loss_weight=0, tail="label"),
    "drop": KDLossConfig(sft_loss_weight=0, tail="drop"),
    "reverse_kl, renormalize": KDLossConfig(
        tail="renormalize", sft_loss_weight=0, divergence="reverse_kl"
    ),
    "reverse_kl, bucket": KDLossConfig(tail="bucket", sft_loss_weight=0, divergence="reverse_kl"),
    "jsd, renormalize": KDLossConfig(tail="renormalize", sft_loss_weight=0, divergence="jsd"),
    "jsd, bucket": KDLossConfig(tail="bucket", sft_loss_weight=0, divergence="jsd"),
}


def measure_teacher_run(cache: Path, num_samples: int) -> tuple[dict[str, float], list[Any]]:
    """Seconds of the run on one shard and of the bare forward; and the rows before packing."""
    from nemo_kd.nemo import dump
    from nemo_kd.teacher.forward import Teacher
    from nemo_kd.teacher.run import TeacherRun

    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base=None):
        config = compose(
            "dump_teacher_topk",
            [
                "trainer.accelerator=cpu",
                f"teacher.restore_from_path={OUT}/teacher.nemo",
                f"data.file_names=[{OUT}/train.jsonl]",
                f"data.prompt_template='{PROMPT}'",
                f"data.max_seq_length={MAX_SEQ_LENGTH}",
                "data.micro_batch_size=8",
                "data.num_workers=0",
                "selection.k=100",
                f"cache.samples_per_shard={num_samples}",
                "cache.shards=0",
                f"cache.path={cache}",
            ],
        )
    seconds = {"run": 0.0, "forward": 0.0}
    rows: list[Any] = []
    fill_shard, teacher_rows, add = TeacherRun._fill_shard, Teacher.rows, ShardWriter.add

    def timed_fill(*args: Any) -> Any:
        begin = time.perf_counter()
        result = fill_shard(*args)
        seconds["run"] += time.perf_counter() - begin - seconds["forward"]
        return result

    def bare_forward(self: Any, batches: Any) -> None:
        select, self._layer.forward = self._layer.forward, self._layer_forward
        begin = time.perf_counter()
        teacher_rows(self, batches)
        seconds["forward"] += time.perf_counter() - begin
        self._layer.forward = select

    bare_first = cycle((True, False))

    def timed_rows(self: Any, batches: Any) -> Any:
        """The run's own pass and the bare one, which take turns to go first."""
        if is_first := next(bare_first):
            bare_forward(self, batches)
        window = teacher_rows(self, batches)
        if not is_first:
            bare_forward(self, batches)
        return window

    def kept_add(self: Any, tokens: Any, loss_mask: Any, context_length: Any, *row: Any) -> None:
        rows.append([torch.from_numpy(array.copy()) for array in row])
        add(self, tokens, loss_mask, context_length, *row)

    TeacherRun._fill_shard, Teacher.rows = timed_fill, timed_rows
    ShardWriter.add = kept_add
    dump.dump_teacher_topk(config)
    return seconds, rows


def measure_packed_rows(
    rank: int, world_size: int, path: Path, rows: list[Any]
) -> dict[str, tuple[float, float]]:
    """The relative errors of loss and gradient from packed rows, against float32 rows."""
    quiet_host()
    cache = TopKCache(path)
    student = restore(OUT / "kd.nemo")
    (module,) = student.get_model_module_list()
    parameters = list(module.parameters())
    losses = {(name, kind): 0.0 for name in OBJECTIVES for kind in ("float32", "packed")}
    gradients: dict[Any, list[Any]] = {}
    for number, float32_rows in enumerate(rows):
        sample = cache[number]
        tokens = torch.from_numpy(sample.tokens).long()
        predicted = torch.from_numpy(sample.loss_mask).nonzero()[:, 0]
        logits = module(tokens[None], torch.arange(len(tokens))[None], None)[0, predicted - 1]
        packed = (sample.topk_ids, sample.topk_log_probs, sample.tail_log_probs)
        kinds = {"float32": float32_rows, "packed": [torch.from_numpy(array) for array in packed]}
        for name, kind in losses:
            ids, log_probs, tails = kinds[kind]
            loss = vocab_parallel_kd_sft_loss(
                logits, tokens[predicted], log_probs, ids, tails, config=OBJECTIVES[name]
            ).loss.sum()
            losses[name, kind] += loss.item()
            new = torch.autograd.grad(loss, parameters, retain_graph=True)
            old = gradients.get((name, kind))
            gradients[name, kind] = list(new) if old is None else torch._foreach_add(old, new)
    changes = {}
    for name in OBJECTIVES:
        whole, packed_sum = gradients[name, "float32"], gradients[name, "packed"]
        difference = _norm(torch._foreach_sub(packed_sum, whole)) / _norm(whole)
        change = abs(losses[name, "packed"] / losses[name, "float32"] - 1)
        changes[name] = (change, difference)
    return changes


def _norm(tensors: Any) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).double().norm())


def measure_training_step(num_steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step; the objectives take turns, each in a process of its own."""
    objectives = {"KD + SFT": (1, 0.4), "SFT": (0, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(rounds):
        for name, (kd_loss_weight, sft_loss_weight) in objectives.items():
            with tempfile.TemporaryDirectory() as logs:
                run_example(
                    "train_kd_sft.py",
                    "trainer.accelerator=cpu",
                    f"trainer.max_steps={num_steps}",
                    f"trainer.val_check_interval={num_steps}",
                    "trainer.limit_val_batches=1",
                    "trainer.log_every_n_steps=1",
                    f"model.restore_from_path={OUT}/student.nemo",
                    f"model.data.train_ds.file_names=[{OUT}/cache]",
                    f"model.data.validation_ds.file_names=[{OUT}/heldout-cache]",
                    *(
                        f"model.data.{ds}_ds.{key}"
                        for ds in ("train", "validation")
                        for key in (f"max_seq_length={MAX_SEQ_LENGTH}", "num_workers=0")
                    ),
                    "model.data.train_ds.global_batch_size=16",
                    "model.data.train_ds.micro_batch_size=8",
                    "model.data.validation_ds.global_batch_size=4",
                    f"model.knowledge_distillation.kd_loss_weight={kd_loss_weight}",
                    f"model.knowledge_distillation.sft_loss_weight={sft_loss_weight}",
                    f"exp_manager.explicit_log_dir={logs}",
                    "exp_manager.create_checkpoint_callback=false",
                    timeout=600,
                )
                # Without the first two steps, which allocate memory.
                seconds[name] += scalars(Path(logs))["train_step_timing in s"][2:]
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few samples: does it run?")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/models.json"))
    args = parser.parse_args()
    if not (OUT / "kd.nemo").exists():
        sys.exit(f"expected the demo's models in {OUT}, found no kd.nemo; run make demo first")
    num_samples, num_compared = (16, 4) if args.small else (512, 32)
    steps = measure_training_step(*((4, 1) if args.small else (16, 2)))
    cpu_backend.enable()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cache"
        seconds, rows = measure_teacher_run(path, num_samples)
        (changes,) = run_distributed(measure_packed_rows, 1, path, rows[:num_compared], timeout=600)
    print("\n| | with | without | ratio |\n| --- | --- | --- | --- |")
    print(
        f"| teacher run, beside its forward pass | {seconds['run']:.2f} s "
        f"| {seconds['forward']:.2f} s | {seconds['run'] / seconds['forward']:.3f} |"
    )
    kd, sft = steps["KD + SFT"], steps["SFT"]
    print(f"| training step with KD, beside SFT | {kd:.3f} s | {sft:.3f} s | {kd / sft:.3f} |")
    print("\n| packed rows for float32 | loss | gradient |\n| --- | --- | --- |")
    for name, (loss, gradient) in changes.items():
        print(f"| {name} | {loss:.4%} | {gradient:.3%} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"teacher_run_s": seconds, "training_step_s": steps, "packed_rows": changes}
    args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
