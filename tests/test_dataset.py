"""GPTSFTKDDataset's batches are NeMo's own, and each row stands where its token is predicted."""

import random
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache
from nemo_kd.cache.codec import RawCodec
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.rows import ROW_KEYS, scatter_rows

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
    """Write a cache of NeMo's samples with random rows."""
    from nemo_kd.chat.samples import cut_sample

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
        codec="raw",
    )
    manifest = replace(manifest, **more)
    writer = CacheWriter.open(path, manifest)
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        with writer.shard(shard) as sink:
            for index in manifest.shard_samples(shard):
                tokens, loss_mask, context_length = cut_sample(nemo[index], nemo)
                rows = int(loss_mask.sum())
                ids = np.stack(
                    [rng.permutation(manifest.vocab_size)[:K] for _ in range(rows)]
                    or [np.zeros((0, K), int)]
                ).reshape(rows, K)
                log_probs = np.log(rng.dirichlet(np.ones(K + 1), rows))
                sink.add(tokens, loss_mask, context_length, ids, log_probs[:, :K], log_probs[:, K])
    return TopKCache.open(path)


def kd_dataset(cache: TopKCache, tokenizer: Any, config: KDLossConfig | None = None, **more: Any):
    from nemo_kd.nemo.dataset import GPTSFTKDDataset

    return GPTSFTKDDataset(
        str(cache.path),
        tokenizer,
        kd_config=config or KDLossConfig(tail="renormalize"),
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
    for indices in ([0], [1, 2, 3], list(range(12)), [3, -1]):  # NeMo pads a batch with index -1
        expected = nemo.collate_fn([nemo[index] for index in indices])
        batch = own.collate_fn([own[index] for index in indices])
        assert batch.keys() == expected.keys() | set(ROW_KEYS)
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
    longest = int(batch["loss_mask"].sum(1).max())
    assert batch["topk_ids"].shape == (12, longest, K), "prompts take no room"
    batch |= scatter_rows(batch, batch["tokens"].shape[1])
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


def test_a_stage_without_the_loss_decodes_no_rows(
    tmp_path: Path, tokenizer: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache", nemo_dataset(tmp_path, records, tokenizer), tokenizer)
    with_rows, without = (kd_dataset(cache, tokenizer, reads_rows=reads) for reads in (True, False))
    expected = with_rows.collate_fn([with_rows[index] for index in range(12)])
    monkeypatch.setattr(RawCodec, "decode", None)
    batch = without.collate_fn([without[index] for index in range(12)])
    for key in expected.keys() - set(ROW_KEYS):
        if isinstance(expected[key], torch.Tensor):
            assert torch.equal(batch[key], expected[key]), key
    assert batch["topk_ids"].shape == (12, 0, 1)
    rows = scatter_rows(batch, batch["tokens"].shape[1])
    assert (rows["topk_ids"] == -1).all()


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
    own = kd_dataset(cache, tokenizer, KDLossConfig(tail="renormalize", temperature=3.0))
    supervised = own.collate_fn([own[0]])["topk_log_probs"][0]
    rows = supervised[supervised[:, 0] > -torch.inf]
    stored = torch.from_numpy(cache[0].topk_log_probs)
    torch.testing.assert_close(rows.log_softmax(-1), (2 * stored).log_softmax(-1))
    torch.testing.assert_close(rows.logsumexp(-1), stored.logsumexp(-1))
    # NeMo collates a blend with the first cache's function. Its temperature may be another one.
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
        kd_dataset(cache, tokenizer, KDLossConfig(**{"tail": "renormalize", **config}), **settings)


def test_a_jsonl_is_refused(tmp_path: Path, tokenizer: Any, records: Any) -> None:
    from nemo_kd.nemo.dataset import GPTSFTKDDataset

    path = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(ValueError, match="expected a cache directory"):
        GPTSFTKDDataset(str(path), tokenizer, kd_config=KDLossConfig(tail="renormalize"))


# Packs

PACK_SIZE = 72


def packed_dataset(cache: TopKCache, tokenizer: Any, **more: Any) -> Any:
    from nemo_kd.nemo.packing import GPTSFTKDPackedDataset

    return GPTSFTKDPackedDataset(
        str(cache.path),
        tokenizer,
        kd_config=KDLossConfig(tail="renormalize"),
        max_seq_length=PACK_SIZE,
        **more,
    )


def prepare_packed_samples(nemo: Any, eos_id: int, context_parallel_size: int) -> list[Any]:
    """What NeMo's prepare_packed_ft_dataset.py makes of a dataset's samples before packing."""
    samples = [nemo[index] for index in range(len(nemo))]
    if context_parallel_size > 1:
        multiple = max(16, 2 * context_parallel_size)
        for sample in samples:
            tokens = sample["input_ids"]
            length = min(PACK_SIZE, -(-len(tokens) // multiple) * multiple)
            sample["input_ids"] = tokens + [eos_id] * (length - len(tokens) + 1)
    return samples


@pytest.mark.parametrize("context_parallel_size", [1, 2, 9])
def test_packed_batches_equal_nemos(
    context_parallel_size: int,
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import (
        GPTSFTPackedDataset,
    )
    from nemo.utils import sequence_packing_utils as packing

    (tmp_path / "candidates").mkdir()
    # NeMo packs samples of one length in any order, so each length has only one sample here.
    candidates = [{"input": "token " * number, "output": "a model"} for number in range(1, 40)]
    lengths_of = prepare_packed_samples(
        nemo_dataset(tmp_path / "candidates", candidates, tokenizer, max_seq_length=48),
        tokenizer.eos_id,
        context_parallel_size,
    )
    distinct = {
        len(sample["input_ids"]): record
        for sample, record in zip(lengths_of, candidates, strict=True)
    }
    nemo = nemo_dataset(tmp_path, list(distinct.values()), tokenizer, max_seq_length=48)
    cache = write_cache(tmp_path / "cache", nemo, tokenizer)
    layout = {"pad_seq_length_to_mult": 8 * context_parallel_size}
    own = packed_dataset(
        cache, tokenizer, context_parallel_size=context_parallel_size, seed=3, **layout
    )

    samples = prepare_packed_samples(nemo, tokenizer.eos_id, context_parallel_size)
    lengths = [len(sample["input_ids"]) - 1 for sample in samples]
    sequences, histogram = packing.create_hist(samples, PACK_SIZE)
    order = np.random.default_rng(3).permutation(len(samples))
    monkeypatch.setattr(
        np.random, "shuffle", lambda all_: all_.__setitem__(slice(None), np.take(lengths, order))
    )
    packs, _ = packing.create_packing_strategy(histogram, PACK_SIZE, "first_fit_shuffle")
    packed = packing.fill_packing_strategy(packs, sequences, PACK_SIZE, tokenizer.eos_id)
    np.save(tmp_path / "packed.npy", packed)
    expected_packs = GPTSFTPackedDataset(
        str(tmp_path / "packed.npy"),
        tokenizer,
        max_seq_length=PACK_SIZE,
        label_key="output",
        truncation_field="input",
        prompt_template="{input}{output}",
        **layout,
    )
    assert len(own) == len(expected_packs) < len(samples)
    for indices in ([0], [0, 1], list(range(len(own))), [0, -1]):
        expected = expected_packs.collate_fn([expected_packs[index] for index in indices])
        batch = own.collate_fn([own[index] for index in indices])
        assert batch.keys() == expected.keys() | set(ROW_KEYS)
        assert batch["token_count"] == expected["token_count"]
        for key in expected.keys() - {"token_count"}:
            assert batch[key].dtype == expected[key].dtype, key
            torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0, msg=key)
        bounds = batch["cu_seqlens"]
        assert (bounds[bounds >= 0] % (2 * context_parallel_size) == 0).all() or (
            context_parallel_size == 1
        )


def test_packed_rows_stand_where_their_token_is_predicted(
    tmp_path: Path, tokenizer: Any, records: Any
) -> None:
    nemo = nemo_dataset(tmp_path, records, tokenizer)
    cache = write_cache(tmp_path / "cache", nemo, tokenizer)
    for context_parallel_size in (1, 2):
        own = packed_dataset(cache, tokenizer, context_parallel_size=context_parallel_size)
        seen = []
        for number, packed in enumerate(own.indexed_dataset):
            batch = own.collate_fn([own[number]])
            batch |= scatter_rows(batch, batch["tokens"].shape[1])
            start, *ends = batch["cu_seqlens"][0].tolist()
            for index, end in zip(packed, ends, strict=False):
                sample = cache[index]
                inputs = torch.from_numpy(sample.tokens[:-1]).long()
                torch.testing.assert_close(batch["tokens"][0, start : start + len(inputs)], inputs)
                supervised = batch["loss_mask"][0, start:end].bool()
                for name in ("topk_ids", "topk_log_probs", "tail_log_probs"):
                    rows = batch[name][0, start:end]
                    np.testing.assert_array_equal(rows[supervised], getattr(sample, name))
                    assert (rows[~supervised] == (-1 if name == "topk_ids" else -torch.inf)).all()
                labels = batch["labels"][0, start:end][supervised]
                np.testing.assert_array_equal(labels, sample.tokens[sample.loss_mask.nonzero()[0]])
                seen.append(index)
                start = end
        assert sorted(seen) == list(range(len(cache))), "each sample in one pack"


def test_an_end_token_inside_a_sample_does_not_end_it(
    tmp_path: Path, tokenizer: Any, records: Any
) -> None:
    """A chat has an end token after every turn."""
    template = {"prompt_template": "Q: {input}</s></s> A: {output}"}
    nemo = nemo_dataset(tmp_path, records, tokenizer, **template)
    assert nemo[1]["input_ids"].count(tokenizer.eos_id) == 3
    cache = write_cache(tmp_path / "cache", nemo, tokenizer)
    own = packed_dataset(cache, tokenizer)
    batch = own.collate_fn([own[index] for index in range(len(own))])
    for index, packed in enumerate(own.indexed_dataset):
        lengths = [len(cache[number].tokens) - 1 for number in packed]
        ends = batch["cu_seqlens_unpadded"][index, : len(packed) + 1].tolist()
        assert ends == [0, *np.cumsum(lengths)]


def test_packs_follow_the_seed_and_read_lengths_alone(
    tmp_path: Path, tokenizer: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_kd.student import packing

    cache = write_cache(tmp_path / "cache", nemo_dataset(tmp_path, records, tokenizer), tokenizer)
    np.testing.assert_array_equal(cache.num_tokens(), [len(sample.tokens) for sample in cache])
    monkeypatch.setattr(packing, "_SAMPLES_PER_PACKING", 5)
    with monkeypatch.context() as patch:
        patch.setattr(TopKCache, "__getitem__", None)
        first, again, other = (
            list(packed_dataset(cache, tokenizer, seed=seed).indexed_dataset) for seed in (1, 1, 2)
        )
    assert first == again != other
    for packs in (first, other):
        assert sorted(chain(*packs)) == list(range(len(cache)))
        assert all(sum(cache.num_tokens()[pack] - 1) <= PACK_SIZE for pack in packs)
    epochs = packed_dataset(cache, tokenizer, max_num_samples=3 * len(first), seed=1)
    assert len(epochs) == 3 * len(first)
    tokens = [str(epochs[index]["input_ids"]) for index in range(len(epochs))]
    assert {tokens.count(pack) for pack in tokens} == {3}


def test_a_cpu_has_no_attention_within_packs() -> None:
    from omegaconf import OmegaConf

    from nemo_kd.nemo import cpu_backend

    config = OmegaConf.create({"data": {"train_ds": {"packed_sequence": True}}})
    with pytest.raises(ValueError, match="packed_sequence=false"):
        cpu_backend.prepare_model_config(config)


def test_packs_train(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """Through NeMo's training, but without cu_seqlens, which the attention of a CPU cannot take."""
    logs = tmp_path / "logs"
    run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], cache, cache, logs),
        "model.data.train_ds.packed_sequence=true",
        "model.data.train_ds.packed_sequence_return_cu_seqlen=false",
        "model.data.train_ds.micro_batch_size=1",
        "model.data.train_ds.max_seq_length=96",
    )
    curves = scalars(logs)
    assert len(curves["kd_loss"]) == 4
    assert curves["validation_loss"][1] < curves["validation_loss"][0]


def test_sample_fields_are_what_the_dataset_reads() -> None:
    assert set(Sample._fields) == {
        "tokens",
        "loss_mask",
        "topk_ids",
        "topk_log_probs",
        "tail_log_probs",
        "context_length",
    }
