"""The NeMo host computes what hosts.json has: the other host is compared with the same figures."""

import os
from pathlib import Path

import numpy as np
from hosts import REFERENCE, measure, reference
from runs import run_example


def test_the_nemo_host(wide_llamas: dict[str, Path], jsonl: Path, tmp_path: Path) -> None:
    nemos = {name: tmp_path / f"{name}.nemo" for name in wide_llamas}
    for name, path in nemos.items():
        run_example("import_hf_llama.py", f"source={wide_llamas[name]}", f"output={path}")
    found = measure(run_example, nemos["untied"], nemos["tied"], jsonl, tmp_path)
    if os.environ.get("WRITE_REFERENCE"):
        import json

        REFERENCE.write_text(json.dumps(found, indent=1) + "\n")
    assert found["cache"] == reference()["cache"]
    assert found["tokenizer"] == reference()["tokenizer"]
    for size, curves in reference()["curves"].items():
        for name, values in curves.items():
            np.testing.assert_allclose(found["curves"][size][name], values, rtol=1e-4)
