"""Megatron-Bridge as a host: what it computes, at any layout, is what the NeMo host computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import SELECTION, STEPS, hashes, reference
from runs import MAX_SEQ_LENGTH, run_example, scalars
from test_vocabulary import save_models, write_data

from nemo_kd.cache import TopKCache

STOPPED_RUN = str(Path(__file__).parents[1] / "stopped_run.py")
DUMP, TRAIN = "bridge/dump_teacher_topk.py", "bridge/train_kd_sft.py"


def dump_arguments(teacher: Path, jsonl: Path, cache: Path) -> list[str]:
    return [
        "device=cpu",
        f"model.hf_path={teacher}",
        f"data.file_names=[{jsonl}]",
        f"cache.path={cache}",
        "data.num_workers=0",
        *SELECTION,
    ]


def train_arguments(student: Path, cache: Path, logs: Path, *more: str) -> list[str]:
    return [
        "device=cpu",
        f"model.hf_path={student}",
        f"model.seq_length={MAX_SEQ_LENGTH}",
        "model.calculate_per_token_loss=false",
        f"dataset.train_caches=[{cache}]",
        f"dataset.validation_caches=[{cache}]",
        "dataset.num_workers=0",
        f"train.train_iters={STEPS}",
        f"train.eval_interval={STEPS}",
        "train.global_batch_size=4",
        "optimizer.lr=1e-3",
        "scheduler.lr_decay_style=constant",
        "scheduler.lr_warmup_iters=0",
        f"logger.tensorboard_dir={logs}",
        f"checkpoint.save={logs}/checkpoints",
        f"checkpoint.save_interval={STEPS}",
        *more,
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, wide_llamas: Any, jsonl: Path) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    run_example(DUMP, *dump_arguments(wide_llamas["untied"], jsonl, path))
    return path


def curves(logs: Path) -> dict[str, list[float]]:
    found = scalars(logs)
    return {
        "kd_loss": found["kd_loss"],
        "sft_loss": found["sft_loss"],
        "grad_norm": found["grad-norm"],
    }


def test_a_dump_has_the_bytes_of_the_nemo_host(cache: Path) -> None:
    assert hashes(cache) == reference()["cache"]
    assert TopKCache(cache).manifest.tokenizer_fingerprint == reference()["tokenizer"]


def test_a_killed_dump_resumes_to_the_same_bytes(
    wide_llamas: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    """SIGKILL comes when a shard is computed, and not yet published, beside one that is whole."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shards = "cache.samples_per_shard=4"
    run_example(DUMP, *dump_arguments(wide_llamas["untied"], jsonl, whole), shards)
    arguments = [*dump_arguments(wide_llamas["untied"], jsonl, killed), shards]
    run_example(DUMP, *arguments, "cache.shards=0")
    first = hashes(killed)
    script = (STOPPED_RUN, "SIGKILL", "nemo_kd.cache.writer:ShardWriter.finish", 0, DUMP)
    run_example(*script, *arguments, succeeds=False)
    assert list(killed.glob(".tmp*")), "what it was writing is still there"
    assert hashes(killed) == first
    run_example(DUMP, *arguments)
    found = [
        {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
        for cache in (whole, killed)
    ]
    assert len(first) < len(hashes(whole))
    assert found[0] == found[1]


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_a_dump_at_another_layout(
    layout: str, cache: Path, wide_llamas: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    overrides = [] if layout == "data" else [f"model.{layout}_model_parallel_size=2"]
    teacher = wide_llamas["untied"]
    if layout == "pipeline":  # the other one has three layers
        teacher, cache = wide_llamas["tied"], tmp_path / "whole"
        run_example(DUMP, *dump_arguments(teacher, jsonl, cache))
    arguments = dump_arguments(teacher, jsonl, tmp_path / "cache")
    run_example(DUMP, *arguments, "cache.samples_per_shard=4", *overrides, processes=2)
    for one, other in zip(TopKCache.open(cache), TopKCache.open(tmp_path / "cache"), strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.topk_ids, other.topk_ids)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=1e-3)


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_the_curve_is_that_of_the_nemo_host(
    micro_batch_size: int, cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    more = [f"train.micro_batch_size={micro_batch_size}", f"save_hf={tmp_path / 'kd-hf'}"]
    run_example(TRAIN, *train_arguments(wide_llamas["tied"], cache, tmp_path, *more))
    for name, values in reference()["curves"][str(micro_batch_size)].items():
        np.testing.assert_allclose(curves(tmp_path)[name], values, rtol=1e-4, err_msg=name)
    # What is saved is the trained student: its cross entropy is the validation's.
    found = scalars(tmp_path)
    (validated,) = found["sft_loss validation"][-1:]
    assert cross_entropy(tmp_path / "kd-hf", cache) == pytest.approx(validated, rel=1e-4)
    assert validated < cross_entropy(wide_llamas["tied"], cache) - 1


def cross_entropy(model: Path, cache: Path) -> float:
    """Of the supervised tokens, by transformers."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(model)
    total, number = 0.0, 0
    for sample in TopKCache.open(cache):
        tokens = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            log_probs = own(tokens[None, :-1]).logits[0].log_softmax(-1)
        losses = -log_probs.gather(1, tokens[1:, None])[:, 0]
        mask = torch.from_numpy(sample.loss_mask[1:]).bool()
        total, number = total + losses[mask].sum().item(), number + int(mask.sum())
    return total / number


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_another_layout_has_the_same_curve(
    layout: str, cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, "train.micro_batch_size=2")
    run_example(TRAIN, *arguments, f"model.{layout}_model_parallel_size=2", processes=2)
    expected = reference()["curves"]["2"]["grad_norm"]
    # Rounding grows from step to step with these large weights.
    np.testing.assert_allclose(curves(tmp_path)["grad_norm"][:6], expected[:6], rtol=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_fused_output_layer_has_the_same_curve(
    processes: int, cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    more = ("train.micro_batch_size=2", f"model.tensor_model_parallel_size={processes}")
    found = []
    for fused in "false", "true":
        logs = tmp_path / fused
        arguments = train_arguments(wide_llamas["tied"], cache, logs, *more)
        key = f"knowledge_distillation.fuse_output_layer={fused}"
        run_example(TRAIN, *arguments, key, processes=processes)
        found.append(curves(logs) | {"validated": scalars(logs)["kd_loss validation"]})
    assert len(found[0]["kd_loss"]) == STEPS
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4, err_msg=name)


def test_tokens_weigh_alike_however_they_are_cut(
    cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    """Over micro batches and replicas, with model.calculate_per_token_loss=true; fused too."""
    found = []
    for processes, size, fused in ((1, 4, False), (1, 1, False), (2, 2, True)):
        logs = tmp_path / f"{processes}-{size}"
        more = [f"train.micro_batch_size={size}", "model.calculate_per_token_loss=true"]
        more.append(f"knowledge_distillation.fuse_output_layer={fused}")
        arguments = train_arguments(wide_llamas["tied"], cache, logs, *more)
        run_example(TRAIN, *arguments, processes=processes)
        found.append(curves(logs))
    for name, values in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(other[name][:6], values[:6], rtol=1e-4, err_msg=name)


def test_tokens_are_found_by_their_text(hf_tokenizer: Any, tmp_path: Path) -> None:
    """Of a teacher with added tokens of its own: tests/test_vocabulary.py has the numbers."""
    models, cache = save_models(tmp_path, hf_tokenizer, 512), tmp_path / "cache"
    jsonl = write_data(tmp_path / "train.jsonl")
    run_example(DUMP, *dump_arguments(models["teacher"], jsonl, cache))
    assert 403 in TopKCache.open(cache)[0].tokens
    more = ("train.micro_batch_size=4", "train.train_iters=2")
    output = run_example(TRAIN, *train_arguments(models["student"], cache, tmp_path, *more))
    assert "lacks 2 of the teacher's tokens (<|a|>, <|b|>)" in output
    assert np.isfinite(curves(tmp_path)["kd_loss"]).all()


def test_a_resumed_run_has_the_same_curve(
    cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, "train.micro_batch_size=4")
    stops = ("train.exit_interval=6", "checkpoint.save_interval=3")
    run_example(TRAIN, *arguments, *(f"+{stop}" if "exit" in stop else stop for stop in stops))
    assert len(curves(tmp_path)["kd_loss"]) == 6
    logs = tmp_path / "resumed"
    output = run_example(TRAIN, *arguments, f"logger.tensorboard_dir={logs}")
    assert "iteration        7/" in output
    for name, values in reference()["curves"]["4"].items():
        np.testing.assert_allclose(curves(logs)[name], values[6:], rtol=1e-4, err_msg=name)


CHANGES = {
    "knowledge_distillation.tail": ("label", "bucket"),
    "optimizer.lr": (0.001, 0.002),
    "dataset.seed": (1, 2),
    "scheduler.lr_decay_iters": (2, 3),  # null: train.train_iters
}


def test_another_run_in_the_same_directory_is_refused(
    cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    more = ("train.micro_batch_size=4", "train.train_iters=2", "checkpoint.save_interval=2")
    run = train_arguments(wide_llamas["tied"], cache, tmp_path, *more)
    run_example(TRAIN, *run)
    given = [f"{key}={now}" for key, (_, now) in CHANGES.items() if "decay" not in key]
    changed = [*run, *given, "train.train_iters=3"]
    output = run_example(TRAIN, *changed, succeeds=False)
    for key, (before, now) in CHANGES.items():
        assert f"{key} was {before!r} and is {now!r}" in output, output[-2000:]
    assert "Traceback" not in output
    student = f"model.hf_path={wide_llamas['untied']}"
    assert "model.hf_path was '" in run_example(TRAIN, *run, student, succeeds=False)
    logs = tmp_path / "resumed"
    output = run_example(TRAIN, *run, f"save_hf={tmp_path / 'kd-hf'}")
    assert "step 2 of 2: nothing is left to train" in output
    assert (tmp_path / "kd-hf" / "config.json").exists(), "the student is saved all the same"
    allowed = ("resume_changed=true", f"logger.tensorboard_dir={logs}")
    output = run_example(TRAIN, *changed, *allowed)
    assert "step 2 of 3: the run resumes" in output
    assert scalars(logs)["learning-rate"] == [pytest.approx(0.002)]
    # From then on the new settings are the run's.
    assert "optimizer.lr was 0.002 and is 0.001" in run_example(TRAIN, *run, succeeds=False)


def test_a_scheduled_weight(cache: Path, wide_llamas: dict[str, Path], tmp_path: Path) -> None:
    """Each step's loss has the weights of that step, which are logged."""
    schedule = "{schedule:linear,start:1.0,end:0.0,steps:4}"
    more = (f"knowledge_distillation.kd_loss_weight={schedule}", "train.micro_batch_size=2")
    run_example(TRAIN, *train_arguments(wide_llamas["tied"], cache, tmp_path, *more))
    found = scalars(tmp_path)
    weights = np.maximum(0, 1 - np.arange(STEPS) / 4)
    np.testing.assert_allclose(found["kd_loss_weight"], weights, atol=1e-6)
    np.testing.assert_allclose(found["sft_loss_weight"], 0.4, rtol=1e-6)
    own = weights * found["kd_loss"] + 0.4 * np.array(found["sft_loss"])
    np.testing.assert_allclose(found["lm loss"], own, rtol=1e-5)


def test_a_run_resumes_with_more_steps(
    cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    """It goes on from its own weights. The order of the samples depends on the number of steps."""
    more = ("train.micro_batch_size=4", "scheduler.lr_decay_iters=100")
    run = train_arguments(wide_llamas["tied"], cache, tmp_path, *more)
    run_example(TRAIN, *run, "train.train_iters=6", "checkpoint.save_interval=6")
    logs = tmp_path / "resumed"
    output = run_example(TRAIN, *run, f"logger.tensorboard_dir={logs}")
    assert f"step 6 of {STEPS}: the run resumes" in output
    losses = curves(logs)["sft_loss"]
    assert len(losses) == STEPS - 6
    assert max(losses) < curves(tmp_path)["sft_loss"][0] - 1, "trained weights, not those of step 0"


def test_sigterm_saves_a_checkpoint_and_resumes(
    cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    more = ("train.micro_batch_size=4", "checkpoint.save_interval=100")
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, *more)
    moment = "nemo_kd.bridge.forward_step:KDForwardStep.__call__"  # of the first step
    script = (STOPPED_RUN, "SIGTERM", moment, 0, TRAIN)
    output = run_example(*script, *arguments, status=143)
    message = "stopped by SIGTERM; the same command resumes from the last checkpoint"
    assert message in output, output[-1500:]
    logs = tmp_path / "resumed"
    run_example(TRAIN, *arguments, f"logger.tensorboard_dir={logs}")
    for name, values in reference()["curves"]["4"].items():
        np.testing.assert_allclose(curves(logs)[name], values[1:], rtol=1e-4, err_msg=name)


BAD: dict[str, tuple[list[str], str]] = {
    "W&B without a place": (
        ["logger.wandb_project=x", "checkpoint.save=null", "save_hf=new"],
        "logger.wandb_project: expected logger.tensorboard_dir too",
    ),
    "no such model": (["model.hf_path=nowhere"], "found no nowhere/config.json"),
    "no such cache": (["dataset.train_caches=[nowhere]"], "expected cache directories, found none"),
    "no brackets": (
        ["dataset.train_caches=cache"],
        "expected a list [...] of one or more values, each a text, got 'cache'",
    ),
    "two sets of one name": (
        ["dataset.validation_caches=[CACHE,CACHE]"],
        "dataset.names: expected distinct names, got ['cache', 'cache']",
    ),
    "another type": (["+model.attention_backend=none"], "model.attention_backend: expected a val"),
    "a key of no section": (["+model.recompute=full"], "is no key of GPTModelProvider"),
    "another section": (["+ema.dim=8"], "ema is a key that nothing reads"),
    "a misspelt key": (["train.train_iter=5"], "train_iter"),
    "nothing is kept": (["checkpoint.save=null"], "expected save_hf=DIRECTORY or checkpoint.save"),
    "no checkpoint": (["checkpoint.load=nowhere"], "checkpoint.load: expected a directory"),
    "an objective that does not fit": (["knowledge_distillation.tail=none"], "tail"),
    "a learning rate below its minimum": (
        ["optimizer.min_lr=1"],
        "optimizer.min_lr: expected at most optimizer.lr=0.001, got 1",
    ),
    "a short sequence": (["model.seq_length=16"], "was dumped with data.max_seq_length=48"),
    "a layout that does not fit": (
        ["model.tensor_model_parallel_size=3"],
        "model.tensor_model_parallel_size to divide the model's num_attention_heads, 4, got 3",
    ),
    "layers that do not divide": (
        ["model.pipeline_model_parallel_size=3"],
        "expected model.pipeline_model_parallel_size to divide the model's num_layers, 2, got 3",
    ),
    "too few processes": (
        ["model.tensor_model_parallel_size=2"],
        "processes divisible by tensor 2 x pipeline 1 x context 1 parallel sizes, got 1",
    ),
    "experts that are not there": (
        ["model.expert_model_parallel_size=2"],
        "expected model.expert_model_parallel_size=1 for a model without experts, got 2",
    ),
    "a batch that does not divide": (["train.micro_batch_size=3"], "train.global_batch_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, cache: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    overrides, message = BAD[case]
    overrides = [each.replace("CACHE", str(cache)) for each in overrides]
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path)
    output = run_example(TRAIN, *arguments, *overrides, succeeds=False)
    assert message in output, output[-2000:]
    assert "Traceback" not in output
