"""The repository is as it says: the README's tree, the YAML's keys, the house plan's imports."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_kd.config import CacheConfig, DataConfig, DistillationConfig
from nemo_kd.selection import SelectionConfig

ROOT = Path(__file__).parent.parent
NEMO_FILES = {
    "cli.py",
    "cpu_backend.py",
    "dataset.py",
    "dump.py",
    "known_keys.py",
    "launch.py",
    "lora.py",
    "model.py",
    "resume.py",
}


def test_readme_shows_the_tree() -> None:
    block = re.search(r"```text\n(nemo_kd/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    shown, directory = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        directory = directory if line.startswith(" ") else name
        shown.add(directory + name if line.startswith(" ") else name)
    python = {
        str(path.relative_to(ROOT))
        for folder in ("nemo_kd", "examples", "benchmarks", "studies/kd_vs_sft")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    folders = {"nemo_kd/", "nemo_kd/cache/", "examples/", "examples/conf/", "examples/slurm/"}
    assert shown - {"benchmarks/", "docs/", "studies/kd_vs_sft/", "tests/"} == python | folders


@pytest.mark.parametrize(
    "name", ["dump_teacher_topk", "train_kd_sft", "import_hf_llama", "export_hf_llama"]
)
def test_yaml_composes(name: str) -> None:
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base=None):
        assert compose(name)


@pytest.mark.parametrize(
    ("file", "section", "settings"),
    [
        ("dump_teacher_topk", "data", DataConfig),
        ("dump_teacher_topk", "selection", SelectionConfig),
        ("dump_teacher_topk", "cache", CacheConfig),
        ("train_kd_sft", "model.knowledge_distillation", DistillationConfig),
    ],
)
def test_yaml_has_every_setting_with_its_default(file: str, section: str, settings: type) -> None:
    """??? is left to the user; what the YAML sets otherwise than the code is named here."""
    other_defaults = {"num_workers": 2}
    shown = OmegaConf.select(OmegaConf.load(ROOT / f"examples/conf/{file}.yaml"), section)
    assert set(shown) == {field.name for field in fields(settings)}
    for field in fields(settings):
        if not OmegaConf.is_missing(shown, field.name):
            expected = other_defaults.get(field.name, field.default)
            assert shown[field.name] == expected, field.name


def imported_by(path: Path) -> set[str]:
    return {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def test_only_some_files_import_nemo() -> None:
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        if any(name.split(".")[0] == "nemo" for name in imported_by(path)):
            assert path.name in NEMO_FILES, path


def test_a_file_imports_only_from_those_above_it() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\nnemo_kd/\n(.*?)\nexamples/", readme, re.DOTALL)
    assert tree is not None
    order = [line.split()[0].removesuffix(".py").rstrip("/") for line in tree[1].splitlines()]
    for position, name in enumerate(order):
        folder = ROOT / "nemo_kd" / name
        files = folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        for path in files:
            for module in imported_by(path):
                package, _, rest = module.partition(".")
                if package == "nemo_kd" and rest:
                    assert order.index(rest.split(".")[0]) <= position, f"{path} imports {module}"
