"""Plain files as validation sets: their cross entropy is that of a cache of the same samples."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from runs import MAX_SEQ_LENGTH, run_example, scalars, write_jsonl

DUMP, TRAIN = "bridge/dump_teacher_topk.py", "bridge/train_kd_sft.py"
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"  # noqa: E501


def records(kind: str) -> list[dict[str, Any]]:
    """Seven samples, so that the last global batch of four is not whole."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=1 + number // 3)) for number in range(14)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    if kind == "prompt":
        return [{"input": first, "output": second} for first, second in pairs]
    if kind == "nemo_chat":
        speakers = ("User", "Assistant")
        return [
            {
                "system": "",
                "conversations": [
                    {"from": f, "value": v} for f, v in zip(speakers, pair, strict=True)
                ],
            }
            for pair in pairs
        ]
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import pyarrow
    from pyarrow import parquet

    directory = tmp_path_factory.mktemp("files")
    parquet.write_table(
        pyarrow.Table.from_pylist(records("messages")), directory / "messages.parquet"
    )
    (directory / "template.jinja").write_text(TEMPLATE)
    return {
        "prompt": write_jsonl(directory / "prompt.jsonl", records("prompt")),
        "messages": directory / "messages.parquet",
        "nemo_chat": write_jsonl(directory / "nemo_chat.jsonl", records("nemo_chat")),
    }


def arguments(student: Path, cache: Path, directory: Path) -> list[str]:
    return [
        "device=cpu",
        f"model.hf_path={student}",
        f"model.seq_length={MAX_SEQ_LENGTH}",
        f"dataset.train_caches=[{cache}]",
        "dataset.num_workers=0",
        "train.train_iters=2",
        "train.eval_interval=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "scheduler.lr_warmup_iters=0",
        f"logger.tensorboard_dir={directory}/logs",
        f"save_hf={directory}/saved",
    ]


def test_a_file_has_the_cross_entropy_of_its_cache(
    files: dict[str, Path], wide_llamas: dict[str, Path], tmp_path: Path
) -> None:
    names = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")
    tokens = ",".join(f"{name}:'{text}'" for name, text in zip(names, "[(:|=", strict=True))
    settings = [
        f"data.chat_template={files['prompt'].parent / 'template.jinja'}",
        f"data.chat_prompt_tokens={{{tokens}}}",
    ]
    for kind, file in files.items():
        run_example(
            DUMP,
            "device=cpu",
            f"model.hf_path={wide_llamas['untied']}",
            f"data.file_names=[{file}]",
            f"data.max_seq_length={MAX_SEQ_LENGTH}",
            "data.num_workers=0",
            "selection.k=8",
            f"cache.path={tmp_path / kind}",
            "data.max_unsupervised_share=0.7",  # long samples are cut
            *settings,
        )
    output = run_example(
        TRAIN,
        *arguments(wide_llamas["tied"], tmp_path / "prompt", tmp_path),
        f"dataset.validation_caches=[{','.join(str(tmp_path / kind) for kind in files)}]",
        f"dataset.validation_files=[{','.join(map(str, files.values()))}]",
        *settings,
    )
    assert "messages.parquet: the format is messages, by the first line" in output
    found = scalars(tmp_path)
    for kind, file in files.items():
        own, of_file = (found[f"sft_loss {name} validation"] for name in (kind, file.name))
        assert of_file == pytest.approx(own, rel=1e-5)
        assert f"kd_loss {kind} validation" in found
        assert f"kd_loss {file.name} validation" not in found
    assert found["kd_loss validation"][-1] > 0


def test_files_alone_have_no_kd_terms(
    files: dict[str, Path], wide_llamas: dict[str, Path], tmp_path: Path, jsonl: Path
) -> None:
    cache = tmp_path / "cache"
    teacher = f"model.hf_path={wide_llamas['untied']}"
    more = [f"data.max_seq_length={MAX_SEQ_LENGTH}", "selection.k=8", f"cache.path={cache}"]
    more.append("data.num_workers=0")
    run_example(DUMP, "device=cpu", teacher, f"data.file_names=[{jsonl}]", *more)
    run = arguments(wide_llamas["tied"], cache, tmp_path)
    run_example(TRAIN, *run, f"dataset.validation_files=[{files['prompt']}]")
    validated = {tag for tag in scalars(tmp_path) if tag.endswith(" validation")}
    assert validated == {
        f"{term}{name} validation"
        for term in ("lm loss", "sft_loss")
        for name in ("", " prompt.jsonl")
    }
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"input": "a"}) + "\n")
    bad = [f"dataset.validation_files=[{broken}]", f"save_hf={tmp_path}/other"]
    output = run_example(TRAIN, *run, *bad, succeeds=False)
    assert "broken.jsonl, line 1: expected" in output
    assert "Traceback" not in output


def test_a_missing_begin_token_is_named(
    wide_llamas: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    """By the teacher run and by the student's, of a model whose tokenizer begins each text."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    model = shutil.copytree(wide_llamas["tied"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(model)
    run = ["device=cpu", f"model.hf_path={model}", f"data.file_names=[{jsonl}]", "selection.k=8"]
    run += [f"data.max_seq_length={MAX_SEQ_LENGTH}", "data.num_workers=0"]
    warning = "its samples lack <s>, which the model expects before each text"
    cache, with_begin = tmp_path / "cache", tmp_path / "with-begin"
    assert warning in run_example(DUMP, *run, f"cache.path={cache}")
    output = run_example(DUMP, *run, f"cache.path={with_begin}", "data.add_bos=true")
    assert "samples lack" not in output
    more = [f"dataset.validation_caches=[{with_begin}]", "dataset.names=[heldout]"]
    output = run_example(TRAIN, *arguments(model, cache, tmp_path), *more)
    assert f"{cache}: {warning}" in output
    assert f"{with_begin}: " not in output
