"""Prompts to answers with transformers: the words of `generate`, at any interruption the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_llama
from generation import (
    RECORDS,
    arguments,
    capture,
    files_of,
    generate,
    lines,
    write_prompts,
)
from hydra import compose, initialize_config_dir
from runs import EXAMPLES, run_example, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.generate.run import generate_answers

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


def test_the_models_own_defaults_change_no_answer(
    written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(wide_llamas["tied"], tmp_path / "hf"))
    defaults = {"repetition_penalty": 9.0, "min_new_tokens": 12}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    generate(*arguments(model, write_prompts(tmp_path), tmp_path / "answers.jsonl"))
    texts = ([each["output"] for each in lines(d / "answers.jsonl")] for d in (tmp_path, written))
    assert next(texts) == next(texts)


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
        "nemo_kd.parts:Parts.write#2",  # one block is there
        "nemo_kd.cache.writer:ShardWriter.add",
        "nemo_kd.parts:Parts.finish",  # only done.json is missing
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
    """Other neighbours, other padding, and the rows of the cache to the rounding of float16."""
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    generate(*run, *capture(tmp_path / "cache"), "batch_size=3")
    assert lines(tmp_path / "answers.jsonl") == lines(written / "answers.jsonl")
    caches = (TopKCache.open(path / "cache") for path in (tmp_path, written))
    for own, other in zip(*caches, strict=True):
        assert own.tokens.tolist() == other.tokens.tolist()
        assert abs(own.topk_log_probs - other.topk_log_probs).max() < 1e-2


def test_a_stop_ends_an_answer(
    written: Path, wide_llamas: dict[str, Path], hf_tokenizer: Any, tmp_path: Path
) -> None:
    """The text ends before it, the tokens with it; other answers are as without it."""
    before = lines(written / "answers.jsonl")
    stop = next(
        found[0] for line in before if (found := re.search("(?<=.)[a-z]{2}", line["output"]))
    )
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    generate(*run, *capture(tmp_path / "cache"), f"sampling.stop=[{stop}]")
    after = {place_of(line): line for line in lines(tmp_path / "answers.jsonl")}
    cached = {place_of(after[each]): i for i, each in enumerate(after)}
    num_stopped = 0
    for line in before:
        text = line["output"].split(stop)[0]
        if not text.strip():
            assert place_of(line) not in after
            continue
        stopped = after[place_of(line)]
        assert stopped["output"] == text
        if text == line["output"]:
            assert stopped == line
            continue
        num_stopped += 1
        assert stopped["generation"]["finish_reason"] == "stop"
        sample = TopKCache.open(tmp_path / "cache")[cached[place_of(line)]]
        *rest, last = sample.tokens[sample.context_length :].tolist()
        assert stop in hf_tokenizer.decode([*rest, last])
        assert stop not in hf_tokenizer.decode(rest)
    assert num_stopped


def place_of(line: dict[str, Any]) -> tuple[int, int]:
    return line["generation"]["prompt"], line["generation"]["answer"]


def test_a_prompt_without_room_is_a_failure(wide_llamas: dict[str, Path], tmp_path: Path) -> None:
    records = [{"input": "entropy"}, {"input": "token " * 200}, {"input": "label"}]
    data = write_jsonl(tmp_path / "prompts.jsonl", records)
    run = arguments(wide_llamas["tied"], data, tmp_path / "answers.jsonl", "sampling.n=1")
    output = generate(*run)
    assert "2 answers" in output
    assert (
        "1 failures, which are not in the data:\n  prompt 1, answer 0: the prompt leaves" in output
    )
    assert [line["input"] for line in lines(tmp_path / "answers.jsonl")] == ["entropy", "label"]
    write_jsonl(data, records[1:2])
    run[run.index(f"output={tmp_path / 'answers.jsonl'}")] = f"output={tmp_path / 'none.jsonl'}"
    with pytest.raises(ValueError, match="expected room for the shortest prompt"):
        call(run)


def call(run: list[str]) -> None:
    """What the example calls, in this process."""
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        config = compose("generate_answers", run)
    generate_answers(config)


CHANGED = {
    "temperature": (["sampling.temperature=0.5"], "sampling.temperature was 1.0 and is 0.5"),
    "batch": (["batch_size=5"], "batch_size was 4 and is 5"),
    "template": (["data.prompt_template='{input}: {output}'"], "data.prompt_template was 'Q: "),
    "rows": (["capture.k=9"], "capture.k was 8 and is 9"),
    "model": (["model.dtype=bfloat16"], "model was '"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_run_with_other_settings_does_not_go_on(
    case: str, written: Path, wide_llamas: dict[str, Path]
) -> None:
    change, error = CHANGED[case]
    run = arguments(wide_llamas["tied"], written / "prompts.jsonl", written / "answers.jsonl")
    before = files_of(written)
    with pytest.raises(ValueError, match=re.escape(error)) as refused:
        call([*run, *capture(written / "cache"), *change])
    assert "was begun with other settings" in str(refused.value)
    assert files_of(written) == before


def test_a_run_with_other_prompts_does_not_go_on(
    written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path / "copy")
    data = write_jsonl(tmp_path / "copy" / "prompts.jsonl", RECORDS[:-1])
    run = arguments(wide_llamas["tied"], data, tmp_path / "copy" / "answers.jsonl")
    with pytest.raises(ValueError, match=r"was begun with other settings: data\.files was"):
        call([*run, *capture(written / "cache")])


REFUSED = {
    "no model": (["model.hf_path=/nowhere"], "model.hf_path: expected a Hugging Face directory"),
    "no GPU": (["device=gpu"], "device: expected a GPU, found none"),
    "no answers": (["sampling.n=0"], "expected n >= 1, got 0"),
    "top_p": (["sampling.top_p=0"], "expected top_p above 0, at most 1, got 0"),
    "stop": (["sampling.stop=[7]"], "stop"),
    "too many entries": (["capture.path=x", "capture.k=402"], "capture.k: expected at most 401"),
    "no server": (["engine=server"], "server.base_url: expected a text with engine=server"),
    "no URL": (
        ["engine=server", "server.model=x", "server.base_url=localhost:8000"],
        "server.base_url: localhost:8000: expected a server, got none",
    ),
    "an engine": (["engine=vllm"], "engine"),
    "too long": (["data.max_seq_length=256"], "expected at most 128, the model's max_position"),
    "no prompts": (["data.file_names=[/nowhere.jsonl]"], "found no /nowhere.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    case: str, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    change, error = REFUSED[case]
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match=re.escape(error)):
        call([*run, *change])
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_model_of_fewer_tokens_than_its_tokenizer_is_refused(
    hf_tokenizer: Any, tmp_path: Path
) -> None:
    save_llama(tmp_path / "small", hf_tokenizer, True, 1, len(hf_tokenizer) - 1)
    run = arguments(tmp_path / "small", write_prompts(tmp_path), tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="expected its tokenizer's 401 tokens, got 400"):
        call(run)


def test_what_another_run_wrote_is_not_overwritten(
    written: Path, wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    """An output, or a cache, that this run did not begin."""
    run = arguments(wide_llamas["tied"], write_prompts(tmp_path), tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match=r"capture\.path: expected a new directory"):
        call([*run, *capture(written / "cache")])
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="output: expected a new file"):
        call(run)
