"""The repository is as its docs say: the tree, the YAML's keys, and who imports whom."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_kd.config import CacheConfig, DataConfig, DistillationConfig
from nemo_kd.generate.settings import CaptureConfig, SamplingConfig, ServerConfig
from nemo_kd.selection import SelectionConfig

ROOT = Path(__file__).parent.parent
# A host is NeMo or Megatron-Bridge; a file elsewhere knows none.
HOSTS = {"nemo", "bridge"}
EXAMPLES = [
    "dump_teacher_topk",
    "train_kd_sft",
    "import_hf_llama",
    "export_hf_llama",
    "generate_answers",
    "filter_answers",
    "evaluate_students",
]


def documented_tree() -> list[str]:
    """The files and folders (with a slash at the end) of docs/architecture.md, in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```text\n(nemo_kd/.*?)```", text, re.DOTALL)
    assert block is not None
    paths: list[str] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        paths.append("".join(folders[:depth]) + name)
        if name.endswith("/"):
            folders[depth:] = [name]
    return paths


def test_architecture_shows_the_tree() -> None:
    shown = documented_tree()
    assert len(shown) == len(set(shown))
    for path in shown:
        assert (ROOT / path).exists(), path
    folders = ("nemo_kd", "examples", "benchmarks", "studies")
    python = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name in ("loss", "cache", "chat")
    }
    assert {path for path in shown if path.endswith(".py")} == python


def test_the_reading_path_is_short() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## What to read first")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `(.+)`$", section, re.MULTILINE)
    assert len(files) > 10
    num_lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert num_lines < 3000


def test_functions_and_files_are_short() -> None:
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("name", EXAMPLES)
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
        ("generate_answers", "sampling", SamplingConfig),
        ("generate_answers", "server", ServerConfig),
        ("generate_answers", "capture", CaptureConfig),
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
            default = list(expected) if isinstance(expected, tuple) else expected
            assert shown[field.name] == default, field.name


def imported_by(path: Path) -> set[str]:
    return {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def test_only_the_host_imports_nemo() -> None:
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        place = path.relative_to(ROOT / "nemo_kd").parts[0]
        names = {name.split(".")[0] for name in imported_by(path)}
        if place != "nemo":
            assert not names & {"nemo", "lightning"}, path


def test_what_is_ours_and_each_host_know_no_other_host() -> None:
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        place = path.relative_to(ROOT / "nemo_kd").parts[0]
        parts = [name.split(".") for name in imported_by(path)]
        hosts = {part[1] for part in parts if part[0] == "nemo_kd" and len(part) > 1} & HOSTS
        if place != "runs.py":
            assert hosts <= {place}, f"{path} imports {hosts}"


def test_a_file_imports_only_from_those_above_it() -> None:
    names = [path.removesuffix(".py").removesuffix("/__init__") for path in documented_tree()]
    modules = [name.strip("/").replace("/", ".") for name in names]

    def place_of(module: str) -> int | None:
        found = [i for i, name in enumerate(modules) if f"{module}.".startswith(f"{name}.")]
        return max(found, default=None)

    num_checked = 0
    # nemo_kd/__init__.py only names what the loss offers.
    for path in set((ROOT / "nemo_kd").rglob("*.py")) - {ROOT / "nemo_kd" / "__init__.py"}:
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = place_of(".".join(part for part in parts if part != "__init__"))
        for module in imported_by(path):
            other = place_of(module)
            if own is not None and other is not None:
                assert other <= own, f"{path} imports {module}"
                num_checked += 1
    assert num_checked > 50


def test_the_student_never_meets_the_teacher() -> None:
    for own, other in (("teacher", "student"), ("student", "teacher")):
        for path in (ROOT / "nemo_kd" / own).glob("*.py"):
            assert not any(name.startswith(f"nemo_kd.{other}") for name in imported_by(path)), path


def test_only_hosts_read_megatrons_global_groups() -> None:
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        if path.relative_to(ROOT / "nemo_kd").parts[0] not in HOSTS:
            assert "parallel_state" not in path.read_text(), path


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_thin(name: str) -> None:
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text())
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 30
