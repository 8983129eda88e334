"""Codec packed: ids exact, log-probs that the loss cannot tell from float32, few bytes."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from test_cache import contents, make_manifest, write

from nemo_kd.cache import Manifest, Sample, TopKCache
from nemo_kd.cache.codec import codec_for
from nemo_kd.loss import KDLossConfig, vocab_parallel_kd_sft_loss

SELECTIONS = {
    "top_k": {"kind": "top_k", "k": 20, "temperature": 1.0},
    "top_p": {"kind": "top_p", "k": 40, "p": 0.9, "temperature": 1.0},
    "sample": {"kind": "sample", "num_draws": 50, "seed": 1, "temperature": 1.0},
}
VOCAB_SIZES = (1, 2, 50, 65_536, 65_537, 131_073, 262_144)
VALUES = st.one_of(
    st.floats(-30, 0, width=32), st.just(-np.inf), st.just(0.0), st.floats(-1e4, -30, width=32)
)


def manifest_of(kind: str, codec: str, vocab_size: int, **selection) -> Manifest:
    selection = SELECTIONS[kind] | selection
    if "k" in selection:
        selection["k"] = min(selection["k"], vocab_size)
    return make_manifest(1, 1, vocab_size, selection=selection, codec=codec)


def random_rows(rng, manifest: Manifest, num_rows: int):
    """Rows of all lengths that the selection allows, descending, padded to its longest."""
    k = manifest.max_entries
    ids = np.full((num_rows, k), -1)
    log_probs = np.full((num_rows, k), -np.inf, np.float32)
    tails = np.full(num_rows, -np.inf, np.float32)
    for row in range(num_rows):
        if manifest.selection["kind"] == "sample":
            num_draws = manifest.selection["num_draws"]
            drawn = rng.choice(rng.integers(manifest.vocab_size, size=k), num_draws)
            kept, counts = np.unique(drawn, return_counts=True)
            values = np.log(counts / num_draws)
        else:
            n = int(rng.integers(1, k + 1)) if manifest.ragged else k
            kept = rng.choice(manifest.vocab_size, n, replace=False)
            values = -np.sort(rng.exponential(4, n))
            tails[row] = -rng.exponential(4)
        ids[row, : kept.size], log_probs[row, : kept.size] = kept, values
    return ids, log_probs, tails


def write_one_sample(path, manifest, num_rows, seed=0):
    rows = random_rows(np.random.default_rng(seed), manifest, num_rows)
    tokens = np.zeros(num_rows + 1, np.int64)
    sample = Sample(tokens, np.arange(num_rows + 1) > 0, *rows, 1)
    write(path, manifest, [sample])
    return sample


def by_id(ids, log_probs):
    """Pads last, entries by ascending id."""
    order = np.argsort(np.where(ids < 0, 2**31, ids), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)


@pytest.mark.parametrize("codec", ["raw", "packed"])
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_rows_round_trip_through_a_cache(tmp_path, codec, kind, vocab_size, num_rows):
    manifest = manifest_of(kind, codec, vocab_size)
    sample = write_one_sample(tmp_path, manifest, num_rows, seed=num_rows)
    ids, log_probs, tails = sample.topk_ids, sample.topk_log_probs, sample.tail_log_probs
    cache = TopKCache.open(tmp_path)
    assert list(cache.verify()) == []
    read = cache[0]
    longest = (ids >= 0).sum(axis=1).max(initial=1) if manifest.ragged else manifest.max_entries
    assert read.topk_ids.shape == read.topk_log_probs.shape == (num_rows, longest)
    assert [array.dtype for array in read[2:5]] == [np.int32, np.float32, np.float32]
    expected_ids, expected = by_id(ids, log_probs)
    actual_ids, actual = by_id(read.topk_ids, read.topk_log_probs)
    np.testing.assert_array_equal(actual_ids, expected_ids[:, :longest])
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected[:, :longest]))
    np.testing.assert_array_equal(read.tail_log_probs, tails.astype(np.float16))
    if codec == "packed" and kind == "sample":
        np.testing.assert_array_equal(actual, expected[:, :longest])  # a count is a count
    elif codec == "raw":
        np.testing.assert_array_equal(actual, expected[:, :longest].astype(np.float16))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=60), ragged=st.booleans())
def test_log_probs_come_back_near(values, ragged):
    """The 10 largest within 2^-9 of themselves, the others within a 60th of their range."""
    manifest = manifest_of("top_p" if ragged else "top_k", "packed", 100, k=len(values))
    codec = codec_for(manifest)
    log_probs = np.array([values], np.float32)
    ids = np.arange(len(values))[None]
    arrays = codec.encode(ids, log_probs, np.zeros(1, np.float32))
    actual = codec.decode(arrays, 1)[1][0]
    expected = log_probs[0]
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    expected, actual = np.maximum(expected[finite], -2040), actual[finite]
    if expected.size == 0:
        return
    fine = 2**-13 + np.abs(expected) * 2**-8  # half a step of 12 bits, and room for rounding
    order = np.argsort(-expected, kind="stable")
    error = np.abs(actual - expected)
    assert (error <= fine)[order[:10]].all()
    others = order[10:]
    if others.size:
        span = expected[order[9]] - expected.min()
        assert (error[others] <= span / 60 + 2 * fine.max()).all()


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_megatron_opens_every_pair(tmp_path, kind, num_rows):
    write_one_sample(tmp_path, manifest_of(kind, "packed", 50), num_rows)
    names = {path.stem for path in (tmp_path / "shard-00000").glob("*.bin")}
    lengths = {"row_lengths"} if kind != "top_k" else set()
    assert names == {"tokens", "loss_mask", "context_length", "packed_rows"} | lengths
    for name in names:
        pair = IndexedDataset(str(tmp_path / "shard-00000" / name))
        stored = (tmp_path / "shard-00000" / f"{name}.bin").read_bytes()
        assert len(pair) == 1
        assert pair[0].tobytes() == (stored if pair[0].size else b"")


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_damaged_file_is_named(tmp_path, data):
    """Flip a bit or cut the end, in any file of a packed, ragged cache."""
    if not (tmp_path / "manifest.json").exists():
        write_one_sample(tmp_path, manifest_of("top_p", "packed", 50), 5)
    files = contents(tmp_path)
    name = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[name])
    position = data.draw(st.integers(0, len(damaged) - 1))
    if data.draw(st.booleans(), label="cut"):
        del damaged[position:]
    else:
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / name).write_bytes(damaged)
    try:
        try:
            faults = list(TopKCache(tmp_path).verify())
        except ValueError as error:  # the manifest itself
            faults = [str(error)]
        assert [name in fault for fault in faults] == [True]
        with contextlib.suppress(ValueError):
            assert len(TopKCache.open(tmp_path)[0].tokens) == 6
    finally:
        (tmp_path / name).write_bytes(files[name])


@pytest.mark.parametrize("length", [1, 9, 10, 11, 100, 131_073])
def test_k_of_the_whole_vocabulary(length):
    codec = codec_for(manifest_of("top_k", "packed", length, k=length))
    ids = np.random.default_rng(0).permutation(length)[None]
    log_probs = np.full((1, length), -np.log(length), np.float32)
    arrays = codec.encode(ids, log_probs, np.full(1, -np.inf, np.float32))
    read_ids, read, tails = codec.decode(arrays, 1)
    np.testing.assert_array_equal(read_ids[0], np.arange(length))
    np.testing.assert_allclose(read, log_probs, rtol=2**-8)
    assert tails == -np.inf


def test_rows_without_anything_finite():
    codec = codec_for(manifest_of("top_k", "packed", 50, k=30))
    ids = np.arange(30)[None]
    nothing = np.full((1, 30), -np.inf, np.float32)
    assert np.isneginf(codec.decode(codec.encode(ids, nothing, nothing[0, :1]), 1)[1]).all()


def test_empty_rows_among_ragged_ones():
    codec = codec_for(manifest_of("top_p", "packed", 50))
    ids = np.array([[-1, -1], [3, 9], [-1, -1], [7, -1], [-1, -1]])
    log_probs = np.where(ids < 0, -np.inf, -1).astype(np.float32)
    arrays = codec.encode(ids, log_probs, np.zeros(5, np.float32))
    read_ids, read, _ = codec.decode(arrays, 5)
    np.testing.assert_array_equal(read_ids, ids)
    np.testing.assert_array_equal(read, log_probs)


@pytest.mark.parametrize(
    ("vocab_size", "most_bytes"), [(128_256, 245), (49_152, 220)], ids=["128k", "49k"]
)
def test_bytes_a_supervised_token(tmp_path, vocab_size, most_bytes):
    """Uniformly random ids are the worst: 146 bytes is what they carry at V = 128,256."""
    rng = np.random.default_rng(0)
    manifest = make_manifest(4, 4, vocab_size, k=100, codec="packed")
    num_rows = 64
    samples = []
    for _ in range(4):
        ids = np.array([rng.choice(vocab_size, 100, replace=False) for _ in range(num_rows)])
        log_probs = -rng.exponential(4, ids.shape).astype(np.float32)
        tokens, mask = np.zeros(num_rows + 1, np.int32), np.arange(num_rows + 1) > 0
        samples.append(Sample(tokens, mask, ids, log_probs, log_probs[:, 0], 1))
    write(tmp_path, manifest, samples)
    rows = {name: data for name, data in contents(tmp_path).items() if "rows" in name}
    assert len(rows) == 2  # .bin and .idx
    assert sum(map(len, rows.values())) / (4 * num_rows) <= most_bytes


OBJECTIVES = {
    "renormalize": {"tail": "renormalize"},
    "bucket": {"tail": "bucket"},
    "label": {"tail": "label"},
    "drop": {"tail": "drop"},
    "reverse": {"tail": "renormalize", "divergence": "reverse_kl"},
    "reverse, bucket": {"tail": "bucket", "divergence": "reverse_kl"},
    "jsd": {"tail": "bucket", "divergence": "jsd"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_cannot_tell(objective):
    """A student at a KL of about 0.1, closer than distilled ones come: loss 0.2%, gradient 1%."""
    generator = torch.Generator().manual_seed(0)
    num_rows, vocab_size, k = 400, 2000, 100
    # Sorted, SmolLM2's logits fall about like this, and rows differ in how sure they are.
    sharpness = torch.rand(num_rows, 1, generator=generator) * 2 + 0.7
    teacher = -sharpness * torch.arange(1, vocab_size + 1).log()
    teacher = teacher.gather(1, torch.rand(teacher.shape, generator=generator).argsort(1))
    student = teacher + 0.7 * torch.randn(teacher.shape, generator=generator)
    labels = torch.multinomial(teacher.softmax(-1), 1, generator=generator)[:, 0]
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    tails = teacher.log_softmax(-1).scatter(1, ids, -torch.inf).logsumexp(-1)
    codec = codec_for(manifest_of("top_k", "packed", vocab_size, k=k))
    arrays = codec.encode(ids.numpy(), log_probs.numpy(), tails.numpy())
    packed = [torch.from_numpy(array) for array in codec.decode(arrays, num_rows)]
    config = KDLossConfig(sft_loss_weight=0.0, **OBJECTIVES[objective])

    def loss_and_gradient(topk_ids, topk_log_probs, tail_log_probs):
        logits = student.clone().requires_grad_()
        loss = vocab_parallel_kd_sft_loss(
            logits, labels, topk_log_probs, topk_ids, tail_log_probs, config=config
        ).loss.sum()
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    loss, gradient = loss_and_gradient(ids, log_probs, tails)
    packed_loss, packed_gradient = loss_and_gradient(*packed)
    assert 0.01 < loss / num_rows < 1.0  # label and drop counts what the tail would say
    assert abs(packed_loss - loss) / loss < 0.002
    assert (packed_gradient - gradient).norm() / gradient.norm() < 0.01


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(SELECTIONS)),
    name=st.sampled_from(["raw", "packed"]),
)
def test_damaged_bytes_are_refused_or_decode_to_ids_of_the_vocabulary(data, kind, name):
    manifest = manifest_of(kind, name, 50)
    codec = codec_for(manifest)
    arrays = codec.encode(*random_rows(np.random.default_rng(0), manifest, 6))
    name = data.draw(st.sampled_from(sorted(arrays)))
    damaged = arrays[name].astype(codec.pair_dtypes[name])
    raw = bytearray(damaged.tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2, 0]))]
    whole = len(raw) // damaged.itemsize * damaged.itemsize
    arrays[name] = np.frombuffer(bytes(raw[:whole]), damaged.dtype)
    try:
        ids, log_probs, tails = codec.decode(arrays, 6)
    except ValueError:
        return
    assert len(ids) == len(log_probs) == len(tails) == 6
    assert -1 <= ids.min() <= ids.max() < 50
    assert not np.isnan(log_probs).any()
    assert not np.isnan(tails).any()
