"""The .nemo gives Hugging Face's logits, at one and at two vocab shards."""

import ctypes
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from nemo_models import local_logits
from runs import dump_arguments, run_example, train_arguments

from nemo_kd.cache import TopKCache


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_logits_agree(
    hf_llamas: dict[str, Path], nemos: dict[str, Path], tensor_parallel_size: int
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(401, (2, 16), generator=torch.Generator().manual_seed(0))
    names = list(nemos)
    shards = run_distributed(
        local_logits, tensor_parallel_size, [nemos[name] for name in names], tokens
    )
    for index, name in enumerate(names):
        ours = torch.cat([rank[index] for rank in shards], dim=-1)
        hf = AutoModelForCausalLM.from_pretrained(hf_llamas[name])
        with torch.no_grad():
            theirs = hf(tokens).logits
        assert ours.shape[-1] == 512
        # float32, with sums in another order.
        torch.testing.assert_close(ours[..., :401], theirs, atol=1e-4, rtol=1e-4)
        if tensor_parallel_size == 1:
            assert not ours[..., 401:].any(), "padding has logits of 0"


def test_keep_layers(hf_llamas: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = run_example(
        "import_hf_llama.py",
        f"source={hf_llamas['untied']}",
        f"output={tmp_path / 'student.nemo'}",
        "keep_layers=[0,2]",
        cold=True,
    )
    assert "2 of 3 layers" in output
    assert {path.name for path in tmp_path.iterdir()} == {"student.nemo", "student.tokenizer"}
    tokens = torch.randint(401, (2, 16), generator=torch.Generator().manual_seed(0))
    ((ours,),) = run_distributed(local_logits, 1, [tmp_path / "student.nemo"], tokens)
    hf = AutoModelForCausalLM.from_pretrained(hf_llamas["untied"])
    hf.model.layers = torch.nn.ModuleList([hf.model.layers[0], hf.model.layers[2]])
    with torch.no_grad():
        theirs = hf(tokens, use_cache=False).logits
    torch.testing.assert_close(ours[..., :401], theirs, atol=1e-4, rtol=1e-4)


def test_a_missing_begin_token_is_named(
    hf_llamas: dict[str, Path], hf_tokenizer: Any, jsonl: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    source, nemo = tmp_path / "hf", tmp_path / "llama3.nemo"
    shutil.copytree(hf_llamas["tied"], source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.save_pretrained(source)
    warning = "its samples lack <s>, which the model expects"

    output = run_example("import_hf_llama.py", f"source={source}", f"output={nemo}")
    assert "the model expects <s> before each text: use data.add_bos=true" in output
    caches = {}
    for add_bos in (False, True):
        caches[add_bos] = tmp_path / f"cache-{add_bos}"
        arguments = dump_arguments(nemo, jsonl, caches[add_bos], f"data.add_bos={add_bos}")
        output = run_example("dump_teacher_topk.py", *arguments)
        assert output.count(f"{jsonl}: {warning}") == (not add_bos)
        first = {int(sample.tokens[0]) for sample in TopKCache.open(caches[add_bos])}
        assert (first == {tokenizer.bos_token_id}) == add_bos
    arguments = train_arguments(nemo, caches[True], caches[False], tmp_path / "logs")
    files = f"model.data.validation_ds.file_names=[{caches[False]},{jsonl}]"
    output = run_example("train_kd_sft.py", *arguments, files, "trainer.max_steps=2")
    assert output.count(warning) == 2
    assert f"{caches[False]}: {warning}" in output
    assert f"{jsonl}: {warning}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=nowhere", "output=a.nemo"], "found no nowhere"),
        (["source=SOURCE", "output=a.bin"], "ends in .nemo, got a.bin"),
        (["source=SOURCE", "output=a.nemo", "keep_layers=[0,3]"], "layers from 0 to 2, got [0, 3]"),
        (["source=SOURCE", "outptu=a.nemo"], "outptu"),
    ],
    ids=["no source", "output of another kind", "no such layer", "misspelt key"],
)
def test_bad_input_is_one_clear_line(
    hf_llamas: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("SOURCE", str(hf_llamas["untied"])) for a in arguments]
    output = run_example("import_hf_llama.py", *arguments, succeeds=False)
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def memory_of_import(rank: int, world_size: int, source: str, output: str) -> int:
    """By how many bytes the memory in use, without mapped files, grew at most."""
    from omegaconf import OmegaConf

    from nemo_kd.nemo.hf.importer import import_hf_llama

    # What is freed goes back to the system at once, as it does for matrices above 32 MiB.
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
    stop, sizes = threading.Event(), [memory_in_use()]

    def sample() -> None:
        while not stop.wait(0.01):
            sizes.append(memory_in_use())

    thread = threading.Thread(target=sample)
    thread.start()
    import_hf_llama(OmegaConf.create({"source": source, "output": output, "keep_layers": None}))
    stop.set()
    thread.join()
    return max(sizes) - sizes[0]


def memory_in_use() -> int:
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def test_memory_does_not_grow_with_the_model(
    hf_llamas: dict[str, Path], hf_tokenizer: Any, tmp_path: Path
) -> None:
    """254 MB of weights, whose largest matrix has 13 MB, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(hf_tokenizer),
        hidden_size=768,
        intermediate_size=4096,
        num_hidden_layers=11,
        num_attention_heads=12,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for weight in model.parameters():
        weight.data.fill_(0.5)
    model.save_pretrained(tmp_path / "hf", max_shard_size="50MB")
    hf_tokenizer.save_pretrained(tmp_path / "hf")
    num_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    del model
    small, large = (
        run_distributed(memory_of_import, 1, str(path), str(tmp_path / f"{name}.nemo"))[0]
        for name, path in (("small", hf_llamas["untied"]), ("large", tmp_path / "hf"))
    )
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 4
    assert large - small < num_bytes / 2, "two models and a copy would be four times it"
    shutil.rmtree(tmp_path)
