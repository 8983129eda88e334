"""The engine `transformers`: a batch at a time through `generate`, with draws of our own.

A draw depends on the answer's seed and on the place of the token, and a batch on the numbers of its
answers. So a run that was interrupted continues with the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemo_kd.cache.manifest import fingerprint_model
from nemo_kd.generate.answers import Answer, Blocks, Done, Request, Rows, Wanted
from nemo_kd.hf_config import hf_files
from nemo_kd.hf_tokenizer import HfTokenizer, cut_at
from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows


class Transformers:
    """A model of transformers on one device.

    Args:
        model: The section of the YAML.
        device: "gpu" or "cpu".
        wanted: How answers are written.

    Raises:
        ValueError: There is no GPU.
    """

    def __init__(self, model: Any, device: str, wanted: Wanted) -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise ValueError("device: expected a GPU, found none; set device=cpu")
        self._path, self._dtype = model.hf_path, model.dtype
        self._device = "cuda" if device == "gpu" else "cpu"
        self._wanted, self._tokenizer = wanted, wanted.tokenizer
        self._model: Any = None

    @property
    def fingerprint(self) -> str:
        """Of the model's files and of what shapes its logits.

        Raises:
            ValueError: The directory has no model.
        """
        files = hf_files(self._path)
        if len(files) < 2:
            raise ValueError(
                f"model.hf_path: expected config.json and *.safetensors in {self._path}"
            )
        return fingerprint_model(files, json.dumps([self._dtype, self._device]))

    def open(self, max_seq_length: int) -> None:
        """Read the weights.

        Raises:
            ValueError: The model's positions end before `max_seq_length`, or it has fewer tokens
                than its tokenizer.
        """
        dtype = getattr(torch, self._dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self._path, torch_dtype=dtype)
        longest = getattr(model.config, "max_position_embeddings", None) or max_seq_length
        if max_seq_length > longest:
            raise ValueError(
                f"data.max_seq_length: expected at most {longest}, the model's "
                f"max_position_embeddings, got {max_seq_length}"
            )
        rows, own = model.get_output_embeddings().weight.shape[0], self._tokenizer.vocab_size
        if rows < own:
            raise ValueError(f"model.hf_path: expected its tokenizer's {own} tokens, got {rows}")
        # Nothing of its generation_config.json, such as a penalty of repetitions: generate() would
        # fill in what it is not given.
        model.generation_config = GenerationConfig()
        self._model = model.to(self._device).eval()

    def fill(self, blocks: Blocks, done: Done) -> None:
        for block, requests in blocks:
            done(block, self._write(requests))

    @torch.inference_mode()
    def _write(self, requests: list[Request]) -> list[Answer]:
        ends, stops = self._tokenizer.end_ids, self._wanted.stops
        width = max(len(request.ids) for request in requests)
        pad = ends[0] if ends else 0
        # On the left, so that all answers begin at the same place.
        pads = [width - len(request.ids) for request in requests]
        ids = torch.tensor([[pad] * n + r.ids for n, r in zip(pads, requests, strict=True)])
        draw = _Draw(requests, self._wanted, width)
        stop = _Stop(self._tokenizer, stops, width)
        out = self._model.generate(
            ids.to(self._device),
            attention_mask=(torch.arange(width) >= torch.tensor(pads)[:, None]).to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=self._wanted.sampling.max_tokens,
                eos_token_id=ends or None,
                pad_token_id=pad,
            ),
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([stop] if stops else []),
        )
        answers = [
            self._answer(request, out[i, width:].tolist(), stop.lengths.get(i))
            for i, request in enumerate(requests)
        ]
        if not self._wanted.k:
            return answers
        # Each [steps, N, ...]; what follows the end of an answer is left out.
        parts = [torch.stack(part).numpy() for part in zip(*draw.rows, strict=True)]
        return [
            answer._replace(rows=Rows(*(part[: len(answer.ids), i] for part in parts)))
            for i, answer in enumerate(answers)
        ]

    def _answer(self, request: Request, written: list[int], stopped: int | None) -> Answer:
        """What is left of the written tokens at the end token, or at a stop text's last token."""
        ended = next((i + 1 for i, t in enumerate(written) if t in self._tokenizer.end_ids), None)
        length = min(each for each in (ended, stopped, len(written)) if each is not None)
        ids = written[:length]
        text = self._tokenizer.ids_to_text(ids[:-1] if ended == length else ids)
        reason = "stop" if length in (ended, stopped) else "length"
        return Answer(request.prompt, request.answer, cut_at(text, self._wanted.stops), ids, reason)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Keeps the row of each step and leaves one entry of its logits: the token that is drawn."""

    def __init__(self, requests: list[Request], wanted: Wanted, width: int) -> None:
        self.rows: list[TeacherRows] = []
        self._seeds = torch.tensor([request.seed for request in requests]) << 32
        self._vocab_size, self._width = wanted.tokenizer.vocab_size, width
        self._selection = SelectionConfig(k=wanted.k) if wanted.k else None
        sampling, self._one = wanted.sampling, None
        if sampling.temperature:
            self._one = SelectionConfig("sample", num_draws=1, seed=sampling.seed)
        self._warpers: list[Any] = []
        if sampling.temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._selection is not None:
            rows = select_teacher_rows(scores, self._selection, self._vocab_size)
            self.rows.append(TeacherRows(*(part.cpu() for part in rows)))
        scores = scores.float()
        scores[:, self._vocab_size :] = -torch.inf  # padding of the vocabulary
        if self._one is None:
            return scores
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        place = input_ids.shape[1] - self._width
        keys = (self._seeds + place).to(scores.device)
        drawn = select_teacher_rows(scores, self._one, self._vocab_size, row_keys=keys).topk_ids
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.long(), 0)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer whose text has one of the stops; `lengths` has its tokens until then."""

    def __init__(self, tokenizer: HfTokenizer, stops: tuple[str, ...], width: int) -> None:
        self.lengths: dict[int, int] = {}
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        # A token has at least one byte, so that these tokens hold a stop that has just been ended.
        self._num_read = 8 + max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        written = input_ids[:, self._width :].tolist()
        for row, ids in enumerate(written):
            text = self._tokenizer.ids_to_text(ids[-self._num_read :])
            if row not in self.lengths and any(stop in text for stop in self._stops):
                self.lengths[row] = len(ids)
        is_done = [row in self.lengths for row in range(len(written))]
        return torch.tensor(is_done, device=input_ids.device)
