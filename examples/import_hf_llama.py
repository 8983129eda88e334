"""Turn a Hugging Face checkpoint of the Llama family into a .nemo.

    python examples/import_hf_llama.py source=SmolLM2-135M-Instruct.gguf output=teacher.nemo
    python examples/import_hf_llama.py source=llama-3-8b output=student.nemo keep_layers=[0,15,31]

Layouts (h hidden size, d head size, g key/value groups, q query heads a group):
  linear_qkv [g * (q + 2) * d, h]: group by group, its q query heads, its key head, its value head
  linear_fc1 [2 * ffn, h]: gate rows, then up rows
The .nemo is written at tensor and pipeline parallel size 1; NeMo restores it at any other.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd import cpu_backend
from nemo_kd.config import refuse_unknown_keys
from nemo_kd.launch import (
    build_trainer,
    drop_noise,
    initialize_model_parallel,
    save_nemo,
    user_errors,
)

MODEL_TYPES = ("llama", "mistral", "qwen2")  # one architecture; qwen2 has a bias in q, k and v


def load_source(source: Path) -> tuple[Any, Any]:
    """Return the Hugging Face model (on the CPU, in its own dtype) and its tokenizer.

    Raises:
        ValueError: No such path, or not a model of the Llama family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if source.is_dir() and (source / "config.json").exists():
        directory, file = source, {}
    elif source.is_file() and source.suffix == ".gguf":
        directory, file = source.parent, {"gguf_file": source.name}
    else:
        raise ValueError(
            f"source: expected a Hugging Face directory with config.json or a .gguf file, "
            f"found {source if source.exists() else f'no {source}'}"
        )
    config = AutoConfig.from_pretrained(directory, **file)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"source: expected model_type {' or '.join(MODEL_TYPES)}, got {config.model_type}"
        )
    # The config in hand spares another reading of a GGUF file's metadata, which takes seconds.
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, torch_dtype="auto", **file
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, **file)
    return model, from_gguf(tokenizer, source) if file else tokenizer


def from_gguf(tokenizer: Any, source: Path) -> Any:
    """Return the tokenizer with the special tokens that the GGUF file itself names.

    transformers 4.51 takes the end token from the field of the begin token, always prepends the
    begin token, and would save the whole model file as tokenizer.model.
    """
    from gguf import GGUFReader
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields

    def token(kind: str) -> str | None:
        field = fields.get(f"tokenizer.ggml.{kind}_token_id")
        return None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))

    backend = tokenizer.backend_tokenizer
    add_bos = fields.get("tokenizer.ggml.add_bos_token")
    if add_bos is not None and not add_bos.contents():
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=tokenizer.chat_template,
    )


def nemo_config(hf: Any, tokenizer_directory: Path, num_layers: int) -> DictConfig:
    """Return NeMo's model config for a Hugging Face config of the Llama family.

    Raises:
        ValueError: The model uses what NeMo's model has no key for.
    """
    if getattr(hf, "use_sliding_window", False) or (
        hf.model_type == "mistral" and getattr(hf, "sliding_window", None)
    ):
        raise ValueError("source: sliding-window attention is not supported")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return OmegaConf.create(
        {
            "mcore_gpt": True,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "encoder_seq_length": hf.max_position_embeddings,
            "max_position_embeddings": hf.max_position_embeddings,
            "num_layers": num_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": hf.intermediate_size,
            "num_attention_heads": hf.num_attention_heads,
            "num_query_groups": hf.num_key_value_heads,
            "kv_channels": head_dim,
            "init_method_std": hf.initializer_range,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "ffn_dropout": 0.0,
            "normalization": "rmsnorm",
            "layernorm_epsilon": hf.rms_norm_eps,
            "activation": "fast-swiglu",
            "bias": False,
            "qkv_bias": hf.model_type == "qwen2" or getattr(hf, "attention_bias", False),
            "position_embedding_type": "rope",
            "rotary_percentage": 1.0,
            "rotary_base": hf.rope_theta,
            "share_embeddings_and_output_weights": hf.tie_word_embeddings,
            "make_vocab_size_divisible_by": 128,
            "apply_query_key_layer_scaling": False,
            "precision": 32,
            "tokenizer": {
                "library": "huggingface",
                "type": str(tokenizer_directory),
                "use_fast": True,
            },
            "optim": {"name": "adamw", "lr": 1e-5},
            "data": {},
            **rope_scaling_config(hf),
        }
    )


def rope_scaling_config(hf: Any) -> dict[str, Any]:
    """Return NeMo's keys for Hugging Face's `rope_scaling` (none, linear, llama3)."""
    scaling = getattr(hf, "rope_scaling", None)
    if not scaling:
        return {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return {"seq_len_interpolation_factor": scaling["factor"]}
    if kind == "llama3":
        return {
            "scale_positional_embedding": True,
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    raise ValueError(f"source: expected rope_scaling linear or llama3, got {kind}")


def megatron_weights(
    hf_model: Any, layers: list[int], padded_vocab_size: int
) -> dict[str, torch.Tensor]:
    """Return the weights under Megatron Core's names (of its local layer spec).

    Rows of the embedding past the source's own are zero, and so are their logits.
    """
    hf, source = hf_model.config, hf_model.state_dict()
    groups = hf.num_key_value_heads

    def by_group(kind: str, layer: int, parameter: str) -> torch.Tensor:
        tensor = source[f"model.layers.{layer}.self_attn.{kind}_proj.{parameter}"]
        return tensor.reshape(groups, -1, *tensor.shape[1:])

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        rows = min(padded_vocab_size, len(tensor))
        out = tensor.new_zeros(padded_vocab_size, tensor.shape[1])
        out[:rows] = tensor[:rows]
        return out

    weights = {
        "embedding.word_embeddings.weight": padded(source["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    if not hf.tie_word_embeddings:
        weights["output_layer.weight"] = padded(source["lm_head.weight"])
    for new, old in enumerate(layers):
        to, hf_layer = f"decoder.layers.{new}.", f"model.layers.{old}."
        for parameter in ("weight", "bias"):
            if f"{hf_layer}self_attn.q_proj.{parameter}" in source:
                qkv = torch.cat([by_group(kind, old, parameter) for kind in "qkv"], dim=1)
                weights[f"{to}self_attention.linear_qkv.{parameter}"] = qkv.flatten(0, 1)
        weights |= {
            f"{to}input_layernorm.weight": source[f"{hf_layer}input_layernorm.weight"],
            f"{to}self_attention.linear_proj.weight": source[f"{hf_layer}self_attn.o_proj.weight"],
            f"{to}pre_mlp_layernorm.weight": source[f"{hf_layer}post_attention_layernorm.weight"],
            f"{to}mlp.linear_fc1.weight": torch.cat(
                [source[f"{hf_layer}mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
            ),
            f"{to}mlp.linear_fc2.weight": source[f"{hf_layer}mlp.down_proj.weight"],
        }
    return weights


def for_spec(name: str, names: set[str]) -> str:
    """Return `name` as the built model has it: Transformer Engine fuses a norm into its linear."""
    if name in names:
        return name
    return name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
        "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    )


def import_hf_llama(config: DictConfig) -> None:
    """Write `config.output` from `config.source`: see conf/import_hf_llama.yaml."""
    refuse_unknown_keys(config, dict.fromkeys(("source", "output", "keep_layers")))
    output = Path(config.output).absolute()
    if output.suffix != ".nemo":
        raise ValueError(f"output: expected a path that ends in .nemo, got {config.output}")
    hf_model, tokenizer = load_source(Path(config.source))
    num_layers = hf_model.config.num_hidden_layers
    layers = list(range(num_layers)) if config.keep_layers is None else list(config.keep_layers)
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"keep_layers: expected layers from 0 to {num_layers - 1}, got {list(layers)}"
        )

    tokenizer_directory = output.with_suffix(".tokenizer")
    model_config = nemo_config(hf_model.config, tokenizer_directory, len(layers))
    biased = [
        name for name in hf_model.state_dict() if re.search(r"(o|gate|up|down)_proj.bias", name)
    ]
    if biased:
        raise ValueError(f"source: expected biases on q, k and v alone, got {biased[0]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tokenizer_directory, ignore_errors=True)
    tokenizer.save_pretrained(tokenizer_directory)

    on_gpu_machine = torch.cuda.is_available()
    if not on_gpu_machine:
        cpu_backend.enable()
    cpu_backend.prepare_model_config(model_config)
    # In the container the model is built on the CPU too, of Transformer Engine's layers.
    model_config.transformer_engine = on_gpu_machine
    run = OmegaConf.create(
        {
            "trainer": {"accelerator": "cpu", "devices": 1, "precision": 32, "logger": False},
            "model": model_config,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )

    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    trainer = build_trainer(run)
    drop_noise()
    initialize_model_parallel(trainer, model_config)
    model = MegatronGPTSFTModel(model_config, trainer)
    (module,) = model.get_model_module_list()
    names = {name for name, _ in module.named_parameters()}
    weights = {
        for_spec(name, names): tensor
        for name, tensor in megatron_weights(hf_model, layers, model.padded_vocab_size).items()
    }
    if set(weights) != names:
        raise ValueError(
            f"source: its weights differ from NeMo's model in {sorted(set(weights) ^ names)}"
        )
    module.to(hf_model.dtype).load_state_dict(weights, strict=False)
    cpu_backend.drop_overrides(model.cfg)
    save_nemo(model, str(output))
    print(
        f"{output}: {len(layers)} of {num_layers} layers, "
        f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M parameters, "
        f"{hf_model.dtype}; tokenizer in {tokenizer_directory}"
    )


@hydra.main(version_base=None, config_path="conf", config_name="import_hf_llama")
def main(config: DictConfig) -> None:
    with user_errors():
        import_hf_llama(config)


if __name__ == "__main__":
    main()
