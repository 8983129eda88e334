"""Samples of source files, without a model: for `nemo-kd verify --against` and `nemo-kd show`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import yaml
from omegaconf import OmegaConf
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from nemo_kd.cache import SourceFile, TopKCache
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.chat import as_jsonl
from nemo_kd.chat.lines import check_lines
from nemo_kd.chat.samples import (
    cut_sample,
    fingerprint_source,
    renderer_of,
    with_found_format,
)
from nemo_kd.config import DataConfig, read_settings


class SampleHost(Protocol):
    """What a host gives: nemo_kd.nemo.samples and nemo_kd.bridge.dataset are such modules."""

    def read_tokenizer(self, path: Path, key: str) -> Any:
        """The host's tokenizer; `key` is the option that named the path, for errors."""

    def file_datasets(
        self, data: DataConfig, tokenizer: Any, sources: Sequence[SourceFile]
    ) -> list[Any]:
        """Each file of `data`, whose fingerprints are `sources`, as a dataset."""


def differences(
    host: SampleHost,
    cache: TopKCache,
    files: list[str],
    tokenizer_path: Path,
    chat_template: str | None = None,
) -> Iterator[str]:
    """Yield a line for each difference between the cache and what is made of the files now.

    Args:
        host: what makes the samples.
        files: the files, in the order that the dump read them.
        tokenizer_path: the teacher's or the student's .nemo, or a Hugging Face directory.
        chat_template: the file that the dump had as data.chat_template, if it had one.

    Raises:
        ValueError: there is no such tokenizer, or no chat template; or the cache is a captured one.
    """
    manifest = cache.manifest
    if "captured" in manifest.dataset:
        raise ValueError(
            f"{cache.path}: expected a cache that the dump made of files, but its rows were "
            "captured while the answers were written, and no file gives its tokens; verify it "
            "without --against"
        )
    tokenizer = host.read_tokenizer(tokenizer_path, "--tokenizer")
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        yield f"{tokenizer_path}: another tokenizer than the one that the cache was made with"
        return
    sources = [fingerprint_source(file) for file in files]
    for number, file in enumerate(files):
        if sources[number] not in manifest.sources[number : number + 1]:
            yield f"{file}: not the file that was number {number} of the dump's sources"
    settings = {key: value for key, value in manifest.dataset.items() if key != "filtered"}
    template_fingerprint = settings.pop("chat_template_xxh3", None)
    if template_fingerprint is not None:
        settings |= {"chat": False, "chat_template": chat_template}
    data = read_settings(DataConfig, settings | {"file_names": files}, "manifest.dataset")
    renderer = renderer_of(data, tokenizer)
    if renderer is not None and renderer.fingerprint != template_fingerprint:
        path = chat_template or tokenizer_path
        yield f"{cache.path}: made with another chat template than that of {path}"
        return
    # A host trusts an index that it finds. In a directory of its own it finds none.
    with TemporaryDirectory() as index_dir:
        samples = _samples(host, data, tokenizer, sources, index_dir)
        if len(samples) != len(cache):
            yield f"{cache.path}: {len(cache)} samples, in the source files {len(samples)}"
        for number in tqdm(range(min(len(samples), len(cache))), unit=" samples", disable=None):
            expected = cut_sample(samples[number], samples.datasets[0])
            try:
                stored = cache[number]
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            for name, value in zip(
                ("tokens", "loss_mask", "context_length"), expected, strict=True
            ):
                if not np.array_equal(getattr(stored, name), value):
                    yield f"{cache.path}: sample {number}: {name} is not what the source gives"


def samples_of(
    host: SampleHost, path: str, overrides: list[str], tokenizer: Any
) -> Iterator[tuple[Any, Any, int]]:
    """Yield tokens, loss mask and context length of each sample of a file, as the dump makes them.

    Args:
        host: what makes the samples.
        path: the file.
        overrides: as on the dump's command line, `data.KEY=VALUE`.
        tokenizer: the host's.

    Raises:
        ValueError: a setting, or the file, does not fit.
    """
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except yaml.YAMLError as error:
        raise ValueError(f"expected data.KEY=VALUE, got {overrides}: {error}") from error
    if unknown := [key for key in given if key != "data"]:
        raise ValueError(f"expected keys of data, as in data.train_on=..., got {unknown[0]}")
    settings = given.get("data", {}) | {"file_names": [path]}
    data = with_found_format(read_settings(DataConfig, settings, "data"))
    renderer = renderer_of(data, tokenizer)
    with TemporaryDirectory() as index_dir:
        check_lines(as_jsonl(path, index_dir), data, renderer)
        samples = _samples(host, data, tokenizer, [fingerprint_source(path)], index_dir)
        for number in range(len(samples)):
            yield cut_sample(samples[number], samples.datasets[0])


def token_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids -> text, special tokens included where the tokenizer can show them."""
    own = getattr(tokenizer, "tokenizer", None)
    decode: Callable[[list[int]], str] = tokenizer.ids_to_text if own is None else own.decode
    return decode


def _samples(
    host: SampleHost,
    data: DataConfig,
    tokenizer: Any,
    sources: Sequence[SourceFile],
    index_dir: str,
) -> ConcatDataset[Any]:
    """The samples of all files, as the dump builds them."""
    own = replace(data, index_mapping_dir=index_dir)
    return ConcatDataset(host.file_datasets(own, tokenizer, sources))
