"""Rounds of student rollouts: the chain of the real commands, interrupted and continued."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import EXAMPLES, MAX_SEQ_LENGTH, PROMPT, run_example
from test_hosts import cache  # noqa: F401

from nemo_kd.cache import TopKCache

ROUNDS = "rounds.py"


def arguments(models: dict[str, Path], prompts: Path, out: Path, heldout: Path) -> list[str]:
    return [
        f"teacher={models['untied']}",
        f"student={models['tied']}",
        f"prompts=[{prompts}]",
        f"output={out}",
        "rounds=1",
        "device=cpu",
        f"heldout_caches=[{heldout}]",
        f"sft.caches=[{heldout}]",
        f"+data.prompt_template='{PROMPT}'",
        f"+data.max_seq_length={MAX_SEQ_LENGTH}",
        "+generate.model.dtype=float32",
        "+generate.sampling.max_tokens=6",
        "+generate.sampling.n=2",
        "+filter.filters=[duplicates]",
        "+dump.selection.k=8",
        f"+train.model.seq_length={MAX_SEQ_LENGTH}",
        "+train.train.train_iters=2",
        "+train.train.global_batch_size=4",
        "+train.knowledge_distillation.divergence=reverse_kl",
        "+train.knowledge_distillation.tail=bucket",
        "+train.dataset.num_workers=0",
    ]


def test_rounds(
    wide_llamas: dict[str, Path],
    jsonl: Path,
    cache: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A round is what its commands make; a second round begins with the student of the first."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "rounds"
    short = [line for line in jsonl.read_text().splitlines() if len(line) < 120][:4]
    prompts.write_text("".join(f"{line}\n" for line in short))
    given = arguments(wide_llamas, prompts, out, cache)
    output = run_example(ROUNDS, *given, timeout=240)
    assert "| 1 | " in output, output[-3000:]
    rollouts = TopKCache.open(out / "round-1" / "cache")
    answers = [json.loads(line) for line in (out / "round-1" / "kept.jsonl").open()]
    assert len(rollouts) == len(answers) > 0
    # The teacher has scored what the student wrote and no filter left out.
    source = (out / "round-1" / "kept.jsonl").stat().st_size
    assert rollouts.manifest.sources[0].size_bytes == source
    weights = [
        path / "model.safetensors" for path in (wide_llamas["tied"], out / "round-1/student-hf")
    ]
    assert weights[0].read_bytes() != weights[1].read_bytes()

    output = run_example(ROUNDS, *given, "rounds=2", timeout=240)
    assert output.count("done before") == 5, output[-3000:]
    commands = {path.stem: path.read_text() for path in (out / "logs").glob("*.done")}
    assert f"model.hf_path={out}/round-1/student-hf" in commands["round-2-generate"]
    assert f"model.hf_path={wide_llamas['untied']}" in commands["round-2-dump"]
    assert "++dataset.weights=[0.5,0.5]" in commands["round-2-train"]
    rows = json.loads((out / "results.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    # The rounds train with reverse KL, so no column may be called "KL to the teacher".
    assert {"heldout_ce", "divergence"} < rows[-1].keys()
    assert "kl_to_teacher" not in rows[-1]
    assert "| round | held-out CE | divergence from the teacher |" in output

    *rest, last = given
    assert last.startswith("+train.")
    output = run_example(ROUNDS, last, *rest, "rounds=2")  # the same settings in another order
    assert output.count("done before") == 9, output[-3000:]
    for word, message in (
        (
            "+dump.selection.kk=8",
            "selection.kk is no key of bridge/dump_teacher_topk.yaml; did you",
        ),
        ("+generate.sampling.n=0", "generate.sampling: expected n >= 1, got 0"),
        ("+dump.selection.k=-8", "dump.selection: expected selection.k >= 1"),
        ("+train.knowledge_distillation.tail=tale", "train.knowledge_distillation: expected tail"),
        ("+data.truncation_method=up", "data.truncation_method: expected one of"),
        ("filter.filters=[cutt]", "filters.0: expected one of cut, duplicates"),
        ("+train.train.train_iters=-1", "train.train_iters: expected an integer of at least 0"),
    ):
        words = {each.partition("=")[0]: each for each in (*given, word, f"output={tmp_path}/new")}
        output = run_example(ROUNDS, *words.values(), succeeds=False)
        assert message in output, output[-2000:]
        assert not (tmp_path / "new").exists()
    output = run_example(ROUNDS, *given, "sft.share=0.25", succeeds=False)
    assert "has rounds of other settings: sft was" in output
    output = run_example(ROUNDS, *given, "teacher=nowhere", succeeds=False)
    assert "teacher: found no nowhere/config.json" in output
    assert "Traceback" not in output


def test_values_are_words_that_hydra_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from rounds import as_overrides

    section: dict[str, Any] = {
        "a": {"text": "it's {x}\n'", "none": None, "flag": True, "list": [1, "b,c", 0.5]},
        "empty": {},
        "number": -1e-5,
    }
    words = list(as_overrides(section))
    again = {**dict(reversed(section.items())), "a": dict(reversed(section["a"].items()))}
    assert list(as_overrides(again)) == words  # in any order
    mixed = {"list": [{"b": 1, "a": 2}], "table": {1: 2, "a": 3}}
    assert list(as_overrides(mixed)) == ["++list=[{a:2,b:1}]", "++table.1=2", "++table.a=3"]
    parsed = OverridesParser.create().parse_overrides(words)
    found = {each.key_or_group: each.value() for each in parsed}
    assert found["a.text"] == section["a"]["text"]
    assert found["a.list"] == section["a"]["list"]
    assert (found["a.none"], found["a.flag"]) == (None, True)
    assert (found["empty"], found["number"]) == ({}, -1e-5)
