"""Prompts to answers with transformers: the words of `generate`, at any interruption the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation import (
    RECORDS,
    TEMPLATE,
    arguments,
    capture,
    files_of,
    generate,
    lines,
    write_prompts,
)
from runs import dump_arguments, run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.chat.lines import check_lines
from nemo_kd.config import DataConfig
from nemo_kd.generate.embedded import draw
from nemo_kd.generate.prompts import answered

STOPPED_RUN = Path(__file__).parent / "stopped_run.py"
QUESTION = {"role": "user", "content": "river one?"}
# One line of each format, with its answer and without.
LINES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [QUESTION]},
    "sharegpt": {"conversations": [{"from": "human", "value": "river one?"}]},
    "alpaca": {"instruction": "river one?", "input": ""},
    "prompt_completion": {"prompt": "river one?"},
    "prompt": {"input": "river one?"},
    "nemo_chat": {
        "system": "",
        "mask": "User",
        "conversations": [{"from": "User", "value": "river one?"}],
    },
}


@pytest.fixture(scope="module")
def written(wide_llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts, answers and a cache."""
    path = tmp_path_factory.mktemp("generated")
    run = arguments(wide_llamas["tied"], write_prompts(path), path / "answers.jsonl")
    generate(*run, *capture(path / "cache"))
    return path


def test_greedy_answers_are_those_of_generate(
    wide_llamas: dict[str, Path], hf_tokenizer: Any, tmp_path: Path
) -> None:
    """Each prompt alone and without padding, and the entries beyond the tokenizer left out."""
    from transformers import LlamaForCausalLM, SuppressTokensLogitsProcessor

    path = wide_llamas["tied"]
    run = arguments(path, write_prompts(tmp_path), tmp_path / "answers.jsonl")
    generate(*run, "sampling.temperature=0", "sampling.n=1")
    model = LlamaForCausalLM.from_pretrained(path)
    padding = SuppressTokensLogitsProcessor(list(range(len(hf_tokenizer), 512)))
    for line, record in zip(lines(tmp_path / "answers.jsonl"), RECORDS, strict=True):
        pieces = ("Q:", f" {record['input']}", " A:")
        ids = [i for piece in pieces for i in hf_tokenizer(piece).input_ids]
        whole = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=12, logits_processor=[padding]
        )
        text = hf_tokenizer.decode(whole[0, len(ids) :], clean_up_tokenization_spaces=False)
        assert line["output"] == text.removesuffix("</s>").removeprefix(" ")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    name: str, written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    """Stopped before its second block is published, and once more before the cache is written."""
    data = write_prompts(tmp_path)
    run = arguments(wide_llamas["tied"], data, tmp_path / "answers.jsonl")
    run += capture(tmp_path / "cache")
    status = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 143}[name]
    for moment in ("nemo_kd.cache.writer:ShardWriter.add", "nemo_kd.generate.parts:sync"):
        script = (STOPPED_RUN, name, moment, 0, "generate_answers.py")
        run_example(*script, *run, status=status)
    assert not (tmp_path / "answers.jsonl.parts" / "done.json").exists()
    generate(*run)
    assert (tmp_path / "answers.jsonl").read_bytes() == (written / "answers.jsonl").read_bytes()
    assert files_of(tmp_path / "cache") == files_of(written / "cache")
    before = files_of(tmp_path)
    assert "whole already; 10 answers" in generate(*run)
    assert files_of(tmp_path) == before


def test_the_cache_holds_what_a_dump_of_the_same_tokens_holds(
    written: Path, nemos: dict[str, Path], hf_tokenizer: Any, tmp_path: Path
) -> None:
    """The dump reads the samples of the cache, of which one token id is one text."""
    mine = TopKCache.open(written / "cache")
    texts = [chr(0x4E00 + i) for i in range(mine.manifest.vocab_size)]
    assert len(mine) == len(lines(written / "answers.jsonl"))
    del nemos, hf_tokenizer, tmp_path, texts, dump_arguments, np
