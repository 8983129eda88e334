"""What a run shows in a terminal of 100 columns: few lines, bars that move, each error once."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import warm
from runs import EXAMPLES, dump_arguments, run_example, train_arguments, write_jsonl
from test_cache import make_manifest, make_samples, write_shard

from nemo_kd.cache import CacheWriter
from nemo_kd.cli import main
from nemo_kd.teacher.progress import Progress


def run_in_terminal(script: str, *arguments: str) -> str:
    """The output of an example in a terminal of 100 columns and 30 rows."""
    own, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env=os.environ | warm.ENVIRONMENT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = b""
    try:
        while part := os.read(own, 1 << 16):
            output += part
    except OSError:  # the other end is closed
        pass
    os.close(own)
    text = output.decode()
    assert process.wait() == 0, text
    return text


def drawings(output: str, bar: str) -> list[str]:
    """What was drawn of a bar, one after another."""
    return [part for part in output.replace("\n", "\r").split("\r") if part.startswith(bar)]


def test_dump(nemos: dict[str, Path], tmp_path: Path) -> None:
    records = [{"input": "the", "output": "student learns " * 40} for _ in range(8)]
    records += [{"input": "the", "output": "student"} for _ in range(8)]
    data = write_jsonl(tmp_path / "long.jsonl", records)
    workers = "data.num_workers=2"  # they tokenise, and what they count counts
    arguments = dump_arguments(nemos["untied"], data, tmp_path / "cache", workers)
    output = run_in_terminal("dump_teacher_topk.py", *arguments)
    lines = output.splitlines()
    assert output.count("\n") <= 16, output
    assert lines[0].startswith(f"reads  {nemos['untied']} (")
    assert lines[1] == f"reads  {data} ({data.stat().st_size / 1e3:.1f} kB)"
    assert lines[2] == f"writes {tmp_path / 'cache'}"
    assert "layout 1 process: tensor 1 x pipeline 1 x context 1 x data 1 parallel" in lines
    assert "[NeMo I" not in output
    assert "long enough" not in output
    assert "warning: 8 times a sample's truncation_field was too short" in output
    bars = drawings(output, "cache, 4 shards")
    assert "16/16 samples" in bars[-1]
    assert "tokens/s" in bars[-1]
    assert max(map(len, bars)) <= 100
    assert "[NeMo I" in (tmp_path / "cache.log").read_text()


def test_train(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    arguments = train_arguments(nemos["tied"], cache, cache, tmp_path)
    output = run_in_terminal("train_kd_sft.py", *arguments)
    assert output.count("\n") <= 40, output
    assert "[NeMo I" not in output
    last = drawings(output, "Epoch 0")[-1]
    assert len(last) <= 100
    for shown in ("4/4", "loss=", "kd=", "sft=", "val=", "tokens/s="):
        assert shown in last
    (log,) = tmp_path.glob("nemo_log_globalrank-0*.txt")
    assert "[NeMo I" in log.read_text()


@pytest.fixture
def begun(tmp_path: Path) -> CacheWriter:
    """A cache of three shards of two samples."""
    return CacheWriter.open(tmp_path / "cache", make_manifest(num_samples=6))


def test_the_bar_moves_with_micro_batches_and_with_others_shards(begun: CacheWriter) -> None:
    samples = make_samples(begun.manifest)
    with Progress(begun, [0, 1, 2], shown=True) as progress:
        progress.add(1, 10)
        assert progress._bar.n == 1
        write_shard(begun, 0, samples[:2])
        write_shard(begun, 2, samples[4:])  # as another replica does
        progress.look()
        assert progress._bar.n == 4
        progress.add(1, 10)
        assert progress._bar.n == 5


def test_a_wait_for_others_is_said_once(
    begun: CacheWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in (False, True):
        with Progress(begun, [0, 1, 2], shown) as progress:
            progress.wait()
            progress.wait()
    assert capsys.readouterr().err.count("waiting for 3 shards that other processes fill") == 1


def test_an_error_of_all_ranks_is_said_once() -> None:
    output = run_example(
        "dump_teacher_topk.py",
        *("trainer.accelerator=cpu", "teacher.restore_from_path=nowhere.nemo"),
        *("data.file_names=[nothing.jsonl]", "cache.path=cache"),
        processes=2,
        cold=True,
        succeeds=False,
    )
    assert output.count("found no nowhere.nemo") == 1
    assert output.count("reads  nowhere.nemo") == 1


@pytest.mark.parametrize("name", ["dump_teacher_topk", "train_kd_sft"])
def test_help_has_the_comments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = (EXAMPLES / "conf" / f"{name}.yaml").read_text()
    output = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"],
        env=os.environ | warm.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == yaml.strip()
    command = {"dump_teacher_topk": "dump", "train_kd_sft": "train"}[name]
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    assert capsys.readouterr().out.strip() == yaml.strip()
