"""Hugging Face -> .nemo -> Hugging Face gives back every weight, and a model that generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_example
from safetensors import safe_open

CONFIG = (  # the settings that the model's outputs depend on
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "initializer_range",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def more_models(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> dict[str, Path]:
    """What the Llamas of conftest lack: biases, other head sizes, half precision, scaled RoPE."""
    from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

    shared = {
        "vocab_size": len(hf_tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "bos_token_id": hf_tokenizer.bos_token_id,
        "eos_token_id": hf_tokenizer.eos_token_id,
    }
    linear = {"rope_type": "linear", "factor": 2.0}
    configs = {
        "qwen2": Qwen2Config(
            **shared, rope_theta=1e6, rope_scaling=linear, use_sliding_window=False
        ),
        "mistral": MistralConfig(
            **shared,
            head_dim=8,
            sliding_window=None,
            rope_scaling=LLAMA3_ROPE,
            torch_dtype=torch.bfloat16,
        ),
    }
    paths = {}
    for name, config in configs.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases are not 0 then, and norms not 1
            torch.nn.init.normal_(parameter, std=0.1)
        paths[name] = tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(paths[name])
        hf_tokenizer.save_pretrained(paths[name])
    return paths


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return weights


@pytest.mark.parametrize(
    ("name", "layers"), [("tied", None), ("untied", None), ("qwen2", [2, 0]), ("mistral", None)]
)
def test_round_trip(
    name: str,
    layers: list[int] | None,
    hf_llamas: dict[str, Path],
    nemos: dict[str, Path],
    more_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = (hf_llamas | more_models)[name]
    nemo, output = tmp_path / "model.nemo", tmp_path / "hf"
    if name in nemos:
        nemo = nemos[name]
    else:
        keep = f"keep_layers={layers}".replace(" ", "").replace("None", "null")
        run_example("import_hf_llama.py", f"source={source}", f"output={nemo}", keep)
    run_example("export_hf_llama.py", f"source={nemo}", f"output={output}", cold=name == "tied")

    expected = weights_of(source)
    if layers is not None:
        expected = {
            weight.replace(f".layers.{old}.", f".layers.{new}."): tensor
            for weight, tensor in expected.items()
            for new, old in enumerate(layers)
            if ".layers." not in weight or f".layers.{old}." in weight
        }
    exported = weights_of(output)
    assert exported.keys() == expected.keys()
    for weight, tensor in expected.items():
        assert exported[weight].dtype == tensor.dtype, weight
        assert torch.equal(exported[weight], tensor), weight

    own, theirs = AutoConfig.from_pretrained(output), AutoConfig.from_pretrained(source)
    assert own.model_type == ("qwen2" if name == "qwen2" else "llama")
    for key in CONFIG:
        assert getattr(own, key) == getattr(theirs, key), key

    model = AutoModelForCausalLM.from_pretrained(output, torch_dtype="auto")
    reference = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")
    if layers is not None:
        reference.model.layers = torch.nn.ModuleList([reference.model.layers[i] for i in layers])
        for new, layer in enumerate(reference.model.layers):
            layer.self_attn.layer_idx = new
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("the student learns", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(generated, reference.generate(**inputs, max_new_tokens=60, do_sample=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=nowhere.nemo", "output=hf"], "found no nowhere.nemo"),
        (["source=HF/config.json", "output=hf"], "expected a .nemo"),
        (["source=NEMO", "output=there"], "output: expected a new directory, but there exists"),
        (["source=NEMO", "output=hf", "dtype=int4"], "dtype: expected null, bfloat16"),
        (["source=OTHER", "output=hf"], "of the Llama family (normalization: rmsnorm), got"),
    ],
    ids=["no source", "no .nemo", "output exists", "no such dtype", "another architecture"],
)
def test_bad_input_is_one_clear_line(
    hf_llamas: dict[str, Path],
    nemos: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    if "source=OTHER" in arguments:
        unpack_as_layernorm(nemos["tied"], tmp_path / "other")
    names = {"HF": hf_llamas["tied"], "NEMO": nemos["tied"], "OTHER": "other"}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    output = run_example("export_hf_llama.py", *arguments, succeeds=False)
    assert message in output
    assert "Traceback" not in output
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "other"}


def unpack_as_layernorm(nemo: Path, directory: Path) -> None:
    """An unpacked .nemo whose config is that of another architecture."""
    import tarfile

    directory.mkdir()
    with tarfile.open(nemo) as tar:
        tar.extractall(directory, filter="data")
    config = directory / "model_config.yaml"
    config.write_text(config.read_text().replace("rmsnorm", "layernorm1p"))
