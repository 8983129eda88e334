"""Let the teacher write the data: it answers questions, sampled at temperature 1.

    PYTHONPATH=examples python studies/kd_vs_sft/sample_answers.py \
        teacher.gguf questions.json answers.jsonl

A run that was interrupted resumes with the first batch that is not complete. The draws of a batch
depend only on the seed and on its number.
"""

import argparse
import json
from pathlib import Path

import torch
from demo import PROMPT
from steps import write
from tqdm import tqdm

from nemo_kd.nemo.hf.source import load_source

BATCH = 32
ANSWER = "{output}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path, help="a Hugging Face directory or a .gguf file")
    parser.add_argument("questions", type=Path, help="JSON list of strings")
    parser.add_argument("output", type=Path, help="the jsonl to write, with input and output")
    parser.add_argument("--answers", type=int, default=1, help="answers to each question")
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, help="an answer is cut at this length"
    )
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()

    questions = json.loads(arguments.questions.read_text())
    questions = [question for question in questions for _ in range(arguments.answers)]
    batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
    parts = arguments.output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{number:05}.jsonl" for number in range(len(batches))]

    model, tokenizer = load_source(arguments.teacher)
    model = model.float().eval()
    tokenizer.padding_side = "left"
    for number, (file, batch) in enumerate(zip(tqdm(files, unit="batch"), batches, strict=True)):
        if file.exists():
            continue
        torch.manual_seed(arguments.seed + number)
        prompts = tokenizer(
            [prompt(question) for question in batch],
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        tokens = model.generate(
            **prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokens[:, prompts["input_ids"].shape[1] :].tolist()
        lines = [
            json.dumps({"input": question, "output": text(answer, tokenizer)})
            for question, answer in zip(batch, answers, strict=True)
        ]
        write(file, "".join(line + "\n" for line in lines))
    arguments.output.write_text("".join(file.read_text() for file in files))


def prompt(question: str) -> str:
    """The teacher's chat format up to its answer."""
    return PROMPT.removesuffix(ANSWER).replace(r"\n", "\n").replace("{input}", question)


def text(answer: list[int], tokenizer: object) -> str:
    """The answer, with its end token if the teacher ended the answer before it was cut."""
    if tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
    return tokenizer.decode(answer)


if __name__ == "__main__":
    main()
