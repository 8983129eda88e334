"""Prompts to answers with transformers: the words of `generate`, at any interruption the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from generation import (
    RECORDS,
    arguments,
    capture,
    files_of,
    generate,
    lines,
    write_prompts,
)
from runs import run_example

STOPPED_RUN = Path(__file__).parent / "stopped_run.py"


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
    """Stopped before its second block is published, in its cache, and before it is done."""
    data = write_prompts(tmp_path)
    run = arguments(wide_llamas["tied"], data, tmp_path / "answers.jsonl")
    run += capture(tmp_path / "cache")
    status = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 143}[name]
    moments = (
        "nemo_kd.generate.parts:Parts.write#2",  # one block is there
        "nemo_kd.cache.writer:ShardWriter.add",
        "nemo_kd.generate.parts:Parts.finish",  # only done.json is missing
    )
    for moment in moments:
        script = (STOPPED_RUN, name, moment, 0, "generate_answers.py")
        run_example(*script, *run, status=status)
    assert not (tmp_path / "answers.jsonl.parts" / "done.json").exists()
    generate(*run)
    assert (tmp_path / "answers.jsonl").read_bytes() == (written / "answers.jsonl").read_bytes()
    assert files_of(tmp_path / "cache") == files_of(written / "cache")
    before = files_of(tmp_path)
    assert "whole already; 10 answers" in generate(*run)
    assert files_of(tmp_path) == before
