"""nemo-kd as a user calls it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cache import CacheWriter, Manifest, Sample, SourceFile
from nemo_kd.cli import main


def write(path: Path, num_answer_tokens: int) -> None:
    """Four samples of three prompt tokens; every row keeps 0.5, 0.25 and 0.125 of the mass."""
    manifest = Manifest(
        selection={"kind": "top_k", "k": 3, "temperature": 1.0},
        vocab_size=50,
        tokenizer_fingerprint="tokenizer",
        teacher_fingerprint="teacher",
        sources=(SourceFile(name="train.jsonl", size_bytes=1234, xxh3_128="0123"),),
        dataset={"prompt_template": "{input} {output}"},
        num_samples=4,
        samples_per_shard=3,
        codec="raw",
    )
    num_tokens = 3 + num_answer_tokens
    sample = Sample(
        tokens=np.arange(num_tokens),
        loss_mask=(np.arange(num_tokens) >= 3).astype(np.uint8),
        topk_ids=np.tile([4, 9, 2], (num_answer_tokens, 1)),
        topk_log_probs=np.log(np.tile([0.25, 0.5, 0.125], (num_answer_tokens, 1))),
        tail_log_probs=np.log(np.full(num_answer_tokens, 0.125)),
        context_length=3,
    )
    writer = CacheWriter.open(path, manifest)
    for index in writer.missing_shards():
        with writer.shard(index) as shard:
            for _ in manifest.shard_samples(index):
                shard.add(**sample._asdict())


@pytest.fixture
def cache_path(tmp_path) -> Path:
    write(tmp_path / "cache", num_answer_tokens=5)
    return tmp_path / "cache"


def test_inspect_json(cache_path, capsys):
    assert main(["inspect", str(cache_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    files = [path for path in cache_path.glob("shard-*/*") if path.suffix != ".json"]
    size_bytes = sum(path.stat().st_size for path in files)
    row_bytes = sum(path.stat().st_size for path in files if re.match("topk|tail", path.name))
    assert summary["num_samples"] == 4
    assert summary["num_shards"] == 2
    assert summary["num_tokens"] == 32
    assert summary["num_supervised_tokens"] == 20
    assert summary["size_bytes"] == size_bytes
    assert summary["bytes_per_supervised_token"] == size_bytes / 20
    assert summary["row_bytes_per_supervised_token"] == row_bytes / 20
    assert summary["mean_kept_entries"] == 3
    assert summary["teacher_mass_kept"] == pytest.approx(
        {"1": 0.5, "2": 0.75, "3": 0.875},
        rel=1e-3,  # a log-prob near -1 is a float16, 5e-4 apart
    )
    assert summary["selection"] == {"kind": "top_k", "k": 3, "temperature": 1.0}
    assert summary["vocab_size"] == 50
    assert summary["sources"] == [{"name": "train.jsonl", "size_bytes": 1234, "xxh3_128": "0123"}]


def test_inspect_text(cache_path, capsys):
    assert main(["inspect", str(cache_path)]) == 0
    lines = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert lines["samples"] == "4 in 2 shards"
    assert lines["supervised tokens"] == "20"
    assert lines["selection"] == "k 3, kind 'top_k', temperature 1.0"
    assert lines["teacher mass kept"] == "K=1 0.4999, K=2 0.7498, K=3 0.8747"


def test_inspect_without_supervised_tokens(tmp_path, capsys):
    write(tmp_path, num_answer_tokens=0)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["bytes_per_supervised_token"] is None
    assert summary["teacher_mass_kept"] == {"1": None, "2": None, "3": None}
    assert main(["inspect", str(tmp_path)]) == 0
    assert "K=1 none" in capsys.readouterr().out


def test_verify(cache_path, capsys):
    assert main(["verify", str(cache_path)]) == 0
    assert "2 shards, every file as it was written" in capsys.readouterr().out


def test_verify_names_each_fault(cache_path, capsys):
    for name in ("shard-00000/topk_ids.bin", "shard-00001/tokens.idx"):
        damaged = bytearray((cache_path / name).read_bytes())
        damaged[7] ^= 1
        (cache_path / name).write_bytes(damaged)
    (cache_path / "shard-00001" / "loss_mask.bin").unlink()
    assert main(["verify", str(cache_path)]) == 1
    out, err = capsys.readouterr()
    named = [re.search(r"shard-\d+/\w+\.\w+", line).group() for line in out.splitlines()]
    assert named == [
        "shard-00000/topk_ids.bin",
        "shard-00001/loss_mask.bin",
        "shard-00001/tokens.idx",
    ]
    assert "faults found: 3" in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_error_is_one_line_on_stderr(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"nemo-kd {command}: {tmp_path}: expected a cache directory")


def test_console_script(cache_path):
    script = Path(sys.executable).parent / "nemo-kd"
    run = subprocess.run([script, "verify", cache_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_plot(cache_path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(cache_path), "--plot", str(tmp_path / "k.png")]) == 0
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_inspect_ragged_rows(tmp_path, capsys, codec):
    manifest = Manifest(
        selection={"kind": "top_p", "k": 5, "p": 0.9, "temperature": 1.0},
        vocab_size=50,
        tokenizer_fingerprint="tokenizer",
        teacher_fingerprint="teacher",
        sources=(),
        dataset={},
        num_samples=1,
        samples_per_shard=1,
        codec=codec,
    )
    with CacheWriter.open(tmp_path, manifest).shard(0) as shard:
        shard.add(
            tokens=np.arange(3),
            loss_mask=np.array([0, 1, 1]),
            topk_ids=np.array([[7, 3], [9, -1]]),
            topk_log_probs=np.log(np.array([[0.5, 0.25], [1.0, 1e-300]])),
            tail_log_probs=np.log(np.array([0.25, 1e-300])),
            context_length=1,
        )
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["mean_kept_entries"] == 1.5
    expected = {"1": 0.75, "2": 0.875, "5": 0.875}
    assert summary["teacher_mass_kept"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("command", ["dump", "train"])
def test_the_host_is_chosen(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--host", "bridge", "--help"])
    assert not ended.value.code
    assert "with Megatron-Bridge" in capsys.readouterr().out
    for arguments in ([command, "--host", "hugging"], [command, "--host"], ["import-hf", "--host"]):
        with pytest.raises(SystemExit, match="expected --host nemo or --host bridge"):
            main(arguments)
