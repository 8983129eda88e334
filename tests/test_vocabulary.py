"""A student whose tokenizer has other added tokens than the teacher's, or more or fewer of them."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_llama
from runs import dump_arguments, run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import CacheWriter, Sample, TopKCache
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.rows import sample_rows
from nemo_kd.student.vocabulary import check_lacking, student_ids, with_student_ids

TEACHERS = ["<|a|>", "<|b|>", "<|c|>"]  # ids 401, 402 and 403
STUDENTS = ["<|c|>", "<|x|>"]  # 401 and 402


def with_tokens(tokenizer: Any, names: list[str]) -> Any:
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": names})
    return more


def save_models(directory: Path, hf_tokenizer: Any, num_rows: int | None) -> dict[str, Path]:
    """A teacher and a student with added tokens of their own, as Hugging Face has them."""
    paths = {}
    for name, layers, names in (("teacher", 3, TEACHERS), ("student", 2, STUDENTS)):
        paths[name] = directory / name
        tokenizer = with_tokens(hf_tokenizer, names)
        save_llama(paths[name], tokenizer, False, layers, num_rows or len(tokenizer))
    return paths


def write_data(path: Path) -> Path:
    """Samples with <|c|>, which the student has under another id."""
    records = [
        {"input": "the student learns " * (1 + i), "output": f"from <|c|> the teacher {i}"}
        for i in range(6)
    ]
    return write_jsonl(path, records)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("hf"), hf_tokenizer, None)


@pytest.fixture(scope="module")
def own_nemos(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("nemo")
    for name, path in models.items():
        run_example("import_hf_llama.py", f"source={path}", f"output={directory / name}.nemo")
    return {name: directory / f"{name}.nemo" for name in models}


@pytest.fixture(scope="module")
def own_cache(own_nemos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's rows."""
    directory = tmp_path_factory.mktemp("data")
    jsonl = write_data(directory / "train.jsonl")
    arguments = dump_arguments(own_nemos["teacher"], jsonl, directory / "cache")
    run_example("dump_teacher_topk.py", *arguments, "selection.k=64")
    return directory / "cache"


def expected_kd(student: Any, sample: Sample) -> torch.Tensor:
    """KL of each row at tail label, by hand, from the cache's own ids."""
    ids = {401: None, 402: None, 403: 401}  # <|a|> and <|b|> are not the student's
    tokens = torch.from_numpy(sample.tokens).long().clone()
    tokens[tokens == 403] = 401
    predicted = sample.loss_mask.nonzero()[0]
    with torch.no_grad():
        logits = student(tokens[None]).logits[0, predicted - 1].double()
    logits = torch.cat([logits, torch.zeros(len(logits), 512 - 403)], dim=-1)  # as NeMo pads
    log_q, losses = logits.log_softmax(-1), []
    for row, label in enumerate(tokens[predicted].tolist()):
        target = torch.zeros(512, dtype=torch.float64)
        for number, log_prob in zip(sample.topk_ids[row], sample.topk_log_probs[row], strict=True):
            own = ids.get(int(number), int(number))
            if own is not None:
                target[own] += float(np.exp(np.float64(log_prob)))
        target[label] += 1 - target.sum()
        losses.append((target * (target.clamp(min=1e-300).log() - log_q[row])).sum())
    return torch.stack(losses)


def test_tokens_are_found_by_their_text(
    models: dict[str, Path], own_nemos: dict[str, Path], own_cache: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    cache = TopKCache.open(own_cache)
    assert 403 in cache[0].tokens
    arguments = train_arguments(own_nemos["student"], own_cache, own_cache, tmp_path / "logs")
    settings = (
        "model.data.validation_drop_last=false",
        "model.data.validation_ds.global_batch_size=2",
        "model.knowledge_distillation.tail=label",
    )
    output = run_example("train_kd_sft.py", *arguments, *settings, "trainer.max_steps=0")
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    expected = torch.cat([expected_kd(student, sample) for sample in cache]).mean()
    logged = scalars(tmp_path / "logs")
    np.testing.assert_allclose(logged["validation_kd_loss_dataloader0"], expected, rtol=1e-3)

    lost = [np.exp(s.topk_log_probs[np.isin(s.topk_ids, (401, 402))]).sum() for s in cache]
    share = sum(lost) / sum(len(sample.topk_ids) for sample in cache)
    assert share > 1e-5
    assert (
        f"lacks 2 of the teacher's tokens (<|a|>, <|b|>), which the data does not use; {share:.3%}"
    ) in output
    assert output.count("measured on 6 of 6 samples") == 2  # training, validation

    arguments = train_arguments(own_nemos["student"], own_cache, own_cache, tmp_path / "trained")
    run_example("train_kd_sft.py", *arguments, "trainer.max_steps=2")
    assert np.isfinite(scalars(tmp_path / "trained")["kd_loss"]).all()


def test_a_student_with_more_tokens_at_its_end_needs_nothing(
    own_nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(own_nemos["student"], cache, cache, tmp_path / "logs")
    output = run_example("train_kd_sft.py", *arguments, "trainer.max_steps=2")
    assert "lacks" not in output
    assert len(scalars(tmp_path / "logs")["kd_loss"]) == 2


def nemo_tokenizer(path: Path) -> Any:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(str(path))


def test_data_with_a_token_that_the_student_lacks_is_refused(
    models: dict[str, Path], own_nemos: dict[str, Path], tmp_path: Path
) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"input": "<|a|> the", "output": "student"}] * 4)
    cache = tmp_path / "cache"
    run_example("dump_teacher_topk.py", *dump_arguments(own_nemos["teacher"], jsonl, cache))
    arguments = train_arguments(own_nemos["student"], cache, cache, tmp_path / "logs")
    output = run_example("train_kd_sft.py", *arguments, succeeds=False)
    assert f"{cache}: the data has <|a|>, a token that the student's tokenizer lacks" in output
    assert "Traceback" not in output
    opened = TopKCache.open(cache)
    ids = student_ids(opened, nemo_tokenizer(models["student"]))
    assert ids is not None
    with pytest.raises(ValueError, match="lacks token 401 of the sample"):
        with_student_ids(opened[0], ids)


def test_a_row_of_lacking_tokens_alone_is_empty() -> None:
    """Its whole mass is the tail's, and no number of it is NaN at any temperature."""
    ids = np.arange(4, dtype=np.int32)
    ids[2:] = -1
    sample = Sample(
        tokens=np.array([0, 1], dtype=np.int32),
        loss_mask=np.array([0, 1], dtype=np.uint8),
        topk_ids=np.array([[3, 2, -1]], dtype=np.int32),
        topk_log_probs=np.array([[-0.693147, -1.386294, -np.inf]], dtype=np.float32),
        tail_log_probs=np.log(np.array([0.25], dtype=np.float32)),
        context_length=1,
    )
    own = with_student_ids(sample, ids)
    assert own.topk_ids.tolist() == [[-1, -1, -1]]
    np.testing.assert_allclose(own.tail_log_probs, [0], atol=1e-6)
    rows = sample_rows(own, KDLossConfig(tail="renormalize", temperature=2.0), dumped_at=2.0)
    assert rows.topk_log_probs.tolist() == [[-torch.inf] * 3]


def rewritten(source: Path, path: Path, **changes: Any) -> TopKCache:
    """A cache with another manifest and the same samples."""
    cache = TopKCache.open(source)
    writer = CacheWriter.open(path, replace(cache.manifest, **changes))
    for index in writer.missing_shards():
        with writer.shard(index) as shard:
            for number in writer.manifest.shard_samples(index):
                shard.add(**cache[number]._asdict())
    return TopKCache.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest, student: {"vocabulary": {}}, "in more than added tokens"),
        (
            lambda manifest, student: {
                "vocabulary": manifest.vocabulary | {"base_fingerprint": "other"}
            },
            "in more than added tokens",
        ),
        (
            lambda manifest, student: {"vocabulary": manifest.vocabulary | {"end_id": 0}},
            "in the end token",
        ),
    ],
    ids=["a cache of an earlier release", "another base", "another end"],
)
def test_tokenizers_that_differ_in_more_are_refused(
    change: Any, message: str, models: dict[str, Path], own_cache: Path, tmp_path: Path
) -> None:
    student = nemo_tokenizer(models["student"])
    changes = change(TopKCache.open(own_cache).manifest, student)
    cache = rewritten(own_cache, tmp_path / "cache", **changes)
    with pytest.raises(ValueError, match=f"another tokenizer .*which differs {message}"):
        student_ids(cache, student)


def test_an_earlier_cache_goes_on(models: dict[str, Path], own_cache: Path, tmp_path: Path) -> None:
    """Its manifest has no such key: it is resumed, and fits the tokenizer that it was made with."""
    earlier = rewritten(own_cache, tmp_path / "cache", vocabulary={})
    assert '"vocabulary"' not in (tmp_path / "cache" / "manifest.json").read_text()
    now = TopKCache.open(own_cache).manifest
    assert CacheWriter.open(earlier.path, now).manifest.vocabulary == {}
    assert student_ids(earlier, nemo_tokenizer(models["teacher"])) is None
    assert check_lacking(earlier, None) is None


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"base_fingerprint": "x"},
        {"base_fingerprint": "x", "added_tokens": {"<a>": 404}, "end_id": 1},
        {"base_fingerprint": "x", "added_tokens": {"<a>": "1"}, "end_id": 1},
        {"base_fingerprint": "x", "added_tokens": {}, "end_id": None, "more": 1},
    ],
    ids=["keys missing", "no such id", "no id", "unknown key"],
)
def test_a_vocabulary_is_checked(vocabulary: dict[str, Any], own_cache: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary: expected"):
        replace(TopKCache.open(own_cache).manifest, vocabulary=vocabulary)
