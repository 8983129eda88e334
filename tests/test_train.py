"""Training through NeMo agrees with the formula and with NeMo's SFT, at every layout."""

import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from distributed import run_distributed
from hosts import write_half
from nemo_models import local_logits
from omegaconf import OmegaConf
from runs import MAX_SEQ_LENGTH, run_example, scalars, train_arguments

from nemo_kd.cache import CacheWriter, TopKCache

CURVES = ("reduced_train_loss", "kd_loss", "sft_loss", "teacher_topk_mass", "student_topk_mass")
VALIDATED = (
    "kd_loss",
    "sft_loss",
    "teacher_topk_mass",
    "student_topk_mass",
    "teacher_entropy",
    "top1_agreement",
)


# At larger micro batches NeMo's sampler would group other samples at DP=2. A global batch of four
# samples is four micro batches, or two at DP=2, so that gradients accumulate.
TEN_STEPS = (
    "trainer.max_steps=10",
    "trainer.val_check_interval=5",
    *(f"model.data.{name}.micro_batch_size=1" for name in ("train_ds", "validation_ds")),
)


class Run(NamedTuple):
    curves: dict[str, list[float]]
    nemo: Path
    output: str


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path) -> Run:
    """Ten steps at (TP, PP, DP) = (1, 1, 1)."""
    directory = tmp_path_factory.mktemp("trained")
    nemo = directory / "kd.nemo"
    logs = directory / "logs"
    output = run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], cache, cache, logs, *TEN_STEPS, f"save_to={nemo}"),
    )
    return Run(scalars(logs), nemo, output)


def test_it_learns_and_logs(trained: Run) -> None:
    curves = trained.curves
    assert len(curves["reduced_train_loss"]) == 10
    assert curves["validation_loss"][1] < curves["validation_loss"][0]
    for name in VALIDATED:
        assert name in curves
        assert len(curves[f"validation_{name}_dataloader0"]) == 2
    np.testing.assert_allclose(
        curves["reduced_train_loss"],
        np.add(curves["kd_loss"], np.multiply(0.4, curves["sft_loss"])),
        rtol=1e-5,
    )
    for name in ("val_loss", "validation_loss", "validation_sft_loss_dataloader0"):
        np.testing.assert_allclose(curves[name], curves["validation_loss_dataloader0"], rtol=1e-6)


TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
FUSED = "model.knowledge_distillation.fuse_output_layer=true"


@pytest.mark.parametrize(
    ("layout", "processes"),
    [([TP2], 2), ([PP2], 2), ([], 2), ([FUSED], 1), ([FUSED, TP2], 2)],
    ids=["TP=2", "PP=2", "DP=2", "output layer fused in", "output layer fused in, TP=2"],
)
def test_another_layout_has_the_same_curves(
    layout: list[str],
    processes: int,
    trained: Run,
    nemos: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    logs = tmp_path / "logs"
    arguments = train_arguments(nemos["tied"], cache, cache, logs, *TEN_STEPS, *layout)
    # One layout starts through torchrun itself.
    output = run_example("train_kd_sft.py", *arguments, processes=processes, cold=layout == [TP2])
    curves = trained.curves
    sharded = scalars(logs)
    assert sharded.keys() == curves.keys()
    for name in (*CURVES, *(f"validation_{name}_dataloader0" for name in VALIDATED)):
        np.testing.assert_allclose(sharded[name], curves[name], rtol=0, atol=1e-4, err_msg=name)
    assert counted(output) == counted(trained.output)


def counted(output: str) -> str:
    """What the closing summary says that the run trained on. Only one rank prints it."""
    (line,) = re.findall(r"^  (40 samples, [\d,]+ tokens, .*supervised)$", output, re.MULTILINE)
    return line


def test_validation_is_the_formula_on_hugging_faces_logits(
    hf_llamas: dict[str, Path], nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """max_steps=0 only validates; validation_drop_last=false gives every token the same weight."""
    from transformers import AutoModelForCausalLM

    run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], cache, cache, tmp_path / "logs"),
        "trainer.max_steps=0",
        "model.data.validation_drop_last=false",
        "model.knowledge_distillation.tail=renormalize",
        # 2 divides the ten samples; otherwise NeMo fills the last batch up with the last sample.
        "model.data.validation_ds.global_batch_size=2",
    )
    logged = scalars(tmp_path / "logs")

    student = AutoModelForCausalLM.from_pretrained(hf_llamas["tied"])
    terms: dict[str, list[torch.Tensor]] = {"kd_loss": [], "sft_loss": [], "top1_agreement": []}
    for sample in TopKCache.open(cache):
        tokens = torch.from_numpy(sample.tokens).long()
        predicted = sample.loss_mask.nonzero()[0]
        with torch.no_grad():
            logits = student(tokens[None]).logits[0, predicted - 1].double()
        # NeMo pads the vocabulary to 512 with weights of 0, which give logits of 0.
        logits = torch.cat([logits, torch.zeros(len(logits), 512 - 401)], dim=-1)
        ids = torch.from_numpy(sample.topk_ids).long()
        teacher = torch.from_numpy(sample.topk_log_probs).double().log_softmax(-1)
        own = logits.gather(1, ids).log_softmax(-1)
        terms["kd_loss"].append((teacher.exp() * (teacher - own)).sum(-1))
        terms["sft_loss"].append(-logits.log_softmax(-1)[range(len(logits)), tokens[predicted]])
        best = ids.gather(1, teacher.argmax(-1, keepdim=True))
        terms["top1_agreement"].append((logits.argmax(-1, keepdim=True) == best).double()[:, 0])
    for name, values in terms.items():
        np.testing.assert_allclose(
            logged[f"validation_{name}_dataloader0"][-1], torch.cat(values).mean(), rtol=1e-4
        )
    np.testing.assert_allclose(
        logged["val_loss"][-1], torch.cat(terms["sft_loss"]).mean(), rtol=1e-4
    )


def plain_nemo_sft(
    rank: int, world_size: int, student: Path, jsonl: Path, logs: Path, prompt: str
) -> None:
    """NeMo's own MegatronGPTSFTModel on the jsonl, with the settings of train_arguments."""
    from hydra import compose, initialize_config_dir
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import open_dict
    from runs import EXAMPLES

    from nemo_kd.nemo import cpu_backend
    from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel, prepare_accelerator

    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        config = compose("train_kd_sft", train_arguments(student, jsonl, jsonl, logs))
    prepare_accelerator(config)
    with open_dict(config):
        config.model.data.train_ds.concat_sampling_probabilities = [1.0]
        config.model.data.train_ds.update(
            prompt_template=prompt, label_key="output", truncation_field="input"
        )
        for section in "train_ds", "validation_ds":  # NeMo asks for it, and never reads it
            config.model.data[section].min_seq_length = 1
        del config.model.knowledge_distillation
    merged = MegatronGPTSFTModel.merge_cfg_with(str(student), config)
    cpu_backend.prepare_model_config(merged)
    trainer = build_trainer(config)
    exp_manager(trainer, config.exp_manager)
    initialize_model_parallel(trainer, merged)
    model = MegatronGPTSFTModel.restore_from(
        str(student), override_config_path=merged, trainer=trainer
    )
    trainer.fit(model)


def test_without_kd_it_is_nemos_sft(
    nemos: dict[str, Path], cache: Path, jsonl: Path, tmp_path: Path
) -> None:
    from runs import PROMPT

    run_distributed(plain_nemo_sft, 1, nemos["tied"], jsonl, tmp_path / "nemo", PROMPT, timeout=200)
    # Validation is on the jsonl itself, which has only SFT metrics.
    arguments = train_arguments(nemos["tied"], cache, jsonl, tmp_path / "own")
    run_example(
        "train_kd_sft.py",
        *arguments,
        "model.knowledge_distillation.kd_loss_weight=0",
        "model.knowledge_distillation.sft_loss_weight=1",
    )
    nemo, own = scalars(tmp_path / "nemo"), scalars(tmp_path / "own")
    for name in ("reduced_train_loss", "val_loss", "validation_loss"):
        np.testing.assert_allclose(own[name], nemo[name], rtol=1e-5, err_msg=name)
    validated = {
        name for name in own if re.match("validation_.*(loss|mass|entropy|agreement)", name)
    }
    assert validated == {
        "validation_loss",
        "validation_loss_dataloader0",
        "validation_sft_loss_dataloader0",
    }
    assert "kd_loss" in own, "the KD metrics of an SFT run are still logged in training"


def test_the_saved_student_is_a_plain_nemo(
    trained: Run,
    nemos: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    curves, nemo, _ = trained
    assert {path.name for path in nemo.parent.iterdir()} == {"kd.nemo", "logs"}
    with tarfile.open(nemo) as tar:
        saved = OmegaConf.load(tar.extractfile("./model_config.yaml"))
    assert saved.target.endswith(".MegatronGPTSFTModel")
    assert saved.transformer_engine, "on a GPU it is NeMo's usual model again"
    assert "use_cpu_initialization" not in saved
    tokens = torch.randint(401, (2, 16), generator=torch.Generator().manual_seed(0))
    # Restored as MegatronGPTSFTModel, at another layout.
    shards = run_distributed(local_logits, 2, [nemo, nemos["tied"]], tokens)
    kd, before = (torch.cat([rank[index] for rank in shards], -1) for index in (0, 1))
    assert kd.isfinite().all()
    assert (kd - before).abs().max() > 1e-3
    arguments = train_arguments(nemo, cache, cache, tmp_path / "logs", *TEN_STEPS)
    run_example("train_kd_sft.py", *arguments, "trainer.max_steps=0")
    again = scalars(tmp_path / "logs")
    np.testing.assert_allclose(again["val_loss"][-1], curves["val_loss"][-1], rtol=1e-6)


ONE_A_BATCH = [f"model.data.{name}.micro_batch_size=1" for name in ("train_ds", "validation_ds")]


def test_samples_without_supervised_tokens_cost_nothing(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """NeMo's own loss is 0/0 for a micro batch of them."""
    half = write_half(tmp_path / "cache", TopKCache.open(cache), drop=False)
    run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], half, half, tmp_path / "logs"),
        *ONE_A_BATCH,
        "model.data.validation_drop_last=false",
    )
    curves = scalars(tmp_path / "logs")
    for name, values in curves.items():
        assert np.isfinite(values).all(), name
    assert curves["validation_loss"][1] < curves["validation_loss"][0]


def test_micro_batches_without_supervised_tokens_weigh_nothing(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Neither in the loss and its gradient, nor in the means, nor in what the best is chosen by."""
    curves = []
    for drop, processes in ((False, 2), (True, 1)):
        path = write_half(tmp_path / f"cache-{drop}", TopKCache.open(cache), drop)
        size = len(TopKCache.open(path))
        assert size == (5 if drop else 10)
        logs = tmp_path / f"logs-{drop}"
        run_example(
            "train_kd_sft.py",
            *train_arguments(nemos["tied"], path, path, logs),
            *ONE_A_BATCH,
            *(
                f"model.data.{name}.global_batch_size={size}"
                for name in ("train_ds", "validation_ds")
            ),
            "model.data.validation_drop_last=true",
            "trainer.max_steps=1",
            "trainer.val_check_interval=1",
            processes=processes,
        )
        curves.append(scalars(logs))
    compared = (*VALIDATED, *(f"validation_{name}_dataloader0" for name in VALIDATED))
    for name in ("reduced_train_loss", "grad_norm", "validation_loss", "val_loss", *compared):
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def one_micro_batch(
    tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path
) -> dict[str, dict[str, list[float]]]:
    """Four steps of each reduction, where a global batch is one micro batch of one replica."""
    directory = tmp_path_factory.mktemp("reduction")
    for reduction in ("micro_batch", "token"):
        run_reduction(nemos["tied"], cache, directory / reduction, reduction, 4)
    return {path.name: scalars(path) for path in directory.iterdir()}


def run_reduction(
    student: Path, cache: Path, logs: Path, reduction: str, size: int, *more: str, **options: Any
) -> None:
    run_example(
        "train_kd_sft.py",
        *train_arguments(student, cache, cache, logs, *more),
        f"model.loss_reduction={reduction}",
        f"model.data.train_ds.micro_batch_size={size}",
        **options,
    )


REDUCED = ("reduced_train_loss", "grad_norm", "kd_loss", "sft_loss", "teacher_entropy")


@pytest.mark.parametrize(
    ("size", "layout", "processes"),
    [(1, [], 1), (2, [], 2), (1, [], 2), (1, [FUSED], 1), (2, [PP2], 2)],
    ids=["accumulated", "DP=2", "DP=2, accumulated", "output layer fused in", "PP=2"],
)
def test_tokens_weigh_alike_however_samples_are_cut(
    size: int,
    layout: list[str],
    processes: int,
    one_micro_batch: dict[str, dict[str, list[float]]],
    nemos: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    run_reduction(nemos["tied"], cache, tmp_path, "token", size, *layout, processes=processes)
    found, expected = scalars(tmp_path), one_micro_batch["token"]
    for name in REDUCED:
        # Of the first step, which starts with the same weights; Adam enlarges what rounding does.
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, err_msg=name)


def test_a_micro_batch_is_the_unit_unless_tokens_are(
    one_micro_batch: dict[str, dict[str, list[float]]],
    nemos: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    run_reduction(nemos["tied"], cache, tmp_path, "micro_batch", 1)
    found = scalars(tmp_path)
    for name in REDUCED:
        # One micro batch is the same by both; four are not, because answers differ in length.
        whole = one_micro_batch["micro_batch"][name]
        np.testing.assert_allclose(whole, one_micro_batch["token"][name], rtol=1e-6, err_msg=name)
        assert abs(found[name][0] / whole[0] - 1) > 1e-3, name


def test_nothing_to_learn_from_is_refused(
    nemos: dict[str, Path], cache: Path, jsonl: Path, tmp_path: Path
) -> None:
    """As a cache, and as a jsonl to validate on."""
    source = TopKCache.open(cache)
    manifest = replace(source.manifest, teacher_fingerprint="no answers", num_samples=1)
    writer = CacheWriter.open(tmp_path / "cache", manifest)
    sample: Any = source[0]
    with writer.shard(0) as sink:
        sink.add(
            sample.tokens,
            np.zeros_like(sample.loss_mask),
            sample.context_length,
            *(array[:0] for array in sample[2:5]),
        )
    arguments = train_arguments(nemos["tied"], writer.path, cache, tmp_path / "logs")
    output = run_example("train_kd_sft.py", *arguments, succeeds=False)
    assert f"{writer.path}: 1 of 1 samples have no supervised token; dump again" in output
    arguments = train_arguments(nemos["tied"], cache, jsonl, tmp_path / "logs")
    output = run_example(
        "train_kd_sft.py",
        *arguments,
        "model.data.validation_ds.max_seq_length=4",
        # Only the end is cut off, which is the answer.
        "model.data.validation_ds.truncation_field=output",
        succeeds=False,
    )
    assert "no sample of this validation set has a supervised token" in output


BAD = {
    "no such cache": (["model.data.train_ds.file_names=[nowhere]"], "found no nowhere"),
    "a jsonl to train on": (
        ["model.data.train_ds.file_names=[JSONL]"],
        "expected cache directories",
    ),
    "not a cache": (["model.data.train_ds.file_names=[DIRECTORY]"], "expected a cache directory"),
    "shorter sequences": (
        ["model.data.train_ds.max_seq_length=16"],
        f"data.max_seq_length={MAX_SEQ_LENGTH}, this run has max_seq_length=16",
    ),
    "temperature": (
        [
            "model.knowledge_distillation.tail=bucket",
            "model.knowledge_distillation.temperature=2",
        ],
        "dump again at that temperature",
    ),
    "no such tail": (["model.knowledge_distillation.tail=ghost"], "ghost"),
    "no such mode": (
        ["model.knowledge_distillation.divergence=jsd", "model.knowledge_distillation.tail=drop"],
        "jsd",
    ),
    "no student": (["model.restore_from_path=nowhere.nemo"], "found no nowhere.nemo"),
    "no GPU": (["trainer.accelerator=gpu"], "torch sees no CUDA device"),
    "misspelt key": (["model.optim.learning_rate=1"], "learning_rate"),
    "misspelt key of Lightning's with +": (
        ["+trainer.max_stepz=1"],
        "'max_stepz'; Lightning's Trainer has no such key",
    ),
    "a batch that does not divide": (
        ["model.data.validation_ds.micro_batch_size=3"],
        "divisible by its micro_batch_size 3",
    ),
    "misspelt key with +": (
        ["+model.knowledge_distillation.weight=1"],
        "model.knowledge_distillation.weight is a key that nothing reads",
    ),
    "answers from a cache": (["model.data.validation_ds.metric.name=rouge"], "metric.name=loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str,
    nemos: dict[str, Path],
    cache: Path,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    overrides, message = BAD[case]
    overrides = [
        o.replace("JSONL", str(jsonl)).replace("DIRECTORY", "directory") for o in overrides
    ]
    arguments = train_arguments(nemos["tied"], cache, cache, tmp_path / "logs", *overrides)
    output = run_example("train_kd_sft.py", *arguments, succeeds=False)
    assert message in output
    assert "Traceback" not in output
