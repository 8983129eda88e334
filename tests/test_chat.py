"""Chat data: NeMo's multi-turn samples and masks, from the teacher run to the student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import dump_arguments, run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache

MAX_SEQ_LENGTH = 160


def turns(*texts: str, first: str = "User", **more: Any) -> list[dict[str, Any]]:
    speakers = [first, "Assistant" if first == "User" else "User"]
    return [
        {"from": speakers[number % 2], "value": text, **more} for number, text in enumerate(texts)
    ]


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "two turns": {"system": "a model", "conversations": turns("the token", "the label")},
    "five turns, the last one masked": {
        "system": "",
        "conversations": turns("a question", "an answer", "why", "with every token", "and"),
    },
    "the assistant masked": {
        "system": "student",
        "conversations": turns("large", "small", "data", "entropy"),
        "mask": "Assistant",
    },
    "labels before the text": {
        "system": "teacher",
        "conversations": turns("question", "answer", label="quality:9"),
        "type": "VALUE_TO_TEXT",
    },
    "labels after the text": {
        "system": "teacher",
        "conversations": turns("question", "answer", label="quality:9"),
        "type": "TEXT_TO_VALUE",
    },
    "truncated": {
        "system": "long",
        "conversations": turns(*(["distribution of the vocabulary"] * 8)),
    },
    "truncated before its answer": {
        "system": "sequence gradient parallel pipeline micro batch shard cache " * 16,
        "conversations": turns("question", "answer"),
    },
}


@pytest.fixture(scope="module")
def chat_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    return write_jsonl(directory / "chat.jsonl", list(CONVERSATIONS.values()))


@pytest.fixture(scope="module")
def chat_cache(
    nemos: dict[str, Path], chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> TopKCache:
    path = tmp_path_factory.mktemp("chat") / "cache"
    arguments = dump_arguments(nemos["untied"], chat_jsonl, path)
    run_example(
        "dump_teacher_topk.py",
        *arguments,
        "data.chat=true",
        "data.max_unsupervised_share=0.2",  # one of the seven is truncated before its answer
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
        f"+teacher.encoder_seq_length={MAX_SEQ_LENGTH}",
    )
    return TopKCache.open(path)


@pytest.fixture(scope="module")
def tokenizer(hf_llamas: dict[str, Path]) -> Any:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(str(hf_llamas["tied"]))


@pytest.fixture(scope="module")
def nemo_chat(chat_jsonl: Path, tokenizer: Any) -> Any:
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
        GPTSFTChatDataset,
    )

    return GPTSFTChatDataset(
        str(chat_jsonl),
        tokenizer,
        max_seq_length=MAX_SEQ_LENGTH,
        get_attention_mask_from_fusion=True,
    )


def test_the_cache_holds_nemos_samples(chat_cache: TopKCache, nemo_chat: Any) -> None:
    assert len(chat_cache) == len(nemo_chat) == len(CONVERSATIONS)
    for name, sample, expected in zip(CONVERSATIONS, chat_cache, nemo_chat, strict=False):
        tokens, mask = expected["input_ids"].numpy(), expected["mask"].numpy()
        assert not mask[0], name
        assert (len(tokens) > MAX_SEQ_LENGTH + 1) == ("truncated" in name), name
        np.testing.assert_array_equal(sample.tokens, tokens[: MAX_SEQ_LENGTH + 1], name)
        np.testing.assert_array_equal(sample.loss_mask, mask[: MAX_SEQ_LENGTH + 1], name)
        assert bool(sample.loss_mask.any()) == ("before its answer" not in name), name
    starts = np.diff(chat_cache[1].loss_mask.astype(int)) == 1
    assert starts.sum() == 2, "two answers, each with the start of the turn after it"


def test_rows_stand_at_the_tokens_before(chat_cache: TopKCache, hf_llamas: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(hf_llamas["untied"])
    for sample in chat_cache:
        with torch.no_grad():
            log_probs = teacher(torch.from_numpy(sample.tokens).long()[None]).logits[0]
        log_probs = log_probs.log_softmax(-1)[sample.loss_mask.nonzero()[0] - 1]
        own = log_probs.gather(1, torch.from_numpy(sample.topk_ids).long())
        np.testing.assert_allclose(sample.topk_log_probs, own, atol=1e-2)


def test_batches_equal_nemos(chat_cache: TopKCache, nemo_chat: Any, tokenizer: Any) -> None:
    from nemo_kd.loss import KDLossConfig
    from nemo_kd.nemo.dataset import GPTSFTKDDataset
    from nemo_kd.student.rows import scatter_rows

    own = GPTSFTKDDataset(
        str(chat_cache.path),
        tokenizer,
        kd_config=KDLossConfig(tail="renormalize"),
        max_seq_length=MAX_SEQ_LENGTH,
        get_attention_mask_from_fusion=True,
    )
    for indices in ([0], [1, 2], [3, 4, -3], [5, 0], list(range(len(own)))):
        expected = nemo_chat.collate_fn([nemo_chat[index] for index in indices])
        batch = own.collate_fn([own[index] for index in indices])
        for key, value in expected.items():
            if key == "answers" and 5 in indices:
                continue  # NeMo does not truncate its answers with the tokens
            if isinstance(value, torch.Tensor):
                assert batch[key].dtype == value.dtype, key
                torch.testing.assert_close(batch[key], value, rtol=0, atol=0, msg=key)
        batch |= scatter_rows(batch, batch["tokens"].shape[1])
        for row, index in enumerate(indices):
            supervised = batch["loss_mask"][row].bool()
            np.testing.assert_array_equal(
                batch["topk_ids"][row][supervised], chat_cache[index].topk_ids
            )
            assert (batch["topk_ids"][row][~supervised] == -1).all()


def test_it_trains_and_validates_beside_a_chat_jsonl(
    chat_cache: TopKCache, chat_jsonl: Path, nemos: dict[str, Path], tmp_path: Path
) -> None:
    """Two validation sets of the same samples: a cache has KD and SFT metrics, a jsonl only SFT."""
    logs = tmp_path / "logs"
    arguments = train_arguments(nemos["tied"], chat_cache.path, chat_cache.path, logs)
    run_example(
        "train_kd_sft.py",
        *arguments,
        f"model.data.validation_ds.file_names=[{chat_cache.path},{chat_jsonl}]",
        "model.data.validation_ds.names=[cached,plain]",
        "model.data.chat=true",
        f"+model.encoder_seq_length={MAX_SEQ_LENGTH}",
        *(
            f"model.data.{ds}.max_seq_length={MAX_SEQ_LENGTH}"
            for ds in ("train_ds", "validation_ds")
        ),
        *(f"model.data.{ds}.micro_batch_size=1" for ds in ("train_ds", "validation_ds")),
        # Otherwise NeMo's mean of a sample without supervised tokens is 0 / 0.
        "model.data.validation_drop_last=false",
    )
    logged = scalars(logs)
    losses = logged["validation_loss_cached"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for name in (
        "validation_loss_plain",
        "validation_sft_loss_cached",
        "validation_sft_loss_plain",
    ):
        np.testing.assert_allclose(logged[name], losses, rtol=1e-5, err_msg=name)
    for name in ("kd_loss", "teacher_topk_mass", "student_topk_mass", "teacher_entropy"):
        assert np.isfinite(logged[f"validation_{name}_cached"]).all()
        assert f"validation_{name}_plain" not in logged
    np.testing.assert_allclose(logged["validation_loss"], losses, rtol=1e-5)


TURN = {"from": "User", "value": "a"}
REPLY = {"from": "Assistant", "value": "b"}
BAD_LINES: dict[str, tuple[dict[str, Any], str]] = {
    "no system": ({"conversations": [TURN, REPLY]}, "found no system"),
    "no conversations": ({"system": ""}, "found no conversations"),
    "system is null": ({"system": None, "conversations": [TURN, REPLY]}, "a text as system"),
    "no turns": ({"system": "", "conversations": []}, "a list of turns"),
    "a turn without a speaker": (
        {"system": "", "conversations": [TURN, {"value": "b"}]},
        "turn 2: expected the keys from, value, found no from",
    ),
    "OpenAI's keys": (
        {"system": "", "conversations": [{"role": "user", "content": "a"}]},
        "turn 1: expected the keys from, value, found no from, value",
    ),
    "a label that is a number": (
        {"system": "", "conversations": [TURN, REPLY | {"label": 3}], "type": "VALUE_TO_TEXT"},
        "turn 2: expected a text as label, got 3",
    ),
    "another type": (
        {"system": "", "conversations": [TURN, REPLY], "type": "TEXT"},
        "expected a type of VALUE_TO_TEXT",
    ),
    "a mask that nobody is": (
        {"system": "", "conversations": [TURN, REPLY], "mask": "User,Human"},
        "to name some of Assistant, User",
    ),
    "the default mask": (
        {"system": "", "conversations": [TURN | {"from": "human"}, REPLY]},
        "got 'User'",
    ),
    "nothing to learn from": (
        {"system": "", "conversations": [TURN, REPLY], "mask": "User,Assistant"},
        "leaves none",
    ),
    "a question alone": ({"system": "", "conversations": [TURN]}, "leaves none"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    from nemo_kd.chat.lines import check_lines
    from nemo_kd.config import DataConfig

    record, message = BAD_LINES[case]
    good = {"system": "", "conversations": [TURN, REPLY]}
    path = write_jsonl(tmp_path / "chat.jsonl", [good, record])
    data = DataConfig(file_names=(str(path),), chat=True)
    with pytest.raises(ValueError, match=r"chat.jsonl, line 2: ") as error:
        check_lines(str(path), data)
    assert message in str(error.value)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_nemo_takes_is_not_refused(name: str) -> None:
    from nemo_kd.chat.lines import _check_conversation

    assert not _check_conversation(CONVERSATIONS[name])
