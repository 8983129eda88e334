"""The engine `server`: any that speaks OpenAI's /v1/completions, through the openai client.

A prompt is sent as token ids, so that the server's own template is never a question. Rows are taken
by token id, never by text, because two tokens may have one text.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from nemo_kd.cache.importing import token_id, top_rows
from nemo_kd.generate.answers import Answer, Blocks, Done, Request, Rows, Wanted
from nemo_kd.generate.settings import ServerConfig
from nemo_kd.hf_tokenizer import cut_at

# What the server would otherwise take of the model's generation_config.json. It ignores the keys
# that it does not know. The ids of what it wrote need the special tokens in its text.
_EXTRA = {
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
# Log-probs of one prompt may differ between two requests by the rounding of bfloat16.
_MOST_DIFFERENCE = 0.1
# What a later try may mend; other 4xx are about the request itself.
_BUSY = (408, 409, 425, 429)
_WRONG = (401, 403, 404)


class Server:
    """A server of a model.

    Args:
        config: Where it is and how it is asked.
        wanted: How answers are written.
    """

    def __init__(self, config: ServerConfig, wanted: Wanted) -> None:
        self._config = config
        self._tokenizer, self._sampling, self._stops, self._k = wanted
        self._num_failed = 0

    @property
    def fingerprint(self) -> str:
        """The name by which the server has the model: nothing else of it is known."""
        return f"{self._config.model}, of a server"

    def open(self, max_seq_length: int) -> None:
        """Ask once or twice, before a thousand requests are sent.

        Raises:
            ValueError: The server cannot be reached, or does not take the requests; with rows: it
                gives too few log-probs, no token ids, or log-probs that sampling has changed.
        """
        asyncio.run(self._try())

    async def _try(self) -> None:
        ends = self._tokenizer.end_ids
        prompt = Request(0, 0, self._tokenizer.text_to_ids("The") or ends, seed=0)
        async with self._client().with_options(max_retries=1) as client:
            rows = []
            # The second one would change log-probs that are taken after temperature and top_p.
            for changed in ({}, {"temperature": 2.0, "top_p": 0.5}):
                asked = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
                try:
                    choice = await self._ask(client, prompt, asked | changed)
                except APIError as error:
                    raise ValueError(self._refusal(error)) from error
                rows.append(self._read(prompt, choice).rows)
        if self._k and rows[0] is not None and rows[1] is not None:
            self._compare(rows[0], rows[1])

    def _compare(self, first: Rows, second: Rows) -> None:
        rows = (first, second)
        one, other = (dict(zip(r.topk_ids[0], r.topk_log_probs[0], strict=True)) for r in rows)
        common = one.keys() & other.keys()
        apart = max((abs(one[each] - other[each]) for each in common), default=np.inf)
        mass = float(np.exp(first.topk_log_probs[0]).sum())
        # The most probable K of V hold at least K / V.
        if apart > _MOST_DIFFERENCE or mass < 0.99 * self._k / self._tokenizer.vocab_size:
            raise ValueError(
                "capture.path: expected log-probs of the model's own distribution, but those of "
                f"{self._config.base_url} change with temperature and top_p (by {apart:.2f}) or "
                f"are none (their mass is {mass:.3g}); start vLLM with --logprobs-mode raw_logprobs"
            )

    def _refusal(self, error: APIError) -> str:
        where = f"server.base_url: {self._config.base_url}"
        if isinstance(error, APIConnectionError):
            return f"{where}: expected a server, got none: {error.__cause__ or error}"
        if self._k and "logprobs" in str(error):
            return (
                f"capture.k: {self._config.base_url} does not give {self._k} log-probs a token: "
                f"{_message(error)}; start vLLM with --max-logprobs {self._k}, or lower capture.k"
            )
        return f"{where}: the server refuses a request: {_message(error)}"

    def _client(self) -> AsyncOpenAI:
        config = self._config
        return AsyncOpenAI(
            base_url=config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=config.max_retries,
            timeout=config.timeout_s,
        )

    def fill(self, blocks: Blocks, done: Done) -> None:
        """Write the blocks; `done` is called in the order in which the server completes them.

        Raises:
            ValueError: More requests failed for good than `server.max_failures`, or an answer shows
                that the server does not do what `open` saw.
        """
        asyncio.run(self._fill(blocks, done))

    async def _fill(self, blocks: Blocks, done: Done) -> None:
        gate = asyncio.Semaphore(self._config.max_in_flight)
        async with self._client() as client:

            async def write(block: int, requests: list[Request]) -> None:
                answers = (self._answer(client, gate, request) for request in requests)
                done(block, list(await asyncio.gather(*answers)))

            running: set[asyncio.Task[None]] = set()
            for block, requests in blocks:
                running.add(asyncio.create_task(write(block, requests)))
                # One more than fill the flight, so that it stays full when one of them ends.
                if len(running) > 1 + self._config.max_in_flight // len(requests):
                    ended, running = await asyncio.wait(
                        running, return_when=asyncio.FIRST_COMPLETED
                    )
                    await asyncio.gather(*ended)  # raises what one of them raised
            await asyncio.gather(*running)

    async def _answer(
        self, client: AsyncOpenAI, gate: asyncio.Semaphore, request: Request
    ) -> Answer:
        failed = Answer(request.prompt, request.answer)
        async with gate:
            try:
                choice = await self._ask(client, request, {})
            except APIStatusError as error:
                if error.status_code in _WRONG:
                    raise ValueError(self._refusal(error)) from error
                if error.status_code < 500 and error.status_code not in _BUSY:
                    return failed._replace(failure=f"refused: {_message(error)}")
                return failed._replace(failure=self._count(error), may_succeed_later=True)
            except APIError as error:
                return failed._replace(failure=self._count(error), may_succeed_later=True)
        if choice.get("finish_reason") not in ("stop", "length"):
            return failed._replace(failure=f"ended by {choice.get('finish_reason')}")
        return self._read(request, choice)

    def _count(self, error: APIError) -> str:
        """The failure of a request whose retries are used up."""
        self._num_failed += 1
        if self._num_failed > self._config.max_failures:
            raise ValueError(
                f"server.max_failures: {self._num_failed} requests to {self._config.base_url} "
                f"failed, each {1 + self._config.max_retries} times; the last: {_message(error)}. "
                "What is written stays, and the same command goes on"
            ) from error
        return f"failed {1 + self._config.max_retries} times: {_message(error)}"

    async def _ask(
        self, client: AsyncOpenAI, request: Request, changed: dict[str, Any]
    ) -> dict[str, Any]:
        """The reply's one choice."""
        sampling = self._sampling
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(self._stops) or None,
            "seed": request.seed,
            "extra_body": _EXTRA | {"top_k": sampling.top_k or -1},
        }
        if self._k:
            settings["logprobs"] = self._k
        completion = await client.completions.create(
            model=str(self._config.model), prompt=request.ids, **(settings | changed)
        )
        return dict(completion.choices[0].model_dump())

    def _read(self, request: Request, choice: dict[str, Any]) -> Answer:
        """A choice as an answer.

        Raises:
            ValueError: Its ids are not those of its text, or a cache cannot take its rows.
        """
        try:
            ids = _ids(choice)
            text = choice["text"] if ids is None else self._text(ids, choice)
            rows = self._rows(ids, choice) if self._k else None
        except ValueError as error:
            raise ValueError(
                f"{self._config.base_url}, prompt {request.prompt}, answer {request.answer}: "
                f"{error}"
            ) from error
        ids = self._tokenizer.text_to_ids(text) if ids is None else ids
        return Answer(request.prompt, request.answer, text, ids, choice["finish_reason"], rows=rows)

    def _text(self, ids: list[int], choice: dict[str, Any]) -> str:
        """The text of the ids, which must be the server's."""
        decode, theirs = self._tokenizer.ids_to_text, choice["text"]
        remedy = "is model.hf_path the tokenizer of the server's model?"
        if ids and not 0 <= min(ids) <= max(ids) < self._tokenizer.vocab_size:
            raise ValueError(
                f"expected ids below {self._tokenizer.vocab_size}, got {max(ids)}; {remedy}"
            )
        ended = (
            choice["finish_reason"] == "stop" and ids[-1:] and ids[-1] in self._tokenizer.end_ids
        )
        text = cut_at(decode(ids[:-1] if ended else ids), self._stops)
        # A server may leave out the special tokens.
        plain = cut_at(decode(ids, skip_special_tokens=True), self._stops)
        # It holds back the bytes of a character that is not whole.
        if theirs.rstrip("\ufffd") not in (text.rstrip("\ufffd"), plain.rstrip("\ufffd")):
            raise ValueError(
                f"its token ids are those of {text!r:.60}, but it wrote {theirs!r:.60}; {remedy}"
            )
        return text

    def _rows(self, ids: list[int] | None, choice: dict[str, Any]) -> Rows:
        if ids is None:
            raise ValueError(
                "expected token ids, without which its rows cannot be told, got none; a server "
                "for capture.path must know return_token_ids or return_tokens_as_token_ids (vLLM)"
            )
        tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
        if len(tops) != len(ids):
            raise ValueError(f"expected log-probs of {len(ids)} tokens, got {len(tops)}")
        fewest = min(map(len, tops), default=self._k)
        if fewest < self._k:
            raise ValueError(
                f"expected {self._k} log-probs of each token, got {fewest}; lower capture.k, or "
                "raise the server's limit (vLLM: --max-logprobs)"
            )
        return Rows(*top_rows(tops, ids, self._k, self._tokenizer.vocab_size))


def _ids(choice: dict[str, Any]) -> list[int] | None:
    """The ids of the written tokens; None if the server does not give them."""
    if choice.get("token_ids") is not None:
        return list(choice["token_ids"])
    tokens = (choice.get("logprobs") or {}).get("tokens")
    try:
        return [token_id(token) for token in tokens] if tokens else None
    except ValueError:
        return None


def _message(error: APIError) -> str:
    body = error.body.get("message") if isinstance(error.body, dict) else None
    return str(body or error.__cause__ or error.message or error)[:300]
