"""GPTSFTKDDataset's batches are NeMo's own, and each row stands where its token is predicted."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import write_jsonl

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache
from nemo_kd.loss import KDLossConfig

K = 5
NEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "answers only": {},
    "the prompt too": {"answer_only_loss": False},
    "begin and separator": {"add_bos": True, "add_sep": True, "sep_id": 7},
    "no end": {"add_eos": False},
    "truncated": {"max_seq_length": 16},
    "truncated left": {"max_seq_length": 16, "truncation_method": "left"},
    "padded to the longest allowed": {"pad_to_max_length": True},
}


@pytest.fixture(scope="module")
def tokenizer(hf_llamas: dict[str, Path]) -> Any:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(str(hf_llamas["tied"]))


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    rng = random.Random(2)
    words = ["token", "model", "a", "the", "student", "x"]
    return [
        {
            "input": " ".join(rng.choices(words, k=rng.randint(1, 20))),
            "output": " ".join(rng.choices(words, k=rng.randint(0, 9))),
        }
        for _ in range(12)
    ]


def nemo_dataset(tmp_path: Path, records: list[dict[str, str]], tokenizer: Any, **more: Any) -> Any:
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

    settings = {
        "max_seq_length": 64,
        "label_key": "output",
        "prompt_template": "Q: {input} A: {output}",
        "truncation_field": "input",
        "get_attention_mask_from_fusion": True,
    }
    path = write_jsonl(tmp_path / "data.jsonl", records)
    return GPTSFTDataset(str(path), tokenizer, **(settings | more))


def write_cache(path: Path, nemo: Any, tokenizer: Any, **more: Any) -> TopKCache:
    """A cache of NeMo's samples with random rows."""
    from nemo_kd.dataset import tokenizer_fingerprint
    from nemo_kd.dump import _sample

    manifest = Manifest(
        selection={"kind": "top_k", "k": K, "temperature": 1.0},
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher_fingerprint="",
        sources=(),
        dataset={
            "add_eos": nemo.add_eos,
            "chat": False,
            "max_seq_length": nemo.max_seq_length,
        },
        num_samples=len(nemo),
        samples_per_shard=5,
    )
    manifest = replace(manifest, **more)
    writer = CacheWriter.open(path, manifest)
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        with writer.shard(shard) as sink:
            for index in manifest.shard_samples(shard):
                tokens, loss_mask, context_length = _sample(nemo[index], nemo)
                rows = int(loss_mask.sum())
                ids = np.stack(
                    [rng.permutation(manifest.vocab_size)[:K] for _ in range(rows)]
                    or [np.zeros((0, K), int)]
                ).reshape(rows, K)
                log_probs = np.log(rng.dirichlet(np.ones(K + 1), rows))
                sink.add(tokens, loss_mask, context_length, ids, log_probs[:, :K], log_probs[:, K])
    return TopKCache.open(path)


def kd_dataset(cache: TopKCache, tokenizer: Any, config: KDLossConfig | None = None, **more: Any):
    from nemo_kd.dataset import GPTSFTKDDataset

    return GPTSFTKDDataset(
        str(cache.path),
        tokenizer,
        kd_config=config or KDLossConfig(),
        **({"max_seq_length": 64, "get_attention_mask_from_fusion": True} | more),
    )


@pytest.mark.parametrize("name", NEMO_SETTINGS)
def test_batches_equal_nemos(name: str, tmp_path: Path, tokenizer: Any, records: Any) -> None:
    settings = NEMO_SETTINGS[name]
    nemo = nemo_dataset(tmp_path, records, tokenizer, **settings)
    cache = write_cache(tmp_path / "cache", nemo, tokenizer)
    own = kd_dataset(
        cache,
        tokenizer,
        **{k: v for k, v in settings.items() if k in ("max_seq_length", "pad_to_max_length")},
    )
    assert len(own) == len(nemo)
    for indices in ([0], [1, 2, 3], list(range(12)), [3, -1]):  # -1: NeMo's padding of a batch
        expected = nemo.collate_fn([nemo[index] for index in indices])
        batch = own.collate_fn([own[index] for index in indices])
        assert batch.keys() == expected.keys() | {"topk_ids", "topk_log_probs", "tail_log_probs"}
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert batch[key].dtype == value.dtype, key
                torch.testing.assert_close(batch[key], value, rtol=0, atol=0, msg=key)
        assert batch["token_count"] == expected["token_count"]


def test_rows_stand_where_their_token_is_predicted(
    tmp_path: Path, tokenizer: Any, records: Any
) -> None:
    nemo = nemo_dataset(tmp_path, records, tokenizer)
    cache = write_cache(tmp_path / "cache", nemo, tokenizer)
    own = kd_dataset(cache, tokenizer)
    batch = own.collate_fn([own[index] for index in range(12)])
    assert batch["topk_ids"].shape == (*batch["tokens"].shape, K)
    for index, sample in enumerate(cache):
        supervised = batch["loss_mask"][index].bool()
        np.testing.assert_array_equal(batch["topk_ids"][index][supervised], sample.topk_ids)
        np.testing.assert_array_equal(
            batch["topk_log_probs"][index][supervised], sample.topk_log_probs
        )
        np.testing.assert_array_equal(
            batch["tail_log_probs"][index][supervised], sample.tail_log_probs
        )
        assert (batch["topk_ids"][index][~supervised] == -1).all()
        assert (batch["topk_log_probs"][index][~supervised] == -torch.inf).all()
        assert (batch["tail_log_probs"][index][~supervised] == -torch.inf).all()


def test_sample_order_follows_the_seed(tmp_path: Path, tokenizer: Any, records: Any) -> None:
    cache = write_cache(tmp_path / "cache", nemo_dataset(tmp_path, records, tokenizer), tokenizer)

    def order(seed: int) -> list[str]:
        dataset = kd_dataset(cache, tokenizer, max_num_samples=24, seed=seed)
        return [str(dataset[index]["input_ids"]) for index in range(24)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(set(order(1))) == sorted({str(sample.tokens.tolist()) for sample in cache})


def test_order_of_seed_1_is_nemos_own(
    tmp_path: Path, tokenizer: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nemo = nemo_dataset(
        tmp_path, records, tokenizer, max_num_samples=24, sanity_check_dist_workers=False
    )
    cache = write_cache(tmp_path / "cache", nemo_dataset(tmp_path, records, tokenizer), tokenizer)
    own = kd_dataset(cache, tokenizer, max_num_samples=24, seed=1)
    for index in range(24):
        assert own[index]["input_ids"] == nemo[index]["input_ids"]


def test_renormalize_untempers_the_dump(tmp_path: Path, tokenizer: Any, records: Any) -> None:
    nemo = nemo_dataset(tmp_path, records, tokenizer)
    selection = {"kind": "top_k", "k": K, "temperature": 2.0}
    cache = write_cache(tmp_path / "cache", nemo, tokenizer, selection=selection)
    own = kd_dataset(cache, tokenizer, KDLossConfig(temperature=3.0))
    supervised = own.collate_fn([own[0]])["topk_log_probs"][0]
    rows = supervised[supervised[:, 0] > -torch.inf]
    stored = torch.from_numpy(cache[0].topk_log_probs)
    torch.testing.assert_close(rows.log_softmax(-1), (2 * stored).log_softmax(-1))
    torch.testing.assert_close(rows.logsumexp(-1), stored.logsumexp(-1))
    # NeMo collates a blend with the first cache's function, whose temperature may be another
    first = kd_dataset(write_cache(tmp_path / "first", nemo, tokenizer), tokenizer)
    blended = first.collate_fn([first[1], own[0]])["topk_log_probs"][1, : len(supervised)]
    torch.testing.assert_close(blended[blended[:, 0] > -torch.inf], rows)
    bucket = kd_dataset(cache, tokenizer, KDLossConfig(tail="bucket", temperature=2.0))
    stored = bucket.collate_fn([bucket[0]])["topk_log_probs"][0]
    np.testing.assert_array_equal(stored[stored[:, 0] > -torch.inf], cache[0].topk_log_probs)


@pytest.mark.parametrize(
    ("changes", "settings", "config", "message"),
    [
        ({"tokenizer_fingerprint": "other"}, {}, {}, "fingerprint other"),
        ({"vocab_size": 400}, {}, {}, "vocabulary 400.*vocabulary 401"),
        ({}, {"max_seq_length": 32}, {}, "max_seq_length=64, this run has max_seq_length=32"),
        ({}, {}, {"tail": "label", "temperature": 2.0}, "temperature=1.0, got 2.0"),
    ],
    ids=["tokenizer", "vocabulary", "sequence length", "temperature"],
)
def test_a_cache_that_does_not_fit_is_refused(
    tmp_path: Path,
    tokenizer: Any,
    records: Any,
    changes: dict[str, Any],
    settings: dict[str, Any],
    config: dict[str, Any],
    message: str,
) -> None:
    nemo = nemo_dataset(tmp_path, records[:2], tokenizer)
    cache = write_cache(tmp_path / "cache", nemo, tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        kd_dataset(cache, tokenizer, KDLossConfig(**config), **settings)


def test_a_jsonl_is_refused(tmp_path: Path, tokenizer: Any, records: Any) -> None:
    from nemo_kd.dataset import GPTSFTKDDataset

    path = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(ValueError, match="expected a cache directory"):
        GPTSFTKDDataset(str(path), tokenizer, kd_config=KDLossConfig())


def test_sample_fields_are_what_the_dataset_reads() -> None:
    assert set(Sample._fields) == {
        "tokens",
        "loss_mask",
        "topk_ids",
        "topk_log_probs",
        "tail_log_probs",
        "context_length",
    }
