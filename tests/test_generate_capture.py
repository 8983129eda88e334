"""The captured cache: as the dump of the same tokens, trained on, verified; and fair draws."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, save_llama
from generation import K, arguments, capture, generate, lines
from runs import (
    dump_arguments,
    run_example,
    scalars,
    train_arguments,
    write_jsonl,
)

from nemo_kd.cache import TopKCache
from nemo_kd.cli import main

NUM_WORDS = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are words, so that a text has the tokens that were written.

    There are as many as NeMo pads to: a student gives the padding some of its mass.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "Q:", "A:", *sorted(set(WORDS))]
    words += [f"word{number}" for number in range(NUM_WORDS - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    path = tmp_path_factory.mktemp("words") / "hf"
    save_llama(path, own, False, 2, len(words))
    return path


@pytest.fixture(scope="module")
def nemo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "model.nemo"
    run_example("import_hf_llama.py", f"source={model}", f"output={path}")
    return path


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with answers and their cache."""
    path = tmp_path_factory.mktemp("captured")
    inputs = ("the student learns", "entropy", "a large teacher of small data", "label answer")
    data = write_jsonl(path / "prompts.jsonl", [{"input": text} for text in inputs])
    generate(*arguments(model, data, path / "answers.jsonl"), *capture(path / "cache"))
    return path


def test_the_rows_are_those_of_a_dump(written: Path, nemo: Path, tmp_path: Path) -> None:
    """NeMo's forward pass over the same tokens: entries the same but for ties at a row's end."""
    run = dump_arguments(nemo, written / "answers.jsonl", tmp_path / "dumped", f"selection.k={K}")
    run_example("dump_teacher_topk.py", *run)
    captured, dumped = TopKCache.open(written / "cache"), TopKCache.open(tmp_path / "dumped")
    assert len(captured) == len(dumped) == len(lines(written / "answers.jsonl"))
    assert captured.manifest.vocab_size == dumped.manifest.vocab_size
    assert captured.manifest.tokenizer_fingerprint == dumped.manifest.tokenizer_fingerprint
    tolerance, num_rows = 2e-3, 0  # float16 near log-probs of -4
    for own, other in zip(captured, dumped, strict=True):
        # The dump adds the end token to an answer that was cut.
        assert other.tokens[: len(own.tokens)].tolist() == own.tokens.tolist()
        assert own.context_length == other.context_length
        assert own.loss_mask.tolist() == other.loss_mask[: len(own.tokens)].tolist()
        for row in range(len(own.topk_ids)):
            num_rows += 1
            ours, theirs = (
                dict(zip(each.topk_ids[row].tolist(), each.topk_log_probs[row], strict=True))
                for each in (own, other)
            )
            least = max(min(ours.values()), min(theirs.values())) + tolerance
            for one, two in ((ours, theirs), (theirs, ours)):
                for token, value in one.items():
                    if token in two:
                        assert math.isclose(value, two[token], abs_tol=tolerance)
                    else:
                        assert value < least
        tails = (np.exp(each.tail_log_probs[: len(own.topk_ids)]) for each in (own, other))
        np.testing.assert_allclose(*tails, atol=tolerance)
    assert num_rows > 40


def test_a_student_trains_on_it(written: Path, nemo: Path, tmp_path: Path) -> None:
    """Of the student that wrote them, the rows are its own distributions: nothing to learn."""
    run = train_arguments(nemo, written / "cache", written / "cache", tmp_path / "logs")
    run += ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    run += ["model.knowledge_distillation.tail=bucket", f"save_to={tmp_path / 'kd.nemo'}"]
    run_example("train_kd_sft.py", *run)
    logged = scalars(tmp_path / "logs")
    assert logged["kd_loss"][0] < 1e-3
    assert logged["sft_loss"][0] > 1
    assert 0.3 < logged["teacher_topk_mass"][0] < 1
    assert (tmp_path / "kd.nemo").exists()


def test_verify_against_says_that_no_file_gives_its_tokens(
    written: Path, model: Path, capsys: Any
) -> None:
    cache = str(written / "cache")
    assert main(["verify", cache]) == 0
    against = ["--against", str(written / "answers.jsonl"), "--tokenizer", str(model)]
    assert main(["verify", cache, *against]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "captured while the answers were written, and no file gives its tokens" in error
    assert "verify it without --against" in error


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_draws_follow_the_distribution(
    temperature: float, top_p: float, model: Path, tmp_path: Path
) -> None:
    """The first tokens of 2,000 answers against the row, which is the whole distribution here."""
    from scipy.stats import chisquare
    from transformers import AutoTokenizer

    data = write_jsonl(tmp_path / "prompts.jsonl", [{"input": "the student learns"}])
    run = arguments(model, data, tmp_path / "answers.jsonl", "sampling.n=2000", "batch_size=500")
    run += [f"sampling.temperature={temperature}", f"sampling.top_p={top_p}"]
    run += [f"capture.path={tmp_path / 'cache'}", f"capture.k={NUM_WORDS}", "sampling.max_tokens=1"]
    generate(*run)
    cache = TopKCache.open(tmp_path / "cache")
    row = cache[0]
    probabilities = np.zeros(NUM_WORDS)
    probabilities[row.topk_ids[0]] = np.exp(row.topk_log_probs[0].astype(float) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    # An answer that only ends is a failure, and in no cache.
    probabilities[AutoTokenizer.from_pretrained(model).eos_token_id] = 0
    drawn = np.bincount([sample.tokens[-1] for sample in cache], minlength=NUM_WORDS)
    assert not drawn[probabilities == 0].any()
    expected = probabilities / probabilities.sum() * drawn.sum()
    often = expected >= 5
    seen = [*drawn[often], drawn[~often].sum()]
    expected_seen = [*expected[often], expected[~often].sum()]
    if not expected_seen[-1]:
        seen, expected_seen = seen[:-1], expected_seen[:-1]
    assert len(seen) >= 4
    assert chisquare(seen, expected_seen).pvalue > 1e-3
