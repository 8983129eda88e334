"""Models and data that many tests share, made once a session: a tiny teacher and a tiny student."""

import os
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from runs import dump_arguments, run_example, write_jsonl

# The tests of the host that this environment does not have.
collect_ignore_glob = ["bridge/*"] if find_spec("nemo") else []

# Two workers share two cores; torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = re.findall(
    r"\w+",
    """
    the a student teacher learns from large small model and data of with every token probability
    distribution knowledge distillation entropy temperature vocabulary sequence gradient parallel
    pipeline micro batch shard cache divergence forward reverse label answer question supervised
    """,
)


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level BPE of 401 tokens: NeMo pads to 512 at TP=1 and at TP=2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=401,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(400)]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == 401
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_llama(
    path: Path, tokenizer: Any, tied: bool, layers: int, vocab_size: int, heads: int = 4
) -> None:
    """Save a random Hugging Face Llama with grouped queries, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = LlamaForCausalLM(config)
    # By a generator of its own, because each release of transformers draws in another order.
    generator = torch.Generator().manual_seed(layers)
    for name, weight in model.named_parameters():
        # Peaked distributions, as a trained model has.
        weight.data.normal_(std=0.3, generator=generator)
        if "norm" in name:
            weight.data.mul_(0.1).add_(1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def hf_llamas(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> dict[str, Path]:
    """Random Hugging Face Llamas, embeddings tied and untied."""
    paths = {}
    for name, tied, layers in (("tied", True, 2), ("untied", False, 3)):
        paths[name] = tmp_path_factory.mktemp("hf") / name
        save_llama(paths[name], hf_tokenizer, tied, layers, len(hf_tokenizer))
    return paths


@pytest.fixture(scope="session")
def wide_llamas(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> dict[str, Path]:
    """The same with 512 rows for 401 tokens: a vocabulary that no host has to pad."""
    paths = {}
    for name, tied, layers in (("tied", True, 2), ("untied", False, 3)):
        paths[name] = tmp_path_factory.mktemp("wide") / name
        save_llama(paths[name], hf_tokenizer, tied, layers, 512)
    return paths


@pytest.fixture(scope="session")
def nemos(tmp_path_factory: pytest.TempPathFactory, hf_llamas: dict[str, Path]) -> dict[str, Path]:
    """The same two models as .nemo: "untied" is the teacher, "tied" the student."""
    directory = tmp_path_factory.mktemp("nemo")
    paths = {name: directory / f"{name}.nemo" for name in hf_llamas}
    for name, path in paths.items():
        run_example("import_hf_llama.py", f"source={hf_llamas[name]}", f"output={path}")
    return paths


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples of many lengths; the longest exceed MAX_SEQ_LENGTH."""
    rng = random.Random(1)
    records = [
        {
            "input": " ".join(rng.choices(WORDS, k=1 + 3 * number)),
            "output": " ".join(rng.choices(WORDS, k=1 + number)),
        }
        for number in range(10)
    ]
    rng.shuffle(records)
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", records)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], jsonl: Path) -> Path:
    """The teacher's top-8 over the samples."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    run_example("dump_teacher_topk.py", *dump_arguments(nemos["untied"], jsonl, path))
    return path
