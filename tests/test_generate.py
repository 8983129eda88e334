"""Prompts to answers with transformers: the words of `generate`, at any interruption the same."""

from pathlib import Path
from typing import Any

import numpy as np
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
from omegaconf import OmegaConf
from runs import run_example, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.generate.answers import Answer, Request, Wanted
from nemo_kd.generate.embedded import Transformers
from nemo_kd.generate.settings import SamplingConfig
from nemo_kd.hf_tokenizer import HfTokenizer

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


def test_the_batch_size_changes_no_answer(
    written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    generate(*run, "batch_size=3")
    assert (tmp_path / "answers.jsonl").read_bytes() == (written / "answers.jsonl").read_bytes()


def test_draws_follow_the_distribution(wide_llamas: dict[str, Path]) -> None:
    """The first token of 3,000 answers, against the row that was captured at it."""
    k, num_answers = 401, 3000
    tokenizer = HfTokenizer(str(wide_llamas["tied"]), "model.hf_path")
    sampling = SamplingConfig(max_tokens=1)
    model = OmegaConf.create({"hf_path": str(wide_llamas["tied"]), "dtype": "float32"})
    engine = Transformers(model, "cpu", Wanted(tokenizer, sampling, (), k))
    engine.open(128)
    ids = tokenizer.text_to_ids("entropy of")
    requests = [Request(0, i, ids, sampling.seed_of(0, i)) for i in range(num_answers)]
    answers: list[Answer] = []
    engine.fill([(0, requests)], lambda _, made: answers.extend(made))
    rows = answers[0].rows
    assert rows is not None
    expected = np.zeros(k)
    expected[rows.topk_ids[0]] = np.exp(rows.topk_log_probs[0].astype(np.float64)) * num_answers
    counts = np.bincount([answer.ids[0] for answer in answers], minlength=k)
    often = expected >= 5
    degrees = int(often.sum())  # the others are one class
    assert degrees > 10
    seen, wanted = (np.append(each[often], each[~often].sum()) for each in (counts, expected))
    square = ((seen - wanted) ** 2 / wanted).sum()
    assert square < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations
    assert len({answer.ids[0] for answer in answers}) > 10


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("sampling.temperature=0.5", "sampling.temperature was 1.0 and is 0.5"),
        ("capture.k=4", "capture.k was 8 and is 4"),
        ("prompts", "data.files was"),
    ],
)
def test_another_run_does_not_go_on_with_these_answers(
    change: str, error: str, written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    data, more = written / "prompts.jsonl", [change]
    if change == "prompts":
        data, more = write_jsonl(tmp_path / "prompts.jsonl", RECORDS[1:]), []
    run = arguments(wide_llamas["tied"], data, written / "answers.jsonl")
    before = files_of(written)
    output = generate(*run, *capture(written / "cache"), *more, succeeds=False)
    assert f"was begun with other settings: {error}" in output
    assert "Traceback" not in output
    assert files_of(written) == before


def test_a_prompt_without_room_is_a_failure_or_an_error(
    wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    output = generate(*run, "data.max_seq_length=8", succeeds=False)
    assert "data.max_seq_length: expected room for the shortest prompt" in output
    output = generate(*run, "data.max_seq_length=24")
    told = "the prompt leaves no room for sampling.max_tokens in data.max_seq_length"
    refused = [line for line in output.splitlines() if told in line]
    places = {line["generation"]["prompt"] for line in lines(tmp_path / "answers.jsonl")}
    assert 0 < len(places) < len(RECORDS)
    assert len(refused) == 2 * (len(RECORDS) - len(places))


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(
    written: Path, wide_llamas: dict[str, Path], hf_tokenizer: Any, tmp_path: Path
) -> None:
    """Up to the stop the answer is the one without it. The cache has the stop's last token."""
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    answers = lines(written / "answers.jsonl")
    before = {tuple(line["generation"].values())[:2]: line["output"] for line in answers}
    stop = max("abcdefghijklmnop", key=lambda c: sum(c in text for text in before.values()))
    generate(*run, *capture(tmp_path / "cache"), f"sampling.stop=[{stop}]")
    cache, num_stopped = TopKCache.open(tmp_path / "cache"), 0
    for number, line in enumerate(lines(tmp_path / "answers.jsonl")):
        whole = before[tuple(line["generation"].values())[:2]]
        assert line["output"] == whole.split(stop)[0]
        sample = cache[number]
        text = hf_tokenizer.decode(sample.tokens[sample.context_length :])
        if stop in whole:
            assert stop in text
            assert stop in hf_tokenizer.decode(sample.tokens[-1:])
            assert line["generation"]["finish_reason"] == "stop"
            num_stopped += 1
    assert num_stopped
