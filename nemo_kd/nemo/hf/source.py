"""What the import reads: a Hugging Face directory, whose weights stay on the disk, or a GGUF."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_kd.gguf import from_gguf
from nemo_kd.nemo.hf.fields import check_fields, check_gguf, read_rope

_INDEX = "model.safetensors.index.json"


class Source(NamedTuple):
    """A Hugging Face model that nothing computes with."""

    config: Any
    weights: Mapping[str, Tensor]  # by Hugging Face's names, without those that are tied to others
    dtype: torch.dtype
    tokenizer: Any


class MappedWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files. Each is read when it is asked for.

    Raises:
        ValueError: A file is missing or damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._file_of: dict[str, Any] = {}
        for path in files:
            try:
                file: Any = safe_open(path, "pt")
            except FileNotFoundError as error:
                raise ValueError(
                    f"source: expected {path.name}, which {_INDEX} names, found no {path}"
                ) from error
            except SafetensorError as error:
                raise ValueError(
                    f"source: a weight file in {path.parent} is damaged: {path.name}: {error}"
                ) from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read off the file's header."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def drop(self, name: str) -> None:
        del self._file_of[name]


def open_source(source: Path) -> Source:
    """Return what the import needs of a model. Of safetensors only the headers are read.

    Raises:
        ValueError: No such path, not a model of a family that the import knows, or weights that are
            missing, left over, damaged or of another shape.
    """
    directory, file, config, tokenizer = _describe(source)
    index = directory / _INDEX
    if file or not (index.exists() or (directory / "model.safetensors").exists()):
        model = _load(directory, config, file)
        weights = model.state_dict()
        if config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return Source(config, weights, model.dtype, tokenizer)
    names = {"model.safetensors"}  # as in transformers, whatever an index beside it says
    if not (directory / "model.safetensors").exists():
        names = set(read_json(index).get("weight_map", {}).values())
    mapped = MappedWeights([directory / name for name in sorted(names)])
    _check_weights(config, mapped)
    dtype = config.torch_dtype or next(iter(mapped.values())).dtype
    return Source(config, mapped, dtype, tokenizer)


def load_source(source: Path) -> tuple[Any, Any]:
    """Return the Hugging Face model (on the CPU, in its own dtype) and its tokenizer.

    Raises:
        ValueError: As open_source.
    """
    directory, file, config, tokenizer = _describe(source)
    return _load(directory, config, file), tokenizer


def _describe(source: Path) -> tuple[Path, dict[str, str], Any, Any]:
    """The directory, the arguments for transformers of a GGUF file, config and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

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
    return directory, file, config, from_gguf(tokenizer, source) if file else tokenizer


def _load(directory: Path, config: Any, file: dict[str, str]) -> Any:
    """The model, by transformers. Given the config, it does not read a GGUF's metadata again."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        torch_dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report
        **file,
    )
    # transformers fills what is missing with random numbers, and leaves the rest out.
    _refuse_problems(config, report)
    return model


def _check_weights(config: Any, weights: MappedWeights) -> None:
    """Compare names and shapes with those of the model; drop what is tied or only a buffer."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # names and shapes, without memory
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:
        weights.drop(name)  # of older releases of transformers
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
        _check_tied(weights)
    both = shapes.keys() & weights.keys()
    _refuse_problems(
        config,
        {
            "missing_keys": shapes.keys() - weights.keys(),
            "unexpected_keys": weights.keys() - shapes.keys(),
            "mismatched_keys": {name for name in both if weights.shape(name) != shapes[name]},
        },
    )


def _check_tied(weights: MappedWeights) -> None:
    """Refuse an output layer of its own in a model whose config ties it to the embedding.

    transformers 4 leaves it out, and transformers 5 computes with it.
    """
    if not {"lm_head.weight", "model.embed_tokens.weight"} <= weights.keys():
        return
    if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        raise ValueError(
            "source: config.json has tie_word_embeddings: true, but lm_head.weight differs from "
            "the embedding; set it to false, or remove the weight"
        )
    weights.drop("lm_head.weight")


def _refuse_problems(config: Any, report: Mapping[str, Any]) -> None:
    for problem, names in report.items():
        if names:
            raise ValueError(
                f"source: expected the weights of a {config.model_type}, got {problem} "
                f"{sorted(map(str, names))[:3]} ({len(names)} in all)"
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
