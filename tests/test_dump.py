"""The teacher run gives what Hugging Face computes, at any layout, and the same after a crash."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import EXAMPLES, MAX_SEQ_LENGTH, PROMPT, dump_arguments, run_example, write_jsonl

from nemo_kd.cache import TopKCache


def files_of(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


def test_rows_are_those_of_hugging_face(cache: Path, hf_llamas: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(hf_llamas["untied"])
    tokenizer = AutoTokenizer.from_pretrained(hf_llamas["untied"])
    opened = TopKCache.open(cache)
    assert len(opened) == 10
    longest = max(len(sample.tokens) for sample in opened)
    assert longest == MAX_SEQ_LENGTH, "a sample is truncated"
    for sample in opened:
        tokens = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            log_probs = hf(tokens[None]).logits[0].log_softmax(-1)
        positions = sample.loss_mask.nonzero()[0] - 1
        expected = log_probs[positions].topk(8)
        # float16 holds log-probs down to -16 to 0.008. Ids may swap where two are as close as that.
        np.testing.assert_allclose(sample.topk_log_probs, expected.values, atol=1e-2)
        own = log_probs[positions].gather(1, torch.from_numpy(sample.topk_ids).long())
        np.testing.assert_allclose(sample.topk_log_probs, own, atol=1e-2)
        assert (sample.topk_ids == expected.indices.numpy()).mean() > 0.99
        tail = (1 - expected.values.double().exp().sum(-1)).log()
        np.testing.assert_allclose(sample.tail_log_probs, tail, atol=1e-2)
        # Only the answer and its end token are supervised.
        answer = tokens[torch.from_numpy(sample.loss_mask).bool()]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens).startswith("Q: ")
        assert sample.loss_mask.argmax() == sample.context_length


def test_tensor_parallel_teacher_gives_the_same_rows(
    cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "cache"
    arguments = dump_arguments(nemos["untied"], jsonl, sharded)
    run_example(
        "dump_teacher_topk.py", *arguments, "teacher.tensor_model_parallel_size=2", processes=2
    )
    for one, two in zip(TopKCache.open(cache), TopKCache.open(sharded), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        # Sums in another order round a float16 to its neighbour at most.
        np.testing.assert_allclose(one.topk_log_probs, two.topk_log_probs, rtol=2e-3, atol=1e-3)
        assert (one.topk_ids == two.topk_ids).mean() > 0.99


def test_data_parallel_teachers_write_the_same_bytes(
    cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache"
    arguments = dump_arguments(nemos["untied"], jsonl, other)
    run_example("dump_teacher_topk.py", *arguments, processes=2, cold=True)
    assert files_of(other) == files_of(cache)


def test_a_smaller_micro_batch_resumes_the_cache(
    cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    """After an out-of-memory error, the shards that are there stay."""
    begun = tmp_path / "cache"
    shutil.copytree(cache, begun)
    shutil.rmtree(begun / "shard-00001")
    arguments = dump_arguments(nemos["untied"], jsonl, begun, "data.micro_batch_size=1")
    run_example("dump_teacher_topk.py", *arguments)
    assert (begun / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()
    for one, two in zip(TopKCache.open(cache), TopKCache.open(begun), strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        # Sums in another order round a float16 to its neighbour at most.
        np.testing.assert_allclose(one.topk_log_probs, two.topk_log_probs, rtol=2e-3, atol=1e-3)
        assert (one.topk_ids == two.topk_ids).mean() > 0.99


def test_samples_without_supervised_tokens_are_counted_and_limited(
    nemos: dict[str, Path], tmp_path: Path
) -> None:
    lines = [{"input": "colour " * (100 if i < 3 else 1), "output": "blue"} for i in range(10)]
    jsonl = tmp_path / "train.jsonl"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Where a prompt fills the sequence, the whole answer is truncated.
    arguments = dump_arguments(
        nemos["untied"],
        jsonl,
        tmp_path / "cache",
        "data.truncation_field=output",
        "data.add_eos=false",
    )
    output = run_example("dump_teacher_topk.py", *arguments, succeeds=False)
    assert "3 of 10 samples have no supervised token, expected at most a share of 0.1" in output
    assert not (tmp_path / "cache").exists()
    output = run_example("dump_teacher_topk.py", *arguments, "data.max_unsupervised_share=0.3")
    assert "the cache is whole; 3 of 10 samples have no supervised token" in output
    assert TopKCache.open(tmp_path / "cache").num_unsupervised_samples() == 3
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    arguments = [*arguments, "data.max_unsupervised_share=1", f"cache.path={tmp_path / 'none'}"]
    output = run_example("dump_teacher_topk.py", *arguments, succeeds=False)
    assert "3 of 3 samples have no supervised token" in output
    assert "max_unsupervised_share" not in output.split("have no supervised token")[-1]


def start_dump(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "dump_teacher_topk.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_interrupted_and_restarted_writes_the_same_bytes(
    name: str, cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache"
    arguments = dump_arguments(nemos["untied"], jsonl, other)
    process = start_dump(arguments)
    deadline = time.monotonic() + 200
    while not (other / "shard-00000").exists():
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {"SIGKILL": -9, "SIGTERM": 143}[name]
    if name == "SIGTERM":
        assert "stopped by SIGTERM" in output
        assert not list(other.glob(".tmp*")), "it takes its claim and its open shard away"
    output = run_example("dump_teacher_topk.py", *arguments)
    assert files_of(other) == files_of(cache)
    assert "the cache is whole" in output


def test_two_jobs_fill_one_cache(
    cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache"
    arguments = dump_arguments(nemos["untied"], jsonl, other)
    jobs = [start_dump([*arguments, *more]) for more in ([], ["cache.shards=1-2"])]
    for job in jobs:
        output, _ = job.communicate(timeout=200)
        assert job.returncode == 0, output
    assert files_of(other) == files_of(cache)


@pytest.mark.parametrize(
    ("selection", "processes"),
    [
        (["selection.kind=top_p", "selection.p=0.9", "selection.k=40"], 1),
        (["selection.kind=sample", "selection.num_draws=12"], 1),
        (["selection.kind=sample", "selection.num_draws=12"], 2),
    ],
    ids=["top_p", "sample", "sample, pipeline parallel"],
)
def test_other_selections(
    selection: list[str],
    processes: int,
    cache: Path,
    nemos: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    if processes == 2:
        # The teacher's three layers do not divide by 2; the student's two layers do.
        selection = [*selection, "teacher.pipeline_model_parallel_size=2"]
    path = tmp_path / "cache"
    arguments = dump_arguments(
        nemos["tied" if processes == 2 else "untied"], jsonl, path, "cache.codec=packed", *selection
    )
    run_example("dump_teacher_topk.py", *arguments, processes=processes)
    lengths = set()
    for sample, full in zip(TopKCache.open(path), TopKCache.open(cache), strict=True):
        np.testing.assert_array_equal(sample.tokens, full.tokens)
        lengths |= set((sample.topk_ids >= 0).sum(1))
        kept = np.exp(sample.topk_log_probs).sum(1)
        if "selection.kind=sample" in selection:
            np.testing.assert_allclose(kept, 1, rtol=1e-5)
            assert (sample.tail_log_probs == -np.inf).all()
        else:
            full_rows = (sample.topk_ids >= 0).sum(1) == 40
            # Below 0.9, because the packed values are quantised.
            assert (kept[~full_rows] > 0.87).all()
    assert len(lengths) > 5, "rows differ in length"


def test_shards_are_numbers_and_ranges() -> None:
    from nemo_kd.teacher.plan import parse_shards

    assert parse_shards(None, 3) == [0, 1, 2]
    assert parse_shards(7, 8) == [7]  # what Hydra makes of cache.shards=7
    assert parse_shards("0-2,5", 6) == [0, 1, 2, 5]
    for text, message in (("0-6", "shards from 0 to 5, got 0-6"), ("a", "expected 0-99")):
        with pytest.raises(ValueError, match=message):
            parse_shards(text, 6)


def test_nemos_own_trainer_takes_the_teachers_config(
    nemos: dict[str, Path], tmp_path: Path
) -> None:
    """On a GPU NeMo's builder reads keys of the model's config that nothing reads with gloo."""
    from hydra import compose, initialize_config_dir
    from nemo.collections.nlp.parts import megatron_trainer_builder
    from omegaconf import OmegaConf

    from nemo_kd.config import DataConfig
    from nemo_kd.nemo.dump import _merge_teacher_config
    from nemo_kd.nemo.nemo_file import read_model_config

    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        arguments = dump_arguments(nemos["untied"], tmp_path, tmp_path, "trainer.accelerator=gpu")
        config = compose("dump_teacher_topk", arguments)
    teacher = read_model_config(str(nemos["untied"]), "teacher.restore_from_path")
    model = _merge_teacher_config(config, teacher, DataConfig(file_names=("a",)))
    run = OmegaConf.create({"trainer": config.trainer, "model": model, "exp_manager": {}})
    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_trainer_builder, "NLPDDPStrategy", lambda **more: asked.update(more))
        megatron_trainer_builder.MegatronLMPPTrainerBuilder(run)._training_strategy()
    assert asked["gradient_as_bucket_view"] is False


BAD = {
    "an empty file": (["data.file_names=[empty.jsonl]"], "found an empty file"),
    "another teacher": (["+teacher.rotary_base=5000"], "teacher_fingerprint"),
    "no such file": (["data.file_names=[nowhere.jsonl]"], "found no nowhere.jsonl"),
    "no such file of a given format": (
        ["data.file_names=[nowhere.jsonl]", "data.format=prompt"],
        "data.file_names: expected files, found no nowhere.jsonl",
    ),
    "not JSON": (["data.file_names=[broken.jsonl]"], "broken.jsonl, line 2: not JSON"),
    "a key is missing": (["data.file_names=[keyless.jsonl]"], "keyless.jsonl, line 2: expected"),
    "k above the vocabulary": (
        ["selection.k=402"],
        "selection.k: expected an integer from 1 to 401, got 402",
    ),
    "another cache": (["selection.k=4"], "selection.k: 8 against 4"),
    "no teacher": (["teacher.restore_from_path=nowhere.nemo"], "found no nowhere.nemo"),
    "a teacher that is no .nemo": (["teacher.restore_from_path=broken.jsonl"], "expected a .nemo"),
    "no GPU": (["trainer.accelerator=gpu"], "torch sees no CUDA device"),
    "misspelt key": (["selektion.k=4"], "selektion"),
    "misspelt key with +": (["+data.max_seq_lenght=4"], "did you mean data.max_seq_length?"),
    "longer than the teacher's": (["data.max_seq_length=129"], "at most the model's 128 positions"),
    "wrong type": (["selection.k=many"], "selection.k: expected int, got 'many'"),
    "processes that do not divide": (["teacher.tensor_model_parallel_size=2"], "got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str,
    cache: Path,
    nemos: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("keyless.jsonl"), [{"input": "a", "output": "b"}, {"input": "a"}])
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n{]\n")
    before = files_of(cache)
    overrides, message = BAD[case]
    arguments = dump_arguments(nemos["untied"], jsonl, cache, *overrides)
    output = run_example("dump_teacher_topk.py", *arguments, succeeds=False)
    assert message in output
    assert "Traceback" not in output
    assert files_of(cache) == before, "what was written stays"


def test_prompt_template_is_the_users(cache: Path) -> None:
    assert TopKCache.open(cache).manifest.dataset["prompt_template"] == PROMPT
