"""The study's own arithmetic, and that docs/study.md shows the results of its runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache

ROOT = Path(__file__).parent.parent
V, K = 50, 12


@pytest.fixture(autouse=True)
def study_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("examples", "studies/kd_vs_sft"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def make_cache(path: Path, num_samples: int, k: int) -> TopKCache:
    """A raw cache of random rows whose entries are in no order."""
    rng = np.random.default_rng(1)
    manifest = Manifest(
        selection={"kind": "top_k", "k": k, "temperature": 1.0},
        vocab_size=V,
        tokenizer_fingerprint="tokenizer",
        teacher_fingerprint="teacher",
        sources=(),
        dataset={},
        num_samples=num_samples,
        samples_per_shard=2,
        codec="raw",
    )
    writer = CacheWriter.open(path, manifest)
    for shard in writer.claim_shards():
        with writer.shard(shard) as sink:
            for _ in manifest.shard_samples(shard):
                log_probs = np.log(rng.dirichlet(np.ones(V), size=6)).astype(np.float32)
                ids = np.argpartition(-log_probs, k - 1, axis=1)[:, :k]
                kept = np.take_along_axis(log_probs, ids, axis=1)
                tail = np.log1p(-np.exp(kept.astype(np.float64)).sum(1).clip(max=1 - 1e-9))
                tokens = rng.integers(0, V, 8)
                sink.add(tokens, np.arange(8) >= 2, 2, ids, kept, tail.astype(np.float32))
    return TopKCache.open(path)


def test_directories_whose_names_differ_after_a_dot_have_locks_of_their_own(tmp_path: Path):
    from steps import Steps

    rates = [Steps(tmp_path / f"lr-0.{digit}", {}) for digit in (1, 2)]
    assert len(list(tmp_path.glob("*.lock"))) == len(rates)
    with pytest.raises(SystemExit, match="another process is at work there"):
        Steps(tmp_path / "lr-0.1", {})


def test_after_a_step_that_failed_no_other_begins():
    import threading

    from steps import together

    begun, failed = [], threading.Event()

    def slow():
        assert failed.wait(10)

    def fail():
        failed.set()
        raise SystemExit("broken")

    def late():
        begun.append(True)

    def pause():
        threading.Event().wait(1)

    with pytest.raises(SystemExit, match="broken"):
        together([slow, fail, pause, pause, *[late] * 3])
    assert not begun


def test_a_completed_step_is_not_run_again_and_a_failed_one_shows_its_log(tmp_path, capsys):
    from steps import Steps

    script = tmp_path / "script.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(len(sys.argv) - 2)")
    out, trace = tmp_path / "out", tmp_path / "trace"
    for _ in range(2):
        Steps(out, {"size": 1}).run("step", script, str(trace))
    assert trace.read_text() == "x"
    for _ in range(2):
        with pytest.raises(SystemExit, match="other failed with exit code 1"):
            Steps(out, {"size": 1}).run("other", script, str(trace), "more")
    assert trace.read_text() == "xxx"
    Steps(out, {"size": 2}).run("step", script, str(trace))
    assert trace.read_text() == "xxxx", "other settings begin anew"


def test_a_cut_cache_is_what_a_smaller_k_would_have_stored(tmp_path, monkeypatch):
    import cut_cache

    source = make_cache(tmp_path / "source", 5, K)
    arguments = [str(tmp_path / "source"), str(tmp_path / "cut"), "--k=3"]
    monkeypatch.setattr(sys, "argv", ["cut_cache.py", *arguments])
    cut_cache.main()
    cut = TopKCache.open(tmp_path / "cut")
    assert cut.manifest.selection["k"] == 3
    assert cut.manifest.codec == "packed"
    assert len(cut) == 5
    for full, smaller in zip(source, cut, strict=True):
        np.testing.assert_array_equal(full.tokens, smaller.tokens)
        order = np.argsort(-full.topk_log_probs, axis=1)[:, :3]
        best = np.take_along_axis(full.topk_ids, order, axis=1)
        np.testing.assert_array_equal(np.sort(best), np.sort(smaller.topk_ids))
        mass = np.exp(smaller.topk_log_probs).sum(1) + np.exp(smaller.tail_log_probs)
        np.testing.assert_allclose(mass, 1, atol=5e-3)  # float16 and then packed


def test_a_cut_to_more_than_there_is_ends_with_a_message(tmp_path, monkeypatch, capsys):
    import cut_cache

    make_cache(tmp_path / "source", 2, K)
    arguments = [str(tmp_path / "source"), str(tmp_path / "cut"), f"--k={K + 1}"]
    monkeypatch.setattr(sys, "argv", ["cut_cache.py", *arguments])
    with pytest.raises(SystemExit):
        cut_cache.main()
    assert "expected top_k of --k or more" in capsys.readouterr().err


def test_measures_against_plain_formulas():
    """A model whose logits depend on the last token only, so that each measure is known."""
    import measure

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(V, V, generator=generator) * 2

    class Model:
        def __call__(self, input_ids):
            return type("Output", (), {"logits": logits[input_ids]})

    rng = np.random.default_rng(3)
    samples = []
    for length in (5, 9):
        mask = (np.arange(length) >= 2).astype(np.uint8)
        probabilities = rng.dirichlet(np.ones(V), size=int(mask.sum()))
        ids = np.argsort(-probabilities, axis=1)
        samples.append(
            Sample(
                rng.integers(0, V, length).astype(np.int32),
                mask,
                ids.astype(np.int32),
                np.log(np.take_along_axis(probabilities, ids, 1)).astype(np.float32),
                np.full(len(ids), -np.inf, np.float32),
                2,
            )
        )
    measures = measure.over_tokens(Model(), samples)
    ce, kl, agrees, confidence, correct = [], [], [], [], []
    for sample in samples:
        for row, t in enumerate(np.flatnonzero(sample.loss_mask)):
            q = logits[sample.tokens[t - 1]].double().softmax(0).numpy()
            p = np.zeros(V)
            p[sample.topk_ids[row]] = np.exp(sample.topk_log_probs[row].astype(np.float64))
            ce.append(-np.log(q[sample.tokens[t]]))
            kl.append((p * np.log(p / q)).sum())
            agrees.append(q.argmax() == p.argmax())
            confidence.append(q.max())
            correct.append(q.argmax() == sample.tokens[t])
    assert measures["tokens"] == 10
    assert measures["ce"] == pytest.approx(np.mean(ce), rel=1e-5)
    assert measures["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert measures["top1_agreement"] == pytest.approx(np.mean(agrees))
    bins = (np.array(confidence) * 15).astype(int)
    confidence, correct = np.array(confidence), np.array(correct)
    expected = sum(
        (bins == b).mean() * abs(correct[bins == b].mean() - confidence[bins == b].mean())
        for b in set(bins.tolist())
    )
    assert measures["ece"] == pytest.approx(expected, rel=1e-5)


def test_exact_match_looks_past_case_and_punctuation():
    from measure import normalised

    assert normalised("The  Answer, it is: 42!") == normalised("answer it is 42")
    assert normalised("Paris") != normalised("Barcelona")


def test_the_crossing_is_the_first_validation_that_passes_the_best_of_sft():
    import report

    def rows(*curves):
        return [
            {"curve": [[10 * (i + 1), value] for i, value in enumerate(values)]}
            for values in curves
        ]

    sft = rows((5, 3, 4), (5, 5, 4))
    assert report.crossing(sft, rows((5, 4, 3))) == (4, 20)
    assert report.crossing(sft, rows((9, 8, 7))) == (4, None)


def test_the_docs_hold_the_tables_of_the_committed_run():
    import report

    results = json.loads((ROOT / "docs/study/results.json").read_text())
    docs = (ROOT / "docs/study.md").read_text()
    for table in report.report(results).split("\n\n"):
        assert table.strip() in docs
