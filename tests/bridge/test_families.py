"""Each family on Megatron-Bridge computes what transformers computes, before and after training."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of, save_model
from runs import MAX_SEQ_LENGTH, run_example, scalars
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_kd.cache import TopKCache
from nemo_kd.hf_config import check_hf_config

DUMP, TRAIN = "bridge/dump_teacher_topk.py", "bridge/train_kd_sft.py"
K = 8

Models = Callable[[str], Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> Models:
    """A family's model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("families") / family
            made[family] = save_model(path, config_of(family), hf_tokenizer)
        return made[family]

    return model


def dump(model: Path, jsonl: Path, cache: Path, *more: str, **how: Any) -> Any:
    """The cache; or, if the run is to fail, what it printed."""
    output = run_example(
        DUMP,
        "device=cpu",
        f"model.hf_path={model}",
        f"data.file_names=[{jsonl}]",
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
        "data.micro_batch_size=2",
        "data.num_workers=0",
        f"selection.k={K}",
        "cache.codec=raw",
        f"cache.path={cache}",
        *more,
        **how,
    )
    return TopKCache.open(cache) if how.get("succeeds", True) else output


def train(model: Path, cache: TopKCache, output: Path, *more: str, **how: Any) -> str:
    return run_example(
        TRAIN,
        "device=cpu",
        f"model.hf_path={model}",
        f"model.seq_length={MAX_SEQ_LENGTH}",
        f"dataset.train_caches=[{cache.path}]",
        f"dataset.validation_caches=[{cache.path}]",
        "dataset.num_workers=0",
        "train.train_iters=2",
        "train.eval_interval=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "scheduler.lr_decay_style=constant",
        "scheduler.lr_warmup_iters=0",
        f"logger.tensorboard_dir={output}/logs",
        f"save_hf={output}/saved",
        *more,
        **how,
    )


def reference(model: Path, sample: Any, vocab_size: int) -> torch.Tensor:
    """transformers' log-probs [P, V] of the supervised tokens, over the tokenizer's vocabulary.

    transformers 5 gives a Qwen2 directory a token more than its tokenizer has.
    """
    # The plain attention of transformers: each family has it.
    own = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokens = torch.from_numpy(sample.tokens).long()
    with torch.no_grad():
        logits = own(tokens[None, :-1]).logits[0, :, :vocab_size]
    return logits.log_softmax(-1)[torch.from_numpy(sample.loss_mask[1:]).bool()]


def assert_rows(sample: Any, log_probs: torch.Tensor) -> None:
    """The K largest to the rounding of float16, whose ids are others only where values tie."""
    stored = torch.from_numpy(sample.topk_log_probs)
    own = log_probs.gather(1, torch.from_numpy(sample.topk_ids).long())
    largest, _ = log_probs.topk(K)
    for expected in own, largest:
        got = stored if expected is own else stored.sort(descending=True).values
        torch.testing.assert_close(got, expected, rtol=2**-11, atol=1e-4)


def cross_entropy(model: Path, cache: TopKCache) -> float:
    """Of the supervised tokens, by transformers, over all rows of the embedding."""
    own = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    losses = []
    for sample in cache:
        tokens = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            log_probs = own(tokens[None, :-1]).logits[0].log_softmax(-1)
        mask = torch.from_numpy(sample.loss_mask[1:]).bool()
        losses.append(-log_probs.gather(1, tokens[1:, None])[mask, 0])
    return torch.cat(losses).mean().item()


def tensors(model: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(
    family: str, models: Models, jsonl: Path, tmp_path: Path
) -> None:
    model = models(family)
    cache = dump(model, jsonl, tmp_path / "cache")
    for sample in cache:
        assert_rows(sample, reference(model, sample, cache.manifest.vocab_size))
    train(model, cache, tmp_path, "optimizer.lr=1e-3")
    (validated,) = scalars(tmp_path)["sft_loss validation"][-1:]
    assert cross_entropy(tmp_path / "saved", cache) == pytest.approx(validated, rel=1e-4)
    assert validated != pytest.approx(cross_entropy(model, cache), rel=1e-2)  # it was trained
    # And one step without a learning rate leaves each bit as it was.
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    train(model, cache, untrained, "optimizer.lr=0", "train.train_iters=1")
    before, after = tensors(model), tensors(untrained / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("gemma", "tensor"),
        ("gemma3", "tensor"),
        ("nemotron", "tensor"),
        ("gemma2", "pipeline"),
        ("qwen3_moe", "expert"),
        ("gpt_oss", "expert"),
    ],
)
def test_a_family_at_two_ranks(
    family: str, layout: str, models: Models, jsonl: Path, tmp_path: Path
) -> None:
    model, parallel = models(family), f"model.{layout}_model_parallel_size=2"
    cache = dump(model, jsonl, tmp_path / "cache", parallel, processes=2)
    for sample in cache:
        assert_rows(sample, reference(model, sample, cache.manifest.vocab_size))
    train(model, cache, tmp_path, "optimizer.lr=1e-3", parallel, processes=2)
    (validated,) = scalars(tmp_path)["sft_loss validation"][-1:]
    assert cross_entropy(tmp_path / "saved", cache) == pytest.approx(validated, rel=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DROPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a rope scaling": ("qwen3", {"rope_scaling": YARN}, "no rope_scaling of this type .*got yarn"),
    "a llama's own scaling": (
        "llama3",
        {"rope_scaling": {**config_of("llama3").rope_scaling, "low_freq_factor": 2.0}},
        r"expected rope_scaling.low_freq_factor=1.0 in config.json, got 2.0",
    ),
    "an activation": ("gemma", {"hidden_activation": "gelu"}, "hidden_activation=gelu_pytorch_t"),
    "probabilities of experts": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=True"),
    "a window": ("gemma2", {"sliding_window": 47}, "seq_length of at most 47, the sliding window"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_bridge_drops_is_refused(case: str) -> None:
    family, changes, message = DROPPED[case]
    with pytest.raises(ValueError, match=message):
        check_hf_config(config_of(family, **changes), 48, "seq_length")
    check_hf_config(config_of(family), 48, "seq_length")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama3", {"attention_bias": True}, "parameters without weights, decoder.layers.0.self"),
        ("deepseek_v3", {}, "expected model.multi_latent_attention=false with device=cpu"),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, "layers for multi-token prediction, got 1"),
    ],
)
def test_a_model_that_bridge_reads_in_part_is_refused(
    family: str,
    changes: dict[str, Any],
    message: str,
    hf_tokenizer: Any,
    jsonl: Path,
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model", config_of(family, **changes), hf_tokenizer)
    arguments = [f"model.hf_path={model}", f"data.file_names=[{jsonl}]", "device=cpu"]
    more = [f"cache.path={tmp_path / 'cache'}", f"data.max_seq_length={MAX_SEQ_LENGTH}"]
    output = run_example(DUMP, *arguments, *more, "selection.k=8", succeeds=False)
    assert message in output, output[-2000:]
    assert "Traceback" not in output


def test_an_output_layer_that_does_more_is_not_fused(
    models: Models, jsonl: Path, tmp_path: Path
) -> None:
    """Gemma 2 caps its logits."""
    cache = dump(models("gemma2"), jsonl, tmp_path / "cache")
    fused = "knowledge_distillation.fuse_output_layer=true"
    output = train(models("gemma2"), cache, tmp_path, fused, succeeds=False)
    assert "expected a plain output layer with fuse_output_layer=true, got one" in output
    assert "Traceback" not in output


def test_experts_have_no_adapters_here(models: Models, jsonl: Path, tmp_path: Path) -> None:
    cache = dump(models("qwen3_moe"), jsonl, tmp_path / "cache")
    output = train(models("qwen3_moe"), cache, tmp_path, "peft.peft_scheme=lora", succeeds=False)
    assert "peft.target_modules: Layer type is unrecognized for LoRA" in output, output[-2000:]
    assert "Traceback" not in output


def test_weights_that_bridge_drops_are_refused(models: Models, jsonl: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models("qwen3"), tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # needless
    save_file(weights, file, metadata={"format": "pt"})
    dump(model, jsonl, tmp_path / "cache")
    weights["model.layers.0.self_attn.sinks"] = torch.ones(4)
    save_file(weights, file, metadata={"format": "pt"})
    output = dump(model, jsonl, tmp_path / "other", succeeds=False)
    assert "leave 1 weights unread, model.layers.0.self_attn.sinks among them" in output
    assert "Traceback" not in output
