"""The engine `server`, against what a real vLLM said, and against the real one where there is one.

    NEMO_KD_VLLM=.venv-vllm python -m pytest tests/test_generate_server.py -m vllm

With NEMO_KD_RECORD=1 the real one's answers become tests/vllm_exchange.json.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from completions import EXCHANGE, Reply, forward, key_of, replay, serving
from conftest import save_llama
from generation import RECORDS, arguments, capture, generate, lines, write_prompts

from nemo_kd.cache import TopKCache

STOP = "ature"
NUM_EMPTY = 1  # of the recorded answers: its first token is the end token
NUM_ANSWERS = 2 * len(RECORDS) - NUM_EMPTY
VLLM = Path(os.environ.get("NEMO_KD_VLLM", Path(__file__).parent.parent / ".venv-vllm"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> Path:
    """A tiny Llama whose heads are as wide as vLLM has them on a CPU, and which likes to end."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("served") / "tiny"
    save_llama(path, hf_tokenizer, True, 2, len(hf_tokenizer), heads=2)
    llama = LlamaForCausalLM.from_pretrained(path)
    llama.model.embed_tokens.weight.data[hf_tokenizer.eos_token_id] *= 4
    llama.save_pretrained(path)
    return path


def asks(model: Path, url: str, directory: Path, *more: str) -> list[str]:
    server = ("engine=server", "server.model=tiny", f"server.base_url={url}")
    output = directory / "answers.jsonl"
    stop = f"sampling.stop=[{STOP}]"
    data = write_prompts(directory)
    return [*arguments(model, data, output, *server, stop), *capture(directory / "cache"), *more]


def check_rows(model: Path, cache_path: Path) -> None:
    """The rows are those of transformers for the same tokens, to the rounding of the cache."""
    import torch
    from transformers import LlamaForCausalLM

    reference, cache = LlamaForCausalLM.from_pretrained(model), TopKCache.open(cache_path)
    for number in range(len(cache)):
        sample = cache[number]
        with torch.no_grad():
            logits = reference(torch.tensor(sample.tokens[None].astype(np.int64))).logits[0]
        expected = logits.log_softmax(-1)[np.flatnonzero(sample.loss_mask) - 1]
        at_ids = expected.gather(1, torch.tensor(sample.topk_ids.astype(np.int64))).numpy()
        np.testing.assert_allclose(sample.topk_log_probs, at_ids, rtol=1e-3, atol=1e-3)
        best = expected.topk(sample.topk_ids.shape[1]).values.numpy()
        np.testing.assert_allclose(at_ids, best, atol=1e-3)  # no entry is missed, but for ties
        tails = 1 - np.exp(best.astype(np.float64)).sum(-1)
        np.testing.assert_allclose(np.exp(sample.tail_log_probs), tails, atol=2e-3)
        assert sample.context_length == np.flatnonzero(sample.loss_mask)[0]


def test_the_recorded_answers_become_data_and_a_cache(
    model: Path, hf_tokenizer: Any, tmp_path: Path
) -> None:
    with serving(replay()) as url:
        output = generate(*asks(model, url, tmp_path))
    assert f"{NUM_EMPTY} failures, which are not in the data" in output
    assert output.count("an empty answer") == NUM_EMPTY
    cache = TopKCache.open(tmp_path / "cache")
    ends, places = set(), []
    for number, line in enumerate(lines(tmp_path / "answers.jsonl")):
        sample, told = cache[number], line["generation"]
        written = sample.tokens[sample.context_length :]
        assert told["num_tokens"] == len(written)
        places.append((told["prompt"], told["answer"]))
        text = hf_tokenizer.decode(written, clean_up_tokenization_spaces=False)
        ends.add("stop" if STOP in text else "end" if text.endswith("</s>") else "length")
        assert told["finish_reason"] == ("stop" if STOP in text or "</s>" in text else "length")
        assert text.split(STOP)[0].removesuffix("</s>").removeprefix(" ") == line["output"]
    assert ends == {"stop", "end", "length"}
    assert len(places) == len(set(places)) == len(cache) == NUM_ANSWERS
    assert places == sorted(places)
    assert cache.manifest.dataset["captured"]["engine"] == "server"
    check_rows(model, tmp_path / "cache")


def altered(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Reply:
    """The recorded answers, each changed: `change(request, choice)`."""
    recorded = replay()

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, response = recorded(request)
        change(request, response["choices"][0])
        return status, response

    return reply


def fewer(request: dict[str, Any], choice: dict[str, Any]) -> None:
    tops = choice["logprobs"]["top_logprobs"]
    choice["logprobs"]["top_logprobs"] = [dict(list(top.items())[:5]) for top in tops]


def tempered(request: dict[str, Any], choice: dict[str, Any]) -> None:
    for top in choice["logprobs"]["top_logprobs"]:
        for key in top:
            top[key] *= request["temperature"]


def too_much(request: dict[str, Any], choice: dict[str, Any]) -> None:
    for top in choice["logprobs"]["top_logprobs"]:
        for key in top:
            top[key] *= 0.1


def only_text(request: dict[str, Any], choice: dict[str, Any]) -> None:
    del choice["token_ids"]
    choice["logprobs"]["tokens"] = ["some", "text"]


def other_text(request: dict[str, Any], choice: dict[str, Any]) -> None:
    choice["text"] = "something else"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (fewer, "expected 8 log-probs of each token, got 5"),
        (tempered, "change with temperature"),
        (too_much, "expected log-probs of one distribution, got a mass"),
        (only_text, "expected token ids, without which its rows cannot be told, got none"),
        (other_text, "but it wrote 'something else'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rows_that_are_not_the_models_own_are_refused(
    change: Any, error: str, model: Path, tmp_path: Path
) -> None:
    with serving(altered(change)) as url:
        output = generate(*asks(model, url, tmp_path), succeeds=False)
    assert error in output
    assert "Traceback" not in output
    assert not (tmp_path / "answers.jsonl").exists()
    assert not (tmp_path / "cache").exists()


def test_without_rows_text_is_enough(model: Path, tmp_path: Path) -> None:
    """A server that knows no token ids: the answers are there, and no cache."""
    recorded = altered(only_text)

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert "logprobs" not in request
        return recorded(request | {"logprobs": 8})

    with serving(reply) as url:
        generate(*asks(model, url, tmp_path, "capture.path=null"))
    assert len(lines(tmp_path / "answers.jsonl")) == NUM_ANSWERS


def test_a_request_that_fails_is_tried_again_then_counted(model: Path, tmp_path: Path) -> None:
    """The first two failures of a request are mended by retries; what is refused is not data."""
    recorded, tries = replay(), dict[str, int]()

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        key = key_of(request)
        tries[key] = tries.get(key, 0) + 1
        if request["max_tokens"] > 1 and len(request["prompt"]) > 20:
            return 400, {"error": {"message": "the prompt is too long for me"}}
        if request["max_tokens"] > 1 and tries[key] < 3:
            return (500, 429)[tries[key] % 2], {"error": {"message": "busy"}}
        return recorded(request)

    with serving(reply) as url:
        output = generate(*asks(model, url, tmp_path, "server.max_retries=2"))
    made = lines(tmp_path / "answers.jsonl")
    num_refused = 2  # the answers to the longest prompt
    assert output.count("refused: the prompt is too long for me") == num_refused
    assert len(made) == len(TopKCache.open(tmp_path / "cache")) == NUM_ANSWERS - num_refused
    assert max(tries.values()) == 3


def test_a_server_that_goes_away_stops_the_run_which_goes_on_later(
    model: Path, tmp_path: Path
) -> None:
    recorded, asked = replay(), list[str]()
    more = ("server.max_retries=0", "server.max_failures=1", "server.max_in_flight=1")

    def dies(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(key_of(request))
        if len(asked) > 8:
            return 503, {"error": {"message": "out of order"}}
        return recorded(request)

    with serving(dies) as url:
        output = generate(*asks(model, url, tmp_path, *more), succeeds=False)
    assert "server.max_failures: 2 requests" in output
    assert "out of order" in output
    parts = sorted(path.name for path in (tmp_path / "answers.jsonl.parts").glob("*.npz"))
    assert parts == ["00000.npz"]
    written = set(asked[2:6])  # the first block; before it come the two questions of the start
    with serving(lambda request: (asked.append(key_of(request)), recorded(request))[1]) as url:
        del asked[:]
        generate(*asks(model, url, tmp_path, *more))
    assert not written & set(asked)
    assert len(lines(tmp_path / "answers.jsonl")) == NUM_ANSWERS


def test_no_server_is_one_line(model: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    output = generate(*asks(model, f"http://127.0.0.1:{port}/v1", tmp_path), succeeds=False)
    assert f"127.0.0.1:{port}/v1: expected a server, got none" in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts a real vLLM with more flags; returns its base URL."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str) -> str:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = str(free.getsockname()[1])
        command = [VLLM / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", port]
        command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
        command += ["--served-model-name", "tiny", *flags]
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "auto",
        }
        with open(log, "ab") as file:
            started.append(
                subprocess.Popen(
                    list(map(str, command)),
                    env=os.environ | settings,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
        until = time.monotonic() + 240
        while started[-1].poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                return f"http://127.0.0.1:{port}/v1"
            except OSError:
                time.sleep(1)
        raise AssertionError(log.read_text()[-6000:])

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(60)


@pytest.mark.vllm
@pytest.mark.timeout(600)  # two starts of the server, a minute each
@pytest.mark.skipif(not (VLLM / "bin" / "vllm").exists(), reason=f"no vLLM in {VLLM}")
def test_a_real_vllm(vllm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    """Its rows are those of transformers; with processed log-probs, or too few, it is refused."""
    pairs: list[dict[str, Any]] = []
    with serving(forward(vllm("--max-logprobs", "20"), pairs)) as url:
        generate(*asks(model, url, tmp_path))
        (tmp_path / "more").mkdir()
        output = generate(*asks(model, url, tmp_path / "more", "capture.k=100"), succeeds=False)
        assert "start vLLM with --max-logprobs 100" in output
    assert len(lines(tmp_path / "answers.jsonl")) == NUM_ANSWERS
    check_rows(model, tmp_path / "cache")
    if os.environ.get("NEMO_KD_RECORD"):
        kept = [pair for pair in pairs if pair["request"].get("logprobs") == 8]
        kept.sort(key=lambda pair: key_of(pair["request"]))
        EXCHANGE.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    (tmp_path / "processed").mkdir()
    flags = ("--max-logprobs", "20", "--logprobs-mode", "processed_logprobs")
    run = asks(model, vllm(*flags), tmp_path / "processed")
    assert "change with temperature" in generate(*run, succeeds=False)
