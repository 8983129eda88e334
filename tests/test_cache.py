"""The cache: what is written is what is read, and nothing half or wrong is read in silence."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_kd.cache import CacheWriter, Manifest, Sample, SourceFile, TopKCache
from nemo_kd.cache.manifest import (
    ShardRecord,
    fingerprint_file,
    read_record,
    record_bytes,
)

PAIRS = (
    "tokens",
    "loss_mask",
    "context_length",
    "topk_ids",
    "topk_log_probs",
    "tail_log_probs",
)
FORK = multiprocessing.get_context("fork")
# (prompt, answer) lengths: ordinary, no answer, no prompt but the first token, a single token
LENGTHS = ((5, 3), (4, 0), (1, 6), (1, 0), (7, 2))


def make_manifest(num_samples=5, samples_per_shard=2, vocab_size=50, k=3, **changes) -> Manifest:
    fields = {
        "selection": {"kind": "top_k", "k": k, "temperature": 1.0},
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": "tokenizer",
        "teacher_fingerprint": "teacher",
        "sources": (SourceFile(name="train.jsonl", size_bytes=9, xxh3_128="0123"),),
        "dataset": {"prompt_template": "{input} {output}", "max_seq_length": 64},
        "num_samples": num_samples,
        "samples_per_shard": samples_per_shard,
        "codec": "raw",
    }
    return Manifest(**fields | changes)


def make_sample(manifest: Manifest, number: int, prompt: int, answer: int) -> Sample:
    """Random rows that depend on the number alone, as a dump's depend on the sample alone."""
    rng = np.random.default_rng(number)
    k, num_tokens = manifest.selection["k"], prompt + answer
    ids = [rng.choice(manifest.vocab_size, k, replace=False) for _ in range(answer)]
    return Sample(
        tokens=rng.integers(0, manifest.vocab_size, num_tokens),
        loss_mask=(np.arange(num_tokens) >= prompt).astype(np.uint8),
        topk_ids=np.array(ids, np.int64).reshape(answer, k),
        topk_log_probs=-rng.exponential(5, (answer, k)).astype(np.float32),
        tail_log_probs=-rng.exponential(5, answer).astype(np.float32),
        context_length=prompt,
    )


def make_samples(manifest: Manifest, lengths=LENGTHS) -> list[Sample]:
    return [
        make_sample(manifest, number, *lengths[number % len(lengths)])
        for number in range(manifest.num_samples)
    ]


def write_shard(writer: CacheWriter, index: int, samples: list[Sample], error=None) -> None:
    """Write a shard, or raise `error` where it would be complete."""
    with writer.shard(index) as shard:
        for sample in samples:
            shard.add(**sample._asdict())
        if error is not None:
            raise error


def write(path, manifest: Manifest, samples: list[Sample]) -> None:
    writer = CacheWriter.open(path, manifest)
    for index in writer.missing_shards():
        numbers = manifest.shard_samples(index)
        write_shard(writer, index, samples[numbers.start : numbers.stop])


@pytest.fixture
def cache_path(tmp_path) -> Path:
    manifest = make_manifest()
    write(tmp_path / "cache", manifest, make_samples(manifest))
    return tmp_path / "cache"


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_equal(actual: Sample, expected: Sample) -> None:
    """Exact, but for log-probs, which are the nearest float16."""
    for name in ("tokens", "loss_mask", "topk_ids"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)
    for name in ("topk_log_probs", "tail_log_probs"):
        rounded = getattr(expected, name).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(getattr(actual, name), rounded, name)
    assert actual.context_length == expected.context_length
    dtypes = [array.dtype for array in actual[:5]]
    assert dtypes == [np.int32, np.uint8, np.int32, np.float32, np.float32]


# --- round trip


@settings(max_examples=30, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 3, 65_536, 65_537, 131_073, 262_144]),
    k=st.integers(1, 6),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=7),
    samples_per_shard=st.integers(1, 4),
)
def test_round_trip(tmp_path_factory, vocab_size, k, lengths, samples_per_shard):
    path = tmp_path_factory.mktemp("round-trip") / "cache"
    manifest = make_manifest(len(lengths), samples_per_shard, vocab_size, min(k, vocab_size))
    samples = make_samples(manifest, lengths)
    write(path, manifest, samples)
    cache = TopKCache.open(path)
    assert len(cache) == len(samples)
    assert cache.manifest == manifest
    for actual, expected in zip(cache, samples, strict=True):
        assert_equal(actual, expected)
    assert list(cache.verify()) == []


@pytest.mark.parametrize("vocab_size", [1, 2, 300, 65_536, 65_537])
def test_k_of_the_whole_vocabulary(tmp_path, vocab_size):
    manifest = make_manifest(1, 1, vocab_size, k=vocab_size)
    samples = make_samples(manifest, [(2, 2)])
    write(tmp_path, manifest, samples)
    assert_equal(TopKCache.open(tmp_path)[0], samples[0])


def test_empty_sample(tmp_path):
    manifest = make_manifest(1)
    write(tmp_path, manifest, [make_sample(manifest, 0, 0, 0)])
    sample = TopKCache.open(tmp_path)[0]
    assert sample.tokens.shape == (0,)
    assert sample.topk_ids.shape == (0, 3)


def test_log_probs_keep_infinity_and_stay_finite(tmp_path):
    manifest = make_manifest(1, k=6)
    values = np.array([[0.0, -1e-9, -65_504, -65_519, -1e30, -np.inf]], np.float32)
    sample = make_sample(manifest, 0, 2, 1)._replace(
        topk_log_probs=values, tail_log_probs=np.array([-np.inf], np.float32)
    )
    write(tmp_path, manifest, [sample])
    read = TopKCache.open(tmp_path)[0]
    np.testing.assert_array_equal(read.topk_log_probs, [[0, 0, -65_504, -65_504, -65_504, -np.inf]])
    np.testing.assert_array_equal(read.tail_log_probs, [-np.inf])


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [(3, 0)], [(0, 0)]], ids=["ordinary", "no answers", "no tokens"]
)
def test_megatron_opens_every_pair(tmp_path, lengths):
    manifest = make_manifest()
    samples = make_samples(manifest, lengths)
    write(tmp_path, manifest, samples)
    for index in range(manifest.num_shards):
        for name in PAIRS:
            pair = IndexedDataset(str(tmp_path / f"shard-{index:05d}" / name))
            numbers = manifest.shard_samples(index)
            assert len(pair) == len(numbers)
            np.testing.assert_array_equal(pair.document_indices, range(len(numbers) + 1))
            for position, number in enumerate(numbers):
                expected = np.asarray(getattr(samples[number], name)).ravel()
                stored = pair[position]
                if name.endswith("log_probs"):
                    stored = stored.view(np.float16)
                    expected = expected.astype(np.float16)
                np.testing.assert_array_equal(stored, expected)


# --- writing


def fill_and_die(path, manifest, samples, shard_to_die_in):
    writer = CacheWriter.open(path, manifest)
    for index in writer.missing_shards():
        with writer.shard(index) as shard:
            for number in manifest.shard_samples(index):
                shard.add(**samples[number]._asdict())
                if index == shard_to_die_in:
                    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_restarted_gives_the_same_bytes(tmp_path):
    manifest = make_manifest()
    samples = make_samples(manifest)
    write(tmp_path / "undisturbed", manifest, samples)
    for shard_to_die_in in (0, 1, 2):
        process = FORK.Process(
            target=fill_and_die, args=(tmp_path / "killed", manifest, samples, shard_to_die_in)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert any(name.startswith(".tmp") for name in os.listdir(tmp_path / "killed"))
        with pytest.raises(ValueError, match=rf"{3 - shard_to_die_in} of 3 shards are missing"):
            TopKCache.open(tmp_path / "killed")
    write(tmp_path / "killed", manifest, samples)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_two_processes_fill_one_cache(tmp_path):
    manifest = make_manifest(num_samples=60)
    samples = make_samples(manifest)
    write(tmp_path / "alone", manifest, samples)
    processes = [
        FORK.Process(target=write, args=(tmp_path / "shared", manifest, samples)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_second_finisher_is_dropped(tmp_path):
    manifest = make_manifest(1)
    sample = make_sample(manifest, 0, 2, 2)
    first, second = (CacheWriter.open(tmp_path, manifest) for _ in range(2))
    with first.shard(0) as one:
        one.add(**sample._asdict())
        with second.shard(0) as other:
            other.add(**sample._asdict())
        before = contents(tmp_path / "shard-00000")
    assert contents(tmp_path / "shard-00000") == before
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-00000"]


def test_missing_shards(tmp_path):
    manifest = make_manifest(10)
    writer = CacheWriter.open(tmp_path, manifest)
    write_shard(writer, 2, make_samples(manifest)[4:6])
    assert writer.missing_shards() == [0, 1, 3, 4]
    assert writer.missing_shards([4, 2, 1, 4]) == [1, 4]
    with pytest.raises(ValueError, match="expected a shard from 0 to 4, got 5"):
        writer.missing_shards([5])


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
def test_nothing_is_left_of_an_interrupted_shard(tmp_path, error):
    manifest = make_manifest(1)
    writer = CacheWriter.open(tmp_path, manifest)
    with pytest.raises(type(error)):
        write_shard(writer, 0, [make_sample(manifest, 0, 2, 2)], error)
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_disk_full_while_finishing(tmp_path, monkeypatch):
    manifest = make_manifest(1)
    writer = CacheWriter.open(tmp_path, manifest)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_shard(writer, 0, [make_sample(manifest, 0, 2, 2)])
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_writer_elsewhere_keeps_its_temporary_shard(tmp_path):
    manifest = make_manifest(1)
    sample = make_sample(manifest, 0, 2, 2)
    other_host = tmp_path / ".tmp+another-host-1+1+0"
    other_host.mkdir()
    with CacheWriter.open(tmp_path, manifest).shard(0) as shard:
        CacheWriter.open(tmp_path, manifest)
        shard.add(**sample._asdict())
    assert_equal(TopKCache.open(tmp_path)[0], sample)
    assert other_host.exists()


@pytest.mark.parametrize("num_added", [0, 1, 3])
def test_wrong_number_of_samples(tmp_path, num_added):
    manifest = make_manifest(4)
    writer = CacheWriter.open(tmp_path, manifest)
    message = "shard 1 holds samples 2 to 3: expected 2 samples, got (0|1|one more)"
    with pytest.raises(ValueError, match=message):
        write_shard(writer, 1, [make_sample(manifest, 0, 2, 2)] * num_added)
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_another_manifest_is_refused(cache_path):
    before = contents(cache_path)
    other = make_manifest(k=4, vocab_size=51, dataset={"max_seq_length": 64, "chat": True})
    with pytest.raises(ValueError) as error:
        CacheWriter.open(cache_path, other)
    for part in (
        "selection.k: 3 against 4",
        "vocab_size: 50 against 51",
        "dataset.chat: 'nothing' against True",
        "dataset.prompt_template: '{input} {output}' against 'nothing'",
        "Delete it or choose another cache.path",
    ):
        assert part in str(error.value)
    assert contents(cache_path) == before


def open_and_report(path, manifest, barrier, opened):
    barrier.wait()
    with contextlib.suppress(ValueError):
        CacheWriter.open(path, manifest)
        opened.put(manifest.selection["k"])


def test_of_different_manifests_at_once_one_wins(tmp_path):
    barrier, opened = FORK.Barrier(6), FORK.SimpleQueue()
    processes = [
        FORK.Process(
            target=open_and_report, args=(tmp_path, make_manifest(k=k + 1), barrier, opened)
        )
        for k in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert opened.get() == TopKCache(tmp_path).manifest.selection["k"]
    assert opened.empty()


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    manifest = make_manifest()
    write(tmp_path, manifest, make_samples(manifest))
    assert len(TopKCache.open(tmp_path)) == 5


def test_an_equal_manifest_spelled_otherwise_is_the_same_cache(tmp_path):
    manifest = make_manifest(2, 1)
    samples = make_samples(manifest)
    selection = {"temperature": 1, "k": 3, "kind": "top_k"}
    write_shard(CacheWriter.open(tmp_path, manifest), 0, samples[:1])
    write(tmp_path, make_manifest(2, 1, selection=selection), samples)
    assert len(TopKCache.open(tmp_path)) == 2


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"an empty directory or a cache, found thesis\.tex"):
        CacheWriter.open(tmp_path, make_manifest())
    with pytest.raises(ValueError, match=r"a directory for the cache, found the file .*tex"):
        CacheWriter.open(tmp_path / "thesis.tex", make_manifest())
    assert os.listdir(tmp_path) == ["thesis.tex"]


ROW = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(4, np.float32)}, r"tokens: expected integer \[4\], got float32 \[4\]"),
        ({"tokens": np.zeros((4, 1), np.int64)}, r"tokens: expected integer \[4\], got int64"),
        ({"tokens": np.full(4, 50)}, r"tokens: expected ids from 0 to 49 .*got 50"),
        ({"loss_mask": np.zeros(3, np.uint8)}, r"loss_mask: expected integer \[4\], got uint8 \[3"),
        ({"loss_mask": np.array([0, 0, 1, 2])}, r"loss_mask: expected zeros and ones, got \[0 1 2"),
        ({"loss_mask": np.array([1, 0, 0, 1])}, "loss_mask: expected 0 at the first token"),
        ({"loss_mask": np.array([0, 1, 1, 1])}, r"topk_ids: expected integer \[3, 3\], got int64"),
        ({"context_length": 5}, "context_length: expected 0 to 4 tokens, got 5"),
        ({"context_length": -1}, "context_length: expected 0 to 4 tokens, got -1"),
        ({"topk_ids": np.full((2, 3), 50)}, r"topk_ids: expected ids from 0 to 49 .*got 50"),
        ({"topk_ids": np.full((2, 3), -1)}, r"topk_ids: expected ids from 0 to 49 .*got -1"),
        ({"topk_ids": np.array([[1, 2, 3], [7, 5, 7]])}, "each id at most once a row, got 7 twice"),
        ({"topk_ids": np.zeros((2, 4), int)}, r"expected integer \[2, 3\], got int64 \[2, 4\]"),
        ({"topk_log_probs": ROW.astype(int)}, r"topk_log_probs: expected float \[2, 3\], got int"),
        (
            {"topk_log_probs": ROW * np.nan},
            "topk_log_probs: expected log-probs, at most 0, got nan",
        ),
        ({"topk_log_probs": ROW + 7}, r"topk_log_probs: expected log-probs, at most 0, got 7\.0"),
        ({"tail_log_probs": ROW}, r"tail_log_probs: expected float \[2\], got float32 \[2, 3\]"),
        ({"tail_log_probs": ROW[0, :2] + np.inf}, "tail_log_probs: expected log-probs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_sample(tmp_path, change, message):
    manifest = make_manifest(1)
    good = make_sample(manifest, 0, 2, 2)
    with CacheWriter.open(tmp_path, manifest).shard(0) as shard:
        with pytest.raises(ValueError, match=f"sample 0: .*{message}"):
            shard.add(**good._asdict() | change)
        shard.add(**good._asdict())
    assert_equal(TopKCache.open(tmp_path)[0], good)


# --- the manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "50"}, "vocab_size: expected int, got '50'"),
        ({"num_samples": True}, "num_samples: expected int, got True"),
        ({"num_samples": 0}, "num_samples: expected an integer from 1"),
        ({"sources": []}, r"sources: expected tuple, got \[\]"),
        (
            {"codec": "zip"},
            r"codec: expected one that this release knows \(raw, packed\), got 'zip'",
        ),
        ({"selection": {"kind": "magic"}}, "selection.kind: expected one .*top_k.* got 'magic'"),
        ({"selection": {"kind": "sample", "temperature": 1}}, "selection.num_draws: expected an"),
        (
            {"selection": {"kind": "top_p", "k": 9, "p": 1.5, "temperature": 1}},
            "selection.p: expected a number above 0, at most 1, got 1.5",
        ),
        ({"k": 51}, "selection.k: expected an integer from 1 to 50, got 51"),
        (
            {"selection": {"kind": "top_k", "k": 1, "temperature": 0}},
            "selection.temperature: expected a number > 0, got 0",
        ),
    ],
)
def test_bad_manifest(change, message):
    with pytest.raises(ValueError, match=message):
        make_manifest(**change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m | {"format_version": 3}, r"format version 3; this release reads 1 and 2"),
        (lambda m: m | {"extra": 1}, "unknown key extra"),
        (lambda m: {k: v for k, v in m.items() if k != "codec"}, "missing key codec"),
        (lambda m: m | {"sources": [{"name": "a"}]}, r"missing key sources\.0\.size_bytes, "),
        (lambda m: m | {"vocab_size": None}, "vocab_size: expected int, got None"),
        (lambda m: m | {"value_type": "float8"}, "value_type: expected .*float16.* got 'float8'"),
        (lambda m: m | {"value_type": "count"}, "value_type: expected .*float16.* got 'count'"),
        (lambda m: m | {"vocab_size": 49}, "does not match its own checksum"),
        (lambda m: [m], "expected a JSON object, got list"),
    ],
)
def test_edited_manifest(cache_path, edit, message):
    path = cache_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2, sort_keys=True))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        TopKCache.open(cache_path)


def test_manifest_bytes_depend_on_content_alone():
    manifest = make_manifest()
    shuffled = dict(reversed(manifest.dataset.items()))
    again = dataclasses.replace(manifest, dataset=shuffled)
    assert record_bytes(manifest) == record_bytes(again)
    assert record_bytes(manifest).endswith(b"}\n")
    assert make_manifest(dataset={"a": (1, 2)}) == make_manifest(dataset={"a": [1, 2]})


EARLIER = """\
{
  "codec": "raw",
  "dataset": {
    "max_seq_length": 64,
    "prompt_template": "{input} {output}"
  },
  "format_version": 1,
  "num_samples": 5,
  "samples_per_shard": 2,
  "selection": {
    "k": 3,
    "kind": "top_k",
    "temperature": 1.0
  },
  "sources": [
    {
      "name": "train.jsonl",
      "size_bytes": 9,
      "xxh3_128": "0123"
    }
  ],
  "teacher_fingerprint": "teacher",
  "tokenizer_fingerprint": "tokenizer",
  "value_type": "float16",
  "vocab_size": 50,
  "xxh3_128": "bd7e5abc3b17f79131d8fdd97ece7f7e"
}
"""


def test_a_manifest_of_an_earlier_release(tmp_path):
    """value_type was a setting once. The bytes are the same, and so is the fingerprint."""
    path = tmp_path / "manifest.json"
    path.write_text(EARLIER)
    manifest = read_record(Manifest, path)
    assert manifest == make_manifest(format_version=1)
    assert record_bytes(manifest).decode() == EARLIER
    assert manifest.fingerprint == json.loads(EARLIER)["xxh3_128"]
    assert make_manifest(codec="packed").value_type == "12 and 5 bits"


def test_fingerprint_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    pieces = []
    fingerprint = fingerprint_file(path, pieces.append)
    assert (fingerprint.name, fingerprint.size_bytes) == ("train.jsonl", 3_000_000)
    assert sum(pieces) == 3_000_000
    path.write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint_file(path).xxh3_128 != fingerprint.xxh3_128


# --- reading


def test_index(cache_path):
    cache = TopKCache.open(str(cache_path))
    assert_equal(cache[-1], cache[4])
    assert_equal(cache[np.int64(-5)], cache[0])
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"sample {index} of a cache of 5 samples"):
            cache[index]


def test_samples_are_the_callers_own(cache_path):
    cache = TopKCache.open(cache_path)
    for array in cache[0][:5]:
        array[...] = 1
    assert_equal(cache[0], make_samples(make_manifest())[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(cache_path, start):
    cache = TopKCache.open(cache_path)
    cache[0]  # maps a shard, which must not travel
    assert len(pickle.dumps(cache)) < 500
    loader = torch.utils.data.DataLoader(
        cache, batch_size=None, num_workers=2, multiprocessing_context=start
    )
    for actual, expected in zip(loader, cache, strict=True):
        for name in ("tokens", "loss_mask", "topk_ids", "topk_log_probs", "tail_log_probs"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files through /proc")
def test_few_open_files(tmp_path):
    manifest = make_manifest(num_samples=60, samples_per_shard=1)
    write(tmp_path, manifest, make_samples(manifest))
    cache = TopKCache.open(tmp_path)
    num_before = len(os.listdir("/proc/self/fd"))
    list(cache)
    assert len(os.listdir("/proc/self/fd")) - num_before <= 16 * (2 * len(PAIRS) + 1)


def test_not_a_cache(tmp_path):
    expected = r"expected a cache directory with manifest\.json, found "
    with pytest.raises(ValueError, match=expected + "an empty directory"):
        TopKCache.open(tmp_path)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=expected + r"a directory with train\.jsonl"):
        TopKCache.open(tmp_path)
    with pytest.raises(ValueError, match=expected + "a file"):
        TopKCache.open(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=expected + "nothing"):
        TopKCache.open(tmp_path / "nowhere")


def test_missing_shards_are_refused(cache_path):
    shutil.rmtree(cache_path / "shard-00001")
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing \(1\); run the dump again"):
        TopKCache.open(cache_path)
    assert "shard-00001" in "".join(TopKCache(cache_path).verify())


def test_shard_of_another_cache_is_refused(cache_path, tmp_path):
    other = make_manifest(teacher_fingerprint="other")
    write(tmp_path / "other", other, make_samples(other))
    shutil.rmtree(cache_path / "shard-00001")
    shutil.copytree(tmp_path / "other" / "shard-00001", cache_path / "shard-00001")
    with pytest.raises(ValueError, match="the shard belongs to another cache"):
        TopKCache.open(cache_path)


def test_swapped_shards_are_refused(cache_path):
    os.rename(cache_path / "shard-00000", cache_path / "shard")
    os.rename(cache_path / "shard-00001", cache_path / "shard-00000")
    os.rename(cache_path / "shard", cache_path / "shard-00001")
    with pytest.raises(ValueError, match=r"shard-00000/shard\.json: index: expected 0"):
        TopKCache.open(cache_path)


def faults(path: Path) -> list[str]:
    try:
        return list(TopKCache(path).verify())
    except ValueError as error:  # the manifest itself
        return [str(error)]


def test_every_truncated_file_is_refused_and_named(cache_path):
    for name, whole in contents(cache_path).items():
        for size in {0, len(whole) // 2, len(whole) - 1}:
            (cache_path / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=name):
                TopKCache.open(cache_path)
            assert [name in fault for fault in faults(cache_path)] == [True]
        (cache_path / name).unlink()
        with pytest.raises(ValueError, match=name):
            TopKCache.open(cache_path)
        (cache_path / name).write_bytes(whole)
    assert faults(cache_path) == []


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_flipped_bit_is_named(cache_path, data):
    files = contents(cache_path)
    name = data.draw(st.sampled_from(sorted(files)))
    position = data.draw(st.integers(0, len(files[name]) - 1))
    damaged = bytearray(files[name])
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (cache_path / name).write_bytes(damaged)
    try:
        assert [name in fault for fault in faults(cache_path)] == [True]
        # The numbers of the documents, at the end of an .idx, are read by Megatron only.
        num_samples = 1 if "00002" in name else 2
        if not (name.endswith(".idx") and position >= 34 + 12 * num_samples):
            with pytest.raises(ValueError, match=name.split("/")[0]) as error:
                list(TopKCache.open(cache_path))
            assert Path(name).name in str(error.value)
    finally:
        (cache_path / name).write_bytes(files[name])


def as_version_1(path: Path) -> None:
    """Turn a cache into what the release before the checksums wrote of the same samples."""
    manifest = dataclasses.replace(read_record(Manifest, path / "manifest.json"), format_version=1)
    (path / "manifest.json").write_bytes(record_bytes(manifest))
    for record_path in path.glob("*/shard.json"):
        (record_path.parent / "checksums.xxh3").unlink()
        record = read_record(ShardRecord, record_path)
        files = tuple(file for file in record.files if file.name != "checksums.xxh3")
        record = dataclasses.replace(
            record, files=files, format_version=1, manifest_fingerprint=manifest.fingerprint
        )
        record_path.write_bytes(record_bytes(record))


def test_version_1_is_still_read_and_never_written(cache_path):
    samples = list(TopKCache.open(cache_path))
    as_version_1(cache_path)
    assert faults(cache_path) == []
    for actual, expected in zip(TopKCache.open(cache_path), samples, strict=True):
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"other settings .*: format_version: 1 against 2"):
        CacheWriter.open(cache_path, make_manifest())


def test_pairs_of_version_1_that_contradict_each_other_are_refused(cache_path):
    as_version_1(cache_path)
    path = cache_path / "shard-00000" / "loss_mask.bin"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00000: sample 0: .*; run nemo-kd verify"):
        TopKCache.open(cache_path)[0]


def test_a_shard_of_another_version_is_refused(cache_path, tmp_path):
    as_version_1(shutil.copytree(cache_path, tmp_path / "old"))
    shutil.copy(tmp_path / "old/shard-00000/shard.json", cache_path / "shard-00000")
    with pytest.raises(ValueError, match=r"shard\.json: format_version: expected 2 by .* got 1"):
        TopKCache.open(cache_path)


def test_the_snippet_of_the_format_page_runs(cache_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(cache_path.parent)  # it reads "cache"
    exec(compile(snippet, "docs/format.md", "exec"), namespace := {})
    first = TopKCache.open(cache_path)[0]
    np.testing.assert_array_equal(namespace["topk_ids"], first.topk_ids)
    np.testing.assert_array_equal(namespace["topk_log_probs"], first.topk_log_probs)
    assert "predicts token" in capsys.readouterr().out
