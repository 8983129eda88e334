"""Hugging Face -> .nemo -> Hugging Face gives back every weight, and a model that generates."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from nemo_models import local_logits
from omegaconf import OmegaConf
from runs import dump_arguments, run_example, scalars, train_arguments
from safetensors import safe_open

from nemo_kd.cache import TopKCache
from nemo_kd.nemo.hf.exporter import kept_fields
from nemo_kd.nemo.hf.families import FAMILIES, LLAMA, NEMO_DEFAULTS, Family, family_of_nemo
from nemo_kd.nemo.nemo_file import load_weights, read_model_config

CONFIG = (  # the settings that the model's outputs depend on
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "initializer_range",
    "hidden_act",
    "head_dim",
    "rms_norm_eps",
    "norm_eps",
    "partial_rotary_factor",
    "rope_scaling",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAYERS = {"qwen2": [2, 0]}  # of a model that has three; the others keep all
# Two end tokens, and a combination that transformers itself would refuse to save.
GENERATION = {"eos_token_id": [1, 5], "do_sample": False, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="module")
def more_models(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> dict[str, Path]:
    """What the Llamas of conftest lack: biases, spare rows, half precision, scaled RoPE, ..."""
    from transformers import (
        AutoModelForCausalLM,
        MistralConfig,
        NemotronConfig,
        Qwen2Config,
        Qwen3Config,
    )

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
            **shared | {"vocab_size": 600, "eos_token_id": [1, 5]},
            rope_theta=1e6,
            rope_scaling=linear,
            use_sliding_window=False,
        ),
        "mistral": MistralConfig(
            **shared,
            head_dim=8,
            sliding_window=None,
            rope_scaling=LLAMA3_ROPE,
            torch_dtype=torch.bfloat16,
        ),
        # As in the family's own models, the heads together are wider than the hidden state.
        "qwen3": Qwen3Config(
            **shared | {"num_hidden_layers": 2, "rms_norm_eps": 1e-6},
            head_dim=24,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
        "nemotron": NemotronConfig(
            **{key: value for key, value in shared.items() if key != "rms_norm_eps"},
            norm_eps=1e-4,
            head_dim=24,
            partial_rotary_factor=0.5,
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
    (paths["qwen2"] / "generation_config.json").write_text(json.dumps(GENERATION))
    return paths


@pytest.fixture(scope="module")
def more_nemos(
    more_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The .nemo of each, the Mistral's from a config.json as transformers 5 writes it."""
    config = json.loads((more_models["mistral"] / "config.json").read_text())
    as_5 = config | {"dtype": config.pop("torch_dtype")}
    as_5["rope_parameters"] = {"rope_theta": as_5.pop("rope_theta"), **as_5.pop("rope_scaling")}
    directory = tmp_path_factory.mktemp("nemo")
    shutil.copytree(more_models["mistral"], directory / "mistral")
    (directory / "mistral" / "config.json").write_text(json.dumps(as_5))
    sources = more_models | {"mistral": directory / "mistral"}
    nemos = {name: directory / f"{name}.nemo" for name in more_models}
    for name, nemo in nemos.items():
        keep = f"keep_layers={LAYERS.get(name, 'null')}".replace(" ", "")
        run_example("import_hf_llama.py", f"source={sources[name]}", f"output={nemo}", keep)
    return nemos


def load_reference(name: str, source: Path) -> Any:
    """The Hugging Face model, of the layers that the .nemo has."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")
    if name in LAYERS:
        reference.model.layers = torch.nn.ModuleList(
            [reference.model.layers[i] for i in LAYERS[name]]
        )
        for new, layer in enumerate(reference.model.layers):
            layer.self_attn.layer_idx = new
    return reference


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_nemo_computes_the_logits(
    more_models: dict[str, Path], more_nemos: dict[str, Path], tensor_parallel_size: int
) -> None:
    tokens = torch.randint(401, (2, 100), generator=torch.Generator().manual_seed(0))
    nemos = list(more_nemos.values())
    shards = run_distributed(local_logits, tensor_parallel_size, nemos, tokens)
    for index, (name, source) in enumerate(more_models.items()):
        hf = load_reference(name, source).float()
        ours = torch.cat([rank[index] for rank in shards], dim=-1)[..., : hf.config.vocab_size]
        with torch.no_grad():
            theirs = hf(tokens).logits
        # Sums in another order.
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return weights


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2", "mistral", "qwen3", "nemotron"])
def test_round_trip(
    name: str,
    hf_llamas: dict[str, Path],
    nemos: dict[str, Path],
    more_models: dict[str, Path],
    more_nemos: dict[str, Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, nemo = (hf_llamas | more_models)[name], (nemos | more_nemos)[name]
    output = tmp_path / "hf"
    run_example("export_hf_llama.py", f"source={nemo}", f"output={output}", cold=name == "tied")

    expected = weights_of(source)
    if name in LAYERS:
        expected = {
            weight.replace(f".layers.{old}.", f".layers.{new}."): tensor
            for weight, tensor in expected.items()
            for new, old in enumerate(LAYERS[name])
            if ".layers." not in weight or f".layers.{old}." in weight
        }
    exported = weights_of(output)
    assert exported.keys() == expected.keys()
    for weight, tensor in expected.items():
        assert exported[weight].dtype == tensor.dtype, weight
        assert torch.equal(exported[weight], tensor), weight

    own, theirs = AutoConfig.from_pretrained(output), AutoConfig.from_pretrained(source)
    assert own.model_type == (name if name in ("qwen2", "qwen3", "nemotron") else "llama")
    for key in CONFIG:
        if hasattr(theirs, key):
            assert getattr(own, key) == getattr(theirs, key), key
    if name == "qwen2":
        assert json.loads((output / "generation_config.json").read_text()) == GENERATION

    model = AutoModelForCausalLM.from_pretrained(output, torch_dtype="auto")
    reference = load_reference(name, source)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("the student learns", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(generated, reference.generate(**inputs, max_new_tokens=60, do_sample=False))


@pytest.mark.parametrize(("teacher", "student"), [("qwen3", "nemotron"), ("nemotron", "qwen3")])
def test_dump_and_train(
    teacher: str,
    student: str,
    more_models: dict[str, Path],
    more_nemos: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    """Qwen3 and Nemotron, each as a teacher and as a student."""
    from transformers import AutoModelForCausalLM

    cache, save_to = tmp_path / "cache", tmp_path / "kd.nemo"
    run_example("dump_teacher_topk.py", *dump_arguments(more_nemos[teacher], jsonl, cache))
    hf = AutoModelForCausalLM.from_pretrained(more_models[teacher])
    for sample in TopKCache.open(cache):
        tokens = torch.from_numpy(sample.tokens).long()
        predicted = sample.loss_mask.nonzero()[0]
        with torch.no_grad():
            rows = hf(tokens[None]).logits[0, predicted - 1].log_softmax(-1)
        # float16 holds log-probs down to -16 to 0.008.
        np.testing.assert_allclose(sample.topk_log_probs, rows.topk(8).values, atol=1e-2)

    arguments = train_arguments(more_nemos[student], cache, cache, tmp_path / "logs")
    run_example(
        "train_kd_sft.py",
        *(*arguments, f"save_to={save_to}", "trainer.max_steps=2", "model.optim.lr=1e-2"),
    )
    curves = scalars(tmp_path / "logs")
    assert len(curves["kd_loss"]) == 2
    assert np.isfinite(curves["kd_loss"]).all()
    run_example("export_hf_llama.py", f"source={save_to}", f"output={tmp_path / 'hf'}")
    exported, before = weights_of(tmp_path / "hf"), weights_of(more_models[student])
    assert exported.keys() == before.keys()
    unchanged = [name for name, tensor in before.items() if torch.equal(exported[name], tensor)]
    assert not unchanged, "every weight has a gradient"
    # A GPU builds the model by these two keys: see families.py.
    config = read_model_config(str(save_to), "source")
    assert config.get("bias_activation_fusion", True) == (student == "qwen3")
    assert config.get("name", "") == ("decoder_block_gpt" if student == "qwen3" else "")


def test_norms_of_q_and_k_learn_from_all_heads(
    more_nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """NeMo leaves each rank with the gradient of its own heads."""
    weights = []
    for size in (1, 2):
        save_to = tmp_path / f"{size}.nemo"
        run_example(
            "train_kd_sft.py",
            *train_arguments(more_nemos["qwen3"], cache, cache, tmp_path / f"logs-{size}"),
            f"model.tensor_model_parallel_size={size}",
            *("model.optim.lr=1e-2", "trainer.max_steps=2", f"save_to={save_to}"),
            processes=size,
        )
        weights.append(load_weights(str(save_to), str(tmp_path)))
    one, two = weights
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("hugging_face", "eos", "size"),
    [
        ({"vocab_size": 600, "eos_token_id": [1, 5], "tokenizer_eos": 1}, [1, 5], 600),
        ({"vocab_size": 600, "eos_token_id": [0, 5], "tokenizer_eos": 0}, 1, 600),
        ({}, 1, 401),
    ],
    ids=["the source's tokenizer", "another tokenizer", "another tool's .nemo"],
)
def test_ids_of_tokens_fit_the_tokenizer(
    hf_tokenizer: Any, hugging_face: dict[str, Any], eos: Any, size: int
) -> None:
    kept = kept_fields(OmegaConf.create({"hugging_face": hugging_face}), hf_tokenizer)
    assert (kept["eos_token_id"], kept["vocab_size"]) == (eos, size)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_known_by_its_config(family: Family) -> None:
    config = OmegaConf.create(family.architecture)
    assert family_of_nemo(config) is family
    for key, default in NEMO_DEFAULTS.items():
        if config.get(key) == default:  # as NeMo takes it where it is left out or null
            del config[key]
            assert family_of_nemo(config) is family
            config[key] = None
            assert family_of_nemo(config) is family


@pytest.mark.parametrize(
    "key", ["num_moe_experts", "softmax_scale", "attn_logit_softcapping", "rotary_interleaved"]
)
def test_another_architecture_is_not_exported(key: str) -> None:
    with pytest.raises(ValueError, match=f"got one with {key}: 2"):
        family_of_nemo(OmegaConf.create({**LLAMA.architecture, key: 2}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=nowhere.nemo", "output=hf"], "found no nowhere.nemo"),
        (["source=HF/config.json", "output=hf"], "expected a .nemo"),
        (["source=NEMO", "output=there"], "output: expected a new directory, but there exists"),
        (
            ["source=NEMO", "output=hf", "dtype=int4"],
            "dtype: expected one of 'bfloat16', 'float16', 'float32', or null",
        ),
        (["source=OTHER", "output=hf"], "is Llama (normalization: rmsnorm), got normalization: "),
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
    (directory / "checksums.json").unlink()  # for whoever changes a file
    config = directory / "model_config.yaml"
    config.write_text(config.read_text().replace("rmsnorm", "layernorm1p"))
