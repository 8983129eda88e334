"""What a teacher run is going to write: checked before the teacher is read."""

import re
from dataclasses import asdict
from typing import Any

from nemo_kd.cache import CacheWriter, Manifest
from nemo_kd.cache.manifest import tokenizer_fingerprint, vocabulary_of
from nemo_kd.chat.lines import check_files
from nemo_kd.chat.render import Renderer
from nemo_kd.config import CacheConfig, DataConfig
from nemo_kd.selection import SelectionConfig

# Settings of `data` that say where and how to read, and do not change the tokens. After an
# out-of-memory error a cache is resumed with a smaller micro batch: as with another TP or PP, its
# rows then agree to rounding.
_NOT_IN_MANIFEST = (
    "chat_template",
    "chat_template_kwargs",
    "file_names",
    "format",
    "hf_dataset",
    "index_mapping_dir",
    "max_unsupervised_share",
    "memmap_workers",
    "micro_batch_size",
    "num_workers",
    "train_on",
)
# Settings of `data` that shape the samples which this package renders.
_SHAPES_RENDERED = ("format", "train_on", "chat_template_kwargs", "max_seq_length", "add_eos")
# Settings of `selection` that shape the rows of each kind.
_SHAPES_ROWS = {"top_k": ("k",), "top_p": ("k", "p"), "sample": ("num_draws", "seed")}


def plan_cache(
    data: DataConfig,
    selection: SelectionConfig,
    cache: CacheConfig,
    tokenizer: Any,
    teacher_fingerprint: str,
) -> Manifest:
    """Check data, tokenizer and cache, and return what the cache will say of itself.

    Args:
        data: The settings, with the format of the files.
        selection: The settings of the rows.
        cache: The settings of the cache.
        tokenizer: The host's.
        teacher_fingerprint: Of what shapes the teacher's logits.

    Raises:
        ValueError: A line, a token, `selection.k`, `cache.shards` or what lies at `cache.path` does
            not fit.
    """
    num_samples, renderer, sources = check_files(data, tokenizer, "data")
    manifest = Manifest(
        selection=_shaping_selection(selection),
        dataset=_shaping_data(data, renderer),
        codec=cache.codec,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=vocabulary_of(tokenizer),
        teacher_fingerprint=teacher_fingerprint,
        sources=sources,
        num_samples=num_samples,
        samples_per_shard=cache.samples_per_shard,
    )
    parse_shards(cache.shards, manifest.num_shards)
    CacheWriter.check(cache.path, manifest)
    return manifest


def _shaping_selection(selection: SelectionConfig) -> dict[str, Any]:
    """The settings that shape the rows, as the manifest has them."""
    row_settings = ("kind", "temperature", *_SHAPES_ROWS[selection.kind])
    return {name: getattr(selection, name) for name in row_settings}


def _shaping_data(data: DataConfig, renderer: Renderer | None) -> dict[str, Any]:
    """The settings that shape the tokens, as the manifest has them."""
    if renderer is None:
        return {name: value for name, value in asdict(data).items() if name not in _NOT_IN_MANIFEST}
    return {
        **{name: getattr(data, name) for name in _SHAPES_RENDERED},
        "chat": True,  # as NeMo's chat samples, the answers of these keep their end token
        "chat_template_xxh3": renderer.fingerprint,
    }


def parse_shards(text: str | int | None, num_shards: int) -> list[int]:
    """The shards of "0-99", 7 or "0-3,8"; all of them for None.

    Raises:
        ValueError: another form, or a shard that the cache does not have.
    """
    if text is None:
        return list(range(num_shards))
    shards: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f'cache.shards: expected 0-99, 7 or "0-3,8", got {text!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_shards:
            raise ValueError(
                f"cache.shards: expected shards from 0 to {num_shards - 1}, got {part.strip()}"
            )
        shards += range(first, last + 1)
    return shards
