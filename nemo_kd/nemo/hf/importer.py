"""A Hugging Face checkpoint becomes a .nemo.

The .nemo is written at tensor and pipeline parallel size 1; NeMo restores it at any other.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.chat.samples import begin_token
from nemo_kd.config import refuse_unknown_keys
from nemo_kd.gguf import from_gguf
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import quiet_host
from nemo_kd.nemo.hf.configs import nemo_config
from nemo_kd.nemo.hf.families import MODEL_TYPES
from nemo_kd.nemo.hf.fields import check_fields, check_gguf, read_rope
from nemo_kd.nemo.hf.weights import to_megatron
from nemo_kd.nemo.nemo_file import save_nemo
from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel
from nemo_kd.nemo.values import check_yaml_values


def load_source(source: Path) -> tuple[Any, Any]:
    """Return the Hugging Face model (on the CPU, in its own dtype) and its tokenizer.

    Raises:
        ValueError: No such path, or not a model of a family that the import knows.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if source.is_dir() and (source / "config.json").exists():
        directory, file = source, {}
        raw = read_json(source / "config.json")
        check_fields(raw)
    elif source.is_file() and source.suffix == ".gguf":
        from gguf import GGUFReader

        directory, file, raw = source.parent, {"gguf_file": source.name}, {}
        check_gguf(GGUFReader(source))
    else:
        raise ValueError(
            f"source: expected a Hugging Face directory with config.json or a .gguf file, "
            f"found {source if source.exists() else f'no {source}'}"
        )
    config = AutoConfig.from_pretrained(directory, **file)
    if raw:
        config.update(read_rope(raw))
    tokenizer = AutoTokenizer.from_pretrained(directory, **file)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"source: expected a tokenizer of at most the embedding's {config.vocab_size} rows, "
            f"got {len(tokenizer)} tokens; take the tokenizer that the model was trained with"
        )
    # Given the config, transformers does not read a GGUF file's metadata again: it takes seconds.
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            torch_dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **file,
        )
    except SafetensorError as error:
        raise ValueError(f"source: a weight file in {source} is damaged: {error}") from error
    # transformers fills what is missing with random numbers, and leaves the rest out.
    for problem, names in report.items():
        if names:
            raise ValueError(
                f"source: expected the weights of a {config.model_type}, got {problem} "
                f"{sorted(map(str, names))[:3]} ({len(names)} in all)"
            )
    if not file and config.tie_word_embeddings:
        check_tied(directory, model.get_input_embeddings().weight)
    return model, from_gguf(tokenizer, source) if file else tokenizer


def check_tied(directory: Path, embedding: torch.Tensor) -> None:
    """Refuse an output layer of its own in a model whose config ties it to the embedding.

    transformers 4 leaves it out, and transformers 5 computes with it.
    """
    from safetensors import safe_open

    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if "lm_head.weight" in weights.keys():  # noqa: SIM118
                own = weights.get_tensor("lm_head.weight").to(embedding.dtype)
                if not torch.equal(own, embedding):
                    raise ValueError(
                        "source: config.json has tie_word_embeddings: true, but lm_head.weight "
                        "differs from the embedding; set it to false, or remove the weight"
                    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: It holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"source: {path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"source: {path}: expected a JSON object, got {content!r:.60}")
    return content


def for_spec(name: str, names: set[str]) -> str:
    """Return `name` as the built model has it; only Transformer Engine's layers fuse the norms."""
    if name in names:
        return name
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def import_hf_llama(config: DictConfig) -> None:
    """Write `config.output` from `config.source`: see conf/import_hf_llama.yaml.

    Raises:
        ValueError: A key or a path does not fit, or the source is not a model of a known family.
    """
    check_yaml_values(config, "import_hf_llama")
    refuse_unknown_keys(config, ("source", "output", "keep_layers"))
    output = Path(config.output).absolute()
    if output.suffix != ".nemo":
        raise ValueError(f"output: expected a path that ends in .nemo, got {config.output}")
    hf_model, tokenizer = load_source(Path(config.source))
    num_layers = hf_model.config.num_hidden_layers
    layers = list(range(num_layers) if config.keep_layers is None else config.keep_layers)
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"keep_layers: expected layers from 0 to {num_layers - 1}, got {layers}")
    tokenizer_directory = output.with_suffix(".tokenizer")
    model_config = OmegaConf.create(
        nemo_config(hf_model.config, str(tokenizer_directory), len(layers), len(tokenizer))
    )
    model_config.hugging_face.tokenizer_eos = tokenizer.eos_token_id
    generation = Path(config.source, "generation_config.json")
    if generation.exists():
        model_config.hugging_face.generation_config = read_json(generation)
    for name in hf_model.state_dict():
        if re.search(r"(o|gate|up|down)_proj.bias", name):
            raise ValueError(f"source: expected biases on q, k and v alone, got {name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tokenizer_directory, ignore_errors=True)  # no file of another tokenizer may stay
    tokenizer.save_pretrained(tokenizer_directory)
    model = build_model(model_config)
    (module,) = model.get_model_module_list()
    fill_model(module, hf_model, layers)
    cpu_backend.drop_overrides(model.cfg)
    save_nemo(model, str(output))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{output}: {len(layers)} of {num_layers} layers, {num_parameters / 1e6:.1f}M parameters, "
        f"{hf_model.dtype}; tokenizer in {tokenizer_directory}"
    )
    if begin := begin_token(tokenizer):
        print(f"the model expects {begin} before each text: use data.add_bos=true")


def build_model(model_config: DictConfig) -> Any:
    """Return an untrained MegatronGPTSFTModel of this config, on the CPU of any machine."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        cpu_backend.enable()
    cpu_backend.prepare_model_config(model_config)
    # With a GPU the model is built on the CPU too, but of Transformer Engine's layers.
    model_config.transformer_engine = has_gpu
    run = OmegaConf.create(
        {
            "trainer": {"accelerator": "cpu", "devices": 1, "precision": 32, "logger": False},
            "model": model_config,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )

    # After cpu_backend.enable, which NeMo's modules need on a machine without a GPU.
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    trainer = build_trainer(run)
    quiet_host()
    initialize_model_parallel(trainer, model_config)
    return MegatronGPTSFTModel(model_config, trainer)


def fill_model(module: Any, hf_model: Any, layers: list[int]) -> None:
    """Load the Hugging Face model's weights, of these layers, into Megatron's module in place.

    Raises:
        ValueError: The two models do not have the same weights.
    """
    names = {name for name, _ in module.named_parameters()}
    source = hf_model.state_dict()
    if hf_model.config.tie_word_embeddings:
        del source["lm_head.weight"]
    num_rows = len(module.embedding.word_embeddings.weight)
    config = hf_model.config
    family = MODEL_TYPES[config.model_type]
    num_groups = config.num_key_value_heads or config.num_attention_heads
    pairs = to_megatron(source, family, num_groups, layers, num_rows)
    weights = {for_spec(name, names): tensor for name, tensor in pairs}
    if set(weights) != names:
        raise ValueError(
            f"source: its weights differ from NeMo's model in {sorted(set(weights) ^ names)}"
        )
    module.to(hf_model.dtype).load_state_dict(weights, strict=False)
