"""nemo-kd import and verify --against: with a tokenizer, hence with NeMo."""

import json
import math
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache
from nemo_kd.cache.importing import read_samples
from nemo_kd.cache.manifest import fingerprint_file, tokenizer_fingerprint
from nemo_kd.cli import main

WORDS = ["<unk>", "<eos>", "a", "b", "c", "d", "e", "f", "g", "h"]
A, B, C, D = 2, 3, 4, 5


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    """A Hugging Face tokenizer of one token a word."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(path)
    return path


def vllm_row(**log_probs: float) -> dict:
    return {str(WORDS.index(word)): {"logprob": value} for word, value in log_probs.items()}


def server_row(token: str, **log_probs: float) -> dict:
    top = [
        {"token": f"token_id:{WORDS.index(word)}", "logprob": value}
        for word, value in log_probs.items()
    ]
    return {"token": f"token_id:{WORDS.index(token)}", "logprob": -1.0, "top_logprobs": top}


def good_lines() -> list[dict]:
    """Two supervised tokens, c and d, in both forms; and a sample without any."""
    by_token = {
        "token_ids": [A, B, C, D],
        "loss_mask": [0, 0, 1, 1],
        "logprobs": [None, None, vllm_row(c=-1.0, a=-0.7, b=-3.0), vllm_row(d=-0.1, a=-3.0)],
    }
    by_row = by_token | {
        "logprobs": [server_row("c", a=-0.7, c=-1.0), server_row("d", d=-0.1, a=-3.0)],
        "context_length": 1,
    }
    return [by_token, by_row, {"token_ids": [A], "loss_mask": [0], "logprobs": []}]


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_import(tmp_path, tokenizer_path, capsys):
    pytest.importorskip("nemo.collections.nlp")
    file = write_lines(tmp_path / "rows.jsonl", good_lines())
    command = ["import", str(tmp_path / "cache"), str(file), "--tokenizer", str(tokenizer_path)]
    assert main([*command, "--k", "2", "--samples-per-shard", "2"]) == 0
    cache = TopKCache.open(tmp_path / "cache")
    assert (len(cache), cache.num_shards, cache.manifest.codec) == (3, 2, "packed")
    assert cache.manifest.vocab_size == len(WORDS)
    for sample, context_length in zip(cache, (2, 1, 1), strict=True):
        assert sample.context_length == context_length
        if context_length != 1 or len(sample.tokens) > 1:
            assert sample.tokens.tolist() == [A, B, C, D]
            assert sample.topk_ids.tolist() == [[A, C], [A, D]]
            expected = np.array([[-0.7, -1.0], [-3.0, -0.1]])
            np.testing.assert_allclose(sample.topk_log_probs, expected, rtol=2**-8, atol=2**-13)
            tails = [math.log(1 - math.exp(-0.7) - math.exp(-1.0))]
            np.testing.assert_allclose(sample.tail_log_probs[:1], tails, rtol=1e-3)
    assert main([*command, "--k", "2", "--samples-per-shard", "2"]) == 0  # it is there already
    capsys.readouterr()
    assert main([*command, "--k", "3"]) == 1
    assert "rows.jsonl, line 1: logprobs of token 3: expected at least 3" in capsys.readouterr().err


BAD = {
    "not JSON": ("nonsense", "line 2: Expecting value"),
    "no object": ("[]", "line 2: expected an object with the lists token_ids, loss_mask, logprobs"),
    "another token": (
        {"logprobs": [vllm_row(b=-1.0, a=-0.7), vllm_row(d=-0.1, a=-3.0)]},
        "line 2: logprobs of token 2: expected the row of token id 4, as token_ids has it, got one "
        "for 3, 2",
    ),
    "one place off": (
        {"logprobs": [server_row("d", d=-0.1, a=-3.0), server_row("c", a=-0.7, c=-1.0)]},
        "line 2: logprobs of token 2: expected the row of token id 4, .* got one for 5",
    ),
    "an id outside": ({"token_ids": [A, B, C, 10]}, r"expected ids from 0 to 9 .*got 10"),
    "a bool for an id": ({"token_ids": [A, B, True, D]}, "token_ids: expected integers, got True"),
    "a row too few": ({"logprobs": [vllm_row(c=-1.0, a=-0.7)]}, "expected 4 rows, .* got 1"),
    "a row too short": ({"logprobs": [vllm_row(c=-1.0)] * 2}, "at least 2 distinct ids, got 1"),
    "no mask": ({"loss_mask": [0, 0, 1]}, "loss_mask: expected 0 or 1 for each of 4 tokens"),
    "first token": ({"loss_mask": [1, 0, 1, 1]}, "loss_mask: expected 0 at the first token"),
    "text for ids": (
        {"logprobs": [{"c": -1.0, "a": -0.7}] * 2},
        "expected a token id such as 7 or token_id:7, got 'c'; have the server return",
    ),
    "logits": ({"logprobs": [vllm_row(c=7.0, a=1.0)] * 2}, "log-probs, at most 0, got 7.0"),
    "too much mass": ({"logprobs": [vllm_row(c=-0.1, a=-0.2)] * 2}, "got a mass of 1.72"),
    "no number": ({"logprobs": [vllm_row(c=None, a=-1.0)] * 2}, "at most 0, got None"),
    "null": ({"logprobs": [None] * 4}, "expected an object, got None"),
    "context": ({"context_length": 5}, "context_length: expected 0 to 4 tokens, got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    change, message = BAD[case]
    good = good_lines()[0]
    file = write_lines(tmp_path / "rows.jsonl", [good])
    with open(file, "a") as lines:
        lines.write(change if isinstance(change, str) else json.dumps(good | change))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message.split(': ')[-1]}"):
        list(read_samples(file, 2, len(WORDS)))


def test_nothing_is_written_of_a_bad_file(tmp_path, tokenizer_path, capsys):
    pytest.importorskip("nemo.collections.nlp")
    file = write_lines(tmp_path / "rows.jsonl", [good_lines()[0], {}])
    command = ["import", str(tmp_path / "cache"), str(file), "--k", "2", "--tokenizer"]
    assert main([*command, str(tokenizer_path)]) == 1
    assert "rows.jsonl, line 2" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main([*command, str(tmp_path / "nowhere")]) == 1
    assert "--tokenizer: expected a .nemo or a directory, found no" in capsys.readouterr().err


@pytest.fixture
def dumped(tmp_path, tokenizer_path) -> tuple[Path, Path]:
    """A source of two lines, and a cache of the tokens that NeMo makes of them."""
    pytest.importorskip("nemo.collections.nlp")
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    from nemo_kd.config import DataConfig

    lines = [{"input": "a b", "output": "c d"}, {"input": "e", "output": "f"}]
    source = write_lines(tmp_path / "train.jsonl", lines)
    tokenizer = get_nmt_tokenizer(library="huggingface", model_name=str(tokenizer_path))
    data = asdict(DataConfig(file_names=("train.jsonl",), max_seq_length=16))
    read_only = ("file_names", "hf_dataset", "index_mapping_dir", "memmap_workers", "num_workers")
    manifest = Manifest(
        selection={"kind": "top_k", "k": 1, "temperature": 1.0},
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher_fingerprint="teacher",
        sources=(fingerprint_file(source),),
        dataset={name: value for name, value in data.items() if name not in read_only},
        num_samples=2,
        samples_per_shard=2,
    )
    with CacheWriter.open(tmp_path / "cache", manifest).shard(0) as shard:
        for words, context_length in ((["a", "b", "c", "d", "<eos>"], 2), (["e", "f", "<eos>"], 1)):
            tokens = np.array([WORDS.index(word) for word in words])
            mask = (np.arange(len(tokens)) >= context_length).astype(np.uint8)
            num_rows = int(mask.sum())
            zeros = np.zeros((num_rows, 1))
            sample = Sample(tokens, mask, zeros.astype(int), zeros, zeros[:, 0], context_length)
            shard.add(**sample._asdict())
    return tmp_path / "cache", source


def verify(cache: Path, source: Path, tokenizer: Path) -> int:
    return main(["verify", str(cache), "--against", str(source), "--tokenizer", str(tokenizer)])


def test_verify_against_the_source(dumped, tokenizer_path, capsys):
    assert verify(*dumped, tokenizer_path) == 0
    assert "every sample as in its source" in capsys.readouterr().out


def test_verify_against_another_source(dumped, tokenizer_path, capsys):
    cache, source = dumped
    lines = [{"input": "a b", "output": "c g"}, {"input": "e h", "output": "f"}]
    write_lines(source, lines)
    assert verify(cache, source, tokenizer_path) == 1
    out = capsys.readouterr().out
    assert "train.jsonl: not the file that was number 0 of the dump's sources" in out
    assert "sample 0: tokens is not what the source gives" in out
    assert "sample 0: loss_mask" not in out
    for name in ("tokens", "loss_mask", "context_length"):
        assert f"sample 1: {name} is not" in out


@pytest.mark.parametrize("packed", [True, False], ids=["file", "directory"])
def test_the_tokenizer_of_a_nemo(dumped, tokenizer_path, tmp_path, packed):
    """Its weights are not read: this one has none."""
    config = tmp_path / "nemo" / "model_config.yaml"
    config.parent.mkdir()
    tokenizer = {"library": "huggingface", "type": str(tokenizer_path), "model": None}
    config.write_text(json.dumps({"mcore_gpt": True, "tokenizer": tokenizer}))
    nemo = config.parent
    if packed:
        nemo = tmp_path / "model.nemo"
        with tarfile.open(nemo, "w") as archive:
            archive.add(config, "./model_config.yaml")
    assert verify(*dumped, nemo) == 0


def test_against_needs_a_tokenizer(dumped, capsys):
    cache, source = dumped
    assert main(["verify", str(cache), "--against", str(source)]) == 1
    assert "--against and --tokenizer need each other" in capsys.readouterr().err
    assert main(["verify", str(cache), "--chat-template", str(source)]) == 1
    assert "--chat-template is read with --against alone" in capsys.readouterr().err


def test_a_host_that_is_not_installed_is_one_line():
    """This environment has one host; each command of the other names the environment to call."""
    command = ["dump", "--host", "bridge", "model.hf_path=x", "data.file_names=[x]", "cache.path=x"]
    run = subprocess.run(
        [sys.executable, "-c", "from nemo_kd.cli import main; main()", *command],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "this environment has no megatron.bridge" in run.stderr
    assert "(make setup-bridge)" in run.stderr
    assert "Traceback" not in run.stderr
