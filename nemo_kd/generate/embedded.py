"""The engine `transformers`: a batch at a time through `generate`, with draws of our own.

A draw depends on the answer's seed and on the place of the token, and a batch on the numbers of its
answers. So a run that was interrupted continues with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
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
from nemo_kd.generate.answers import Answer, Request, Rows
from nemo_kd.generate.settings import SamplingConfig
from nemo_kd.generate.tokenizer import HfTokenizer, cut_at
from nemo_kd.hf_config import hf_files
from nemo_kd.sampling import uniform
from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows

_MASS_BITS = 40  # the sum over 2^22 entries fits an int64


class Transformers:
    """A model of transformers on one device.

    Args:
        model: The section of the YAML.
        device: "gpu" or "cpu".
        tokenizer: The model's.
        sampling: How answers are drawn.
        stops: The texts that end an answer.
        k: Entries of a row; 0 captures none.

    Raises:
        ValueError: There is no model, or no GPU.
    """

    def __init__(
        self,
        model: Any,
        device: str,
        tokenizer: HfTokenizer,
        sampling: SamplingConfig,
        stops: tuple[str, ...],
        k: int,
    ) -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise ValueError("device: expected a GPU, found none; set device=cpu")
        self._path, self._dtype = model.hf_path, model.dtype
        self._device = "cuda" if device == "gpu" else "cpu"
        self._tokenizer, self._sampling, self._stops = tokenizer, sampling, stops
        self._selection = SelectionConfig(k=k) if k else None
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
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._path, torch_dtype=getattr(torch, self._dtype)
        )
        longest = getattr(model.config, "max_position_embeddings", None) or max_seq_length
        if max_seq_length > longest:
            raise ValueError(
                f"data.max_seq_length: expected at most {longest}, the model's "
                f"max_position_embeddings, got {max_seq_length}"
            )
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < self._tokenizer.vocab_size:
            raise ValueError(
                f"model.hf_path: expected a model of {self._tokenizer.vocab_size} tokens, as its "
                f"tokenizer has them, got {rows}"
            )
        self._model = model.to(self._device).eval()

    def fill(
        self,
        blocks: Sequence[int],
        requests_of: Callable[[int], list[Request]],
        done: Callable[[int, list[Answer]], None],
    ) -> None:
        for block in blocks:
            requests = requests_of(block)
            done(block, self._write(requests) if requests else [])

    @torch.inference_mode()
    def _write(self, requests: list[Request]) -> list[Answer]:
        ends, sampling = self._tokenizer.end_ids, self._sampling
        width = max(len(request.ids) for request in requests)
        pad = ends[0] if ends else 0
        # On the left, so that all answers begin at the same place.
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in requests])
        mask = torch.tensor(
            [[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests], dtype=torch.long
        )
        draw = _Draw(requests, sampling, self._tokenizer.vocab_size, self._selection, width)
        stop = _Stop(self._tokenizer, self._stops, width)
        out = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            # Nothing of the model's own generation_config.json, such as a penalty of repetitions.
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=ends or None,
                pad_token_id=pad,
            ),
            use_model_defaults=False,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([stop] if self._stops else []),
        )
        written = out[:, width:].tolist()
        return [
            self._answer(request, written[i], stop.lengths.get(i), draw.rows, i)
            for i, request in enumerate(requests)
        ]

    def _answer(
        self,
        request: Request,
        written: list[int],
        stopped: int | None,
        rows: list[TeacherRows],
        place: int,
    ) -> Answer:
        ended = next((i + 1 for i, t in enumerate(written) if t in self._tokenizer.end_ids), None)
        length = min(each for each in (ended, stopped, len(written)) if each is not None)
        ids = written[:length]
        text = self._tokenizer.ids_to_text(ids[:-1] if ended == length else ids)
        captured = None
        if rows:
            parts = (torch.stack([step[i][place] for step in rows[:length]]) for i in range(3))
            captured = Rows(*(part.numpy() for part in parts))
        reason = "length" if ended != length and stopped != length else "stop"
        text = cut_at(text, self._stops)
        return Answer(request.prompt, request.answer, text, ids, reason, captured)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Keeps the row of each step and leaves one entry of its logits: the token that is drawn."""

    def __init__(
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        vocab_size: int,
        selection: SelectionConfig | None,
        width: int,
    ) -> None:
        self.rows: list[TeacherRows] = []
        self._seeds = torch.tensor([request.seed for request in requests]) << 32
        self._sampling, self._vocab_size, self._width = sampling, vocab_size, width
        self._selection = selection
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
        if self._sampling.temperature == 0:
            return scores
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        place = input_ids.shape[1] - self._width
        keys = (self._seeds + place).to(scores.device)
        chosen = draw(scores, uniform(keys, self._sampling.seed, 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0)


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The ids that `uniforms` pick of softmax(scores), in the order of ids.

    The masses are integers, because the order in which a GPU sums numbers with a point varies.

    Args:
        scores: `[N, V]` float32.
        uniforms: `[N, 1]` float64 in [0, 1).

    Returns:
        `[N, 1]` int64.
    """
    mass = (scores - scores.amax(-1, keepdim=True)).double().exp().mul_(2.0**_MASS_BITS).long()
    up_to = mass.cumsum(-1)
    total = up_to[:, -1:]
    return torch.searchsorted(up_to, (uniforms * total).long().clamp(max=total - 1), right=True)


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
