"""The .nemo gives Hugging Face's logits, at one and at two vocab shards."""

from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from nemo_models import local_logits
from runs import run_example


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
