"""Rows that are captured as answers are written: those of a dump, and what trains on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation import RECORDS, K, arguments, capture, generate, lines
from runs import dump_arguments, run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.cli import main

pytest.importorskip("nemo")


@pytest.fixture(scope="module")
def captured(hf_llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with answers.jsonl and cache."""
    path = tmp_path_factory.mktemp("captured")
    # Plain texts, whose tokens depend the least on where the answer begins.
    prompts = [{"prompt": record["input"] + "\n"} for record in RECORDS]
    data = write_jsonl(path / "prompts.jsonl", prompts)
    run = arguments(hf_llamas["untied"], data, path / "answers.jsonl")
    generate(*run, *capture(path / "cache"), "sampling.n=8")
    return path


def test_rows_are_those_of_a_dump_of_the_same_tokens(
    captured: Path, nemos: dict[str, Path], tmp_path: Path
) -> None:
    """What a random model writes is often not tokenised as it was written: up to there."""
    dumped = tmp_path / "cache"
    dump = dump_arguments(nemos["untied"], captured / "answers.jsonl", dumped)
    run_example("dump_teacher_topk.py", *dump, "data.max_seq_length=128", f"selection.k={K}")
    num_rows = num_other_ids = 0
    caches = TopKCache.open(captured / "cache"), TopKCache.open(dumped)
    assert len(caches[0]) == len(caches[1]) == len(lines(captured / "answers.jsonl"))
    for number in range(len(caches[0])):
        one, other = (cache[number] for cache in caches)
        start, length = one.context_length, min(len(one.tokens), len(other.tokens))
        same = one.tokens[:length] == other.tokens[:length]
        common = length if same.all() else int(same.argmin())
        if common < start:
            continue
        # The row at the first other token still has the same tokens before it.
        rows = slice(0, min(common + 1, length) - start)
        num_rows += rows.stop
        # Both caches round to float16, whose spacing is 1e-3 of the value.
        for name in ("topk_log_probs", "tail_log_probs"):
            ours, theirs = (getattr(each, name)[rows] for each in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)
        num_other_ids += int((one.topk_ids[rows] != other.topk_ids[rows]).sum())
    assert num_rows > 40
    assert num_other_ids < 0.01 * num_rows * K  # of entries that are equal to rounding


def test_a_student_trains_on_it(captured: Path, nemos: dict[str, Path], tmp_path: Path) -> None:
    cache, logs = captured / "cache", tmp_path / "logs"
    run_example("train_kd_sft.py", *train_arguments(nemos["tied"], cache, cache, logs))
    curves = scalars(logs)
    (name,) = (each for each in curves if each.startswith("validation_kd_loss"))
    assert curves[name][-1] < curves[name][0]


def test_it_says_that_no_file_gives_its_tokens(
    captured: Path, nemos: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = captured / "cache"
    assert main(["verify", str(cache)]) == 0
    against = ["--against", str(captured / "answers.jsonl"), "--tokenizer", str(nemos["untied"])]
    assert main(["verify", str(cache), *against]) == 1
    told: Any = capsys.readouterr().err.strip().splitlines()[-1]
    assert "captured while the answers were written" in told
    assert "verify it without --against" in told
