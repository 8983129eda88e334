"""nemo-kd in this host's environment: what needs no model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_hosts import DUMP, cache, dump_arguments  # noqa: F401

from nemo_kd.cache import TopKCache


def nemo_kd(*arguments: object, status: int = 0) -> str:
    """What the command prints."""
    main = "import sys; from nemo_kd.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_a_cache_against_its_source(
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    tokenizer = ("--tokenizer", wide_llamas["untied"])
    output = nemo_kd("verify", cache, "--against", jsonl, *tokenizer)
    assert "every sample as in its source" in output
    changed = tmp_path / jsonl.name
    changed.write_text("".join(reversed(jsonl.read_text().splitlines(keepends=True))))
    output = nemo_kd("verify", cache, "--against", changed, *tokenizer, status=1)
    assert "sample 0: tokens is not what the source gives" in output
    output = nemo_kd("verify", cache, "--against", jsonl, "--tokenizer", "nowhere", status=1)
    assert "--tokenizer: expected a Hugging Face directory, found no nowhere/" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("what", ["file", "cache"])
def test_show(
    what: str,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    jsonl: Path,
) -> None:
    path, more = (cache, ()) if what == "cache" else (jsonl, ("-n", "1"))
    output = nemo_kd("show", path, "--tokenizer", wide_llamas["untied"], *more)
    answer = json.loads(jsonl.read_text().splitlines()[0])["output"]
    assert " ".join(answer.split()[:3]) in output, output
    assert "Warning" not in output


def test_rows_of_another_engine(wide_llamas: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"6": -0.5}, {"7": -0.5}]
    line = {"token_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "logprobs": rows}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(line))
    nemo_kd("import", tmp_path / "cache", file, "--tokenizer", wide_llamas["untied"], "--k", 1)
    assert TopKCache.open(tmp_path / "cache")[0].topk_ids.tolist() == [[6], [7]]
