"""What an import honours and what it refuses: every field of the configs, and every weight."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_kd.nemo.hf.fields import check_fields, check_gguf, read_rope
from nemo_kd.nemo.hf.source import open_source

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 401}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As transformers 5 saves them: the fields of its dataclasses, and those of their base.
BASE_5 = {
    "transformers_version": "5.24.0",
    "architectures": ["LlamaForCausalLM"],
    "output_hidden_states": False,
    "return_dict": True,
    "dtype": "bfloat16",
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    **SIZES,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
TRANSFORMERS_5 = {
    "llama": BASE_5
    | {
        "model_type": "llama",
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
    },
    "mistral": BASE_5
    | {
        "model_type": "mistral",
        "head_dim": None,
        "sliding_window": None,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "qwen2": BASE_5
    | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    },
    "qwen3": BASE_5
    | {
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "nemotron": {key: value for key, value in BASE_5.items() if key != "rms_norm_eps"}
    | {
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 0.25,
        },
    },
}
PLAIN = {"model_type": "llama", **SIZES}
NEMOTRON = {"model_type": "nemotron", **SIZES}


@pytest.mark.parametrize("model_type", sorted(TRANSFORMERS_5))
def test_every_field_of_transformers_is_known(model_type: str) -> None:
    from transformers import AutoConfig

    window = {"sliding_window": None} if model_type == "mistral" else {}
    check_fields(AutoConfig.for_model(model_type, **SIZES, **window).to_dict())
    check_fields(TRANSFORMERS_5[model_type])


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        (TRANSFORMERS_5["llama"], 5e5, LLAMA3),
        (TRANSFORMERS_5["mistral"], 1e6, None),
        (TRANSFORMERS_5["qwen2"], 1e6, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            5e5,
            {"rope_type": "linear", "factor": 2},
        ),
        ({"rope_scaling": None}, 1e4, None),
    ],
    ids=["5 llama3", "5 default", "5 linear", "4 default", "4 linear of old", "none"],
)
def test_rope_of_both_versions(
    fields: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    read = read_rope({"model_type": "llama"} | fields)
    assert (read["rope_theta"], read["rope_scaling"]) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        (NEMOTRON, 0.5),
        (NEMOTRON | {"partial_rotary_factor": 0.25}, 0.25),
        (TRANSFORMERS_5["nemotron"], 0.25),
    ],
    ids=["left out", "4", "5"],
)
def test_partial_rope_of_both_versions(fields: dict[str, Any], share: float) -> None:
    assert read_rope(fields)["partial_rotary_factor"] == share


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gemma"},
            "expected model_type llama or mistral or qwen2 or qwen3 or nemotron, got gemma",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias False, got True"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window False"),
        ({"model_type": "qwen3", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        (NEMOTRON | {"hidden_act": "silu"}, "expected hidden_act relu2, got 'silu'"),
        (NEMOTRON | {"rms_norm_eps": 1e-6}, "rms_norm_eps: 1e-06, a field"),
        (NEMOTRON | {"mlp_bias": True}, "expected mlp_bias False, got True"),
        (NEMOTRON | {"sliding_window": 64}, "sliding-window"),
        (NEMOTRON | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "a RoPE of default ()"),
        (
            NEMOTRON
            | {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "two values of partial_rotary_factor",
        ),
        ({"hidden_act": "gelu"}, "expected hidden_act silu or swish, got 'gelu'"),
        ({"attention_bias": True}, "expected attention_bias False, got True"),
        ({"mlp_bias": True}, "expected mlp_bias False, got True"),
        ({"partial_rotary_factor": 0.5}, "expected partial_rotary_factor 1.0, got 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"bits": 4}}, "expected quantization_config none, got"),
        ({"auto_map": {"AutoModel": "m.py"}}, "auto_map"),
        (
            {"is_causal": False},
            "is_causal: False, a field that the import does not know",
        ),
        ({"logit_scale": 0.5}, "config.json has logit_scale: 0.5"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected a model with logits"),
        ({"sliding_window": 64}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"model_type": "mistral"}, "sliding_window 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window False, got True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'type': 'dynamic'"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 (factor, low_freq"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_another_function_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(PLAIN | fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "tensor", "message"),
    [
        ({}, "output_norm.weight", None),
        ({"attention.key_length": 16, "attention.value_length": 16}, "output_norm.weight", None),
        ({"attention.key_length": 32}, "output_norm.weight", "several head sizes"),
        ({"rope.scaling.factor": 4}, "output_norm.weight", "llama.rope.scaling.factor"),
        ({"expert_count": 8}, "output_norm.weight", "llama.expert_count"),
        ({}, "rope_freqs.weight", "rope_freqs.weight"),
        ({}, "blk.0.attn_q_norm.weight", "blk.0.attn_q_norm.weight"),
        ({"architecture": "nemotron"}, "output_norm.weight", "a llama or a qwen2, got nemotron"),
    ],
    ids=[
        *("plain", "head size", "other key size", "scaled", "experts", "scaled freqs", "q norm"),
        "other architecture",
    ],
)
def test_gguf(fields: dict[str, Any], tensor: str, message: str | None, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    architecture = fields.get("architecture", "llama")
    fields = {name: value for name, value in fields.items() if name != "architecture"}
    writer = GGUFWriter(tmp_path / "model.gguf", architecture)
    own = {"embedding_length": 64, "attention.head_count": 4, "rope.dimension_count": 16} | fields
    for name, value in own.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_tensor(tensor, np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(tmp_path / "model.gguf")
    if message is None:
        check_gguf(reader)
        return
    with pytest.raises(ValueError) as error:
        check_gguf(reader)
    assert message in str(error.value)


def lack_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def add_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def cut_weights(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])


def enlarge_tokenizer(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(directory)


def change_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lack_weights, "missing_keys ['model.layers.1.mlp.up_proj.weight'] (1 in all)"),
        (add_weights, "unexpected_keys ['model.layers.1.self_attn.q_norm.weight'] (1 in all)"),
        (cut_weights, "a weight file in"),
        (enlarge_tokenizer, "at most the embedding's 401 rows, got 402 tokens"),
        (lambda directory: change_config(directory, vocab_size=512), "mismatched_keys"),
        (
            lambda directory: change_config(directory, tie_word_embeddings=True),
            "but lm_head.weight",
        ),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda directory: (directory / "config.json").write_text("[]"), "expected a JSON object"),
    ],
    ids=[
        "missing",
        "left over",
        "truncated",
        "tokenizer",
        "other shape",
        "tied",
        "no JSON",
        "no object",
    ],
)
def test_damaged_source_is_refused(
    damage: Any, message: str, hf_llamas: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(hf_llamas["untied"], tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ValueError) as error:
        open_source(tmp_path / "hf")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def lose_embedding(directory: Path) -> None:
    """A tied model that has an output layer and no embedding."""
    change_config(directory, tie_word_embeddings=True)
    weights = load_file(directory / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_model_without_its_embedding(hf_llamas: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(hf_llamas["untied"], tmp_path / "hf")
    lose_embedding(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"missing_keys \['model.embed_tokens.weight'\]"):
        open_source(tmp_path / "hf")


def test_one_file_is_preferred_to_an_index(hf_llamas: dict[str, Path], tmp_path: Path) -> None:
    """As in transformers, which leaves an old index beside a model that it saves in one file."""
    shutil.copytree(hf_llamas["untied"], tmp_path / "hf")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lm_head.weight" in open_source(tmp_path / "hf").weights
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"which model\.safetensors\.index\.json names, found no"):
        open_source(tmp_path / "hf")


def test_old_buffers_are_no_weights(hf_llamas: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(hf_llamas["untied"], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, file, metadata={"format": "pt"})
    open_source(tmp_path / "hf")


def test_rope_of_transformers_5_reaches_the_model(
    hf_llamas: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(hf_llamas["untied"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for field in ("rope_theta", "rope_scaling"):
        del config[field]
    config["rope_parameters"] = {"rope_theta": 5e5, **LLAMA3}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    config = open_source(tmp_path / "hf").config
    assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)
