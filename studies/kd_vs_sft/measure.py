"""Measure a student on held-out prompts, outside NeMo: it is exported and run by transformers.

    PYTHONPATH=examples python studies/kd_vs_sft/measure.py \
        student.nemo heldout-cache references.json measures.json

The cache must hold the teacher's whole distribution. All measures but exact_match are means over
its supervised tokens:

    ce              cross entropy of the teacher's sampled answers, in nats
    kl              KL(teacher || student) over the whole vocabulary, in nats
    top1_agreement  the student's most probable token is the teacher's
    ece             expected calibration error (Guo et al. 2017, arXiv 1706.04599), 15 bins
    exact_match     the greedy answer, normalised, is one of the corpus's answers to the question
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from sample_answers import prompt
from tqdm import tqdm

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.nemo.hf.exporter import export_hf_llama

BATCH = 16
BINS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, help="a .nemo")
    parser.add_argument("cache", type=Path, help="held-out samples; k is the whole vocabulary")
    parser.add_argument("references", type=Path, help="JSON: each question and its list of answers")
    parser.add_argument("output", type=Path, help="the JSON to write")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.student)
    references = json.loads(arguments.references.read_text())
    answers = greedy_answers(model, tokenizer, list(references), arguments.max_new_tokens)
    measures = over_tokens(model, TopKCache.open(arguments.cache)) | {
        "exact_match": mean(
            float(normalised(answers[question]) in map(normalised, known))
            for question, known in references.items()
        ),
        "answers": answers,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(measures, indent=2) + "\n")


def load(nemo: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        output = f"{directory}/hf"
        export_hf_llama(OmegaConf.create({"source": str(nemo), "output": output, "dtype": None}))
        model = AutoModelForCausalLM.from_pretrained(output, torch_dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(output)


@torch.no_grad()
def over_tokens(model: Any, cache: TopKCache) -> dict[str, float]:
    """The measures that are means over supervised tokens."""
    columns: dict[str, list[torch.Tensor]] = {}
    for start in tqdm(range(0, len(cache), BATCH), unit="batch"):
        samples = [cache[index] for index in range(start, min(start + BATCH, len(cache)))]
        for name, values in batch_columns(model, samples).items():
            columns.setdefault(name, []).append(values)
    table = {name: torch.cat(values).double() for name, values in columns.items()}
    return {
        "ce": table["ce"].mean().item(),
        "kl": table["kl"].mean().item(),
        "top1_agreement": table["agrees"].mean().item(),
        "ece": calibration_error(table["confidence"], table["correct"]),
        "tokens": len(table["ce"]),
    }


def batch_columns(model: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The measures of each supervised token of all the samples, one column each."""
    longest = max(len(sample.tokens) for sample in samples)
    # Padding stands on the right. There causal attention hides it from the tokens before it.
    tokens = torch.tensor(
        np.stack([np.pad(sample.tokens, (0, longest - len(sample.tokens))) for sample in samples])
    ).long()
    mask = torch.tensor(
        np.stack([np.pad(s.loss_mask, (0, longest - len(s.loss_mask))) for s in samples])
    ).bool()
    logits = model(input_ids=tokens).logits[:, :-1][mask[:, 1:]]
    student = logits.float().log_softmax(1)
    ids = torch.tensor(np.concatenate([sample.topk_ids for sample in samples])).long()
    stored = torch.tensor(np.concatenate([sample.topk_log_probs for sample in samples]))
    # Normalised again, because each log-prob was rounded to float16.
    teacher = torch.full_like(student, -torch.inf).scatter(1, ids, stored).log_softmax(1)
    labels = tokens[:, 1:][mask[:, 1:]]
    confidence, predicted = student.max(1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
    return {
        "ce": -student.gather(1, labels[:, None])[:, 0],
        "kl": divergence.sum(1),
        "agrees": predicted == teacher.argmax(1),
        "confidence": confidence.exp(),
        "correct": predicted == labels,
    }


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """The mean over all tokens of |accuracy - confidence| of the bin that a token lies in."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, questions: list[str], max_new_tokens: int
) -> dict[str, str]:
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(questions), BATCH):
        prompts = tokenizer(
            [prompt(question) for question in questions[start : start + BATCH]],
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        tokens = model.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = tokens[:, prompts["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return dict(zip(questions, answers, strict=True))


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks, as in SQuAD's exact match."""
    words = re.sub(r"[^\w\s]", "", answer.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


if __name__ == "__main__":
    main()
