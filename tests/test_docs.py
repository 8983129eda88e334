"""What README, docs/ and the comments of the YAML tell a reader to type: it runs, or it parses."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import MAX_SEQ_LENGTH

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What runs an entry -> its YAML. The first that fits counts.
ENTRIES = {
    "bridge/dump_teacher_topk.py": "bridge/dump_teacher_topk",
    "nemo-kd dump --host bridge": "bridge/dump_teacher_topk",
    "bridge/train_kd_sft.py": "bridge/train_kd_sft",
    "nemo-kd train --host bridge": "bridge/train_kd_sft",
    "dump_teacher_topk.py": "dump_teacher_topk",
    "dump_array.sh": "dump_teacher_topk",
    "nemo-kd dump": "dump_teacher_topk",
    "train_kd_sft.py": "train_kd_sft",
    "train.sh": "train_kd_sft",
    "nemo-kd train": "train_kd_sft",
    "import_hf_llama.py": "import_hf_llama",
    "nemo-kd import-hf": "import_hf_llama",
    "export_hf_llama.py": "export_hf_llama",
    "nemo-kd export-hf": "export_hf_llama",
    "rounds.py": "rounds",
    "filter_answers.py": "filter_answers",
    "nemo-kd filter": "filter_answers",
    "evaluate_students.py": "evaluate_students",
    "nemo-kd evaluate": "evaluate_students",
    "generate_answers.py": "generate_answers",
    "nemo-kd generate": "generate_answers",
}
CALL = re.compile(rf"(?:^|\s|/)({'|'.join(map(re.escape, ENTRIES))})\s+(\S.*)$")
# What makes a command of the README a run of seconds, on a CPU and with tiny models.
SMALL = {
    "dump_teacher_topk.py": [
        "trainer.accelerator=cpu",
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
        "data.num_workers=0",
    ],
    "train_kd_sft.py": [
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        *(
            f"model.data.{name}.{key}={value}"
            for name in ("train_ds", "validation_ds")
            for key, value in {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "max_seq_length": MAX_SEQ_LENGTH,
                "num_workers": 0,
            }.items()
        ),
        "model.optim.sched.warmup_steps=1",
    ],
}


# The README says that this is the same as the script.
TRAIN = "nemo-kd train"


def lines_of(text: str) -> Iterator[str]:
    """Its commands, one a line: joined where a backslash ends a line, and without comments."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in text.splitlines():
        yield re.sub(r"(^|\s)#.*", "", line).strip()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def calls(text: str) -> list[tuple[str, list[str]]]:
    """For each command that runs an entry: the name of its YAML, and its overrides."""
    found = [CALL.search(line) for line in lines_of(text)]
    return [(ENTRIES[call[1]], shlex.split(call[2])) for call in found if call]


def compose_command(name: str, overrides: list[str]) -> None:
    """Hydra knows every key. Every value is given, unless `...` says that some are left out."""
    path = ROOT / "examples" / "conf" / name
    with initialize_config_dir(str(path.parent), version_base=None):
        config = compose(path.name, [word for word in overrides if word != "..."])
    if "..." not in overrides:
        assert not OmegaConf.missing_keys(config), overrides


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_compose(page: Path) -> None:
    for block in blocks(page, "bash"):
        # Shell functions pass on their arguments: the checklist's test below has these.
        for name, overrides in calls(block):
            if not any("$@" in word for word in overrides):
                compose_command(name, overrides)


def test_the_commands_of_the_gpu_checklist_compose() -> None:
    """Its tables call shell functions, which its first blocks define for each host."""
    page = ROOT / "docs" / "gpu_checklist.md"
    functions = dict(
        re.findall(
            r"^((?:hf_)?(?:dump|train))\(\) \{(.*?); \}$", page.read_text(), re.DOTALL | re.M
        )
    )
    cells = re.findall(r"`([^`\n]+)`", page.read_text())
    lines = [line for cell in cells for line in cell.split(" && ")]
    found = [re.match(r"(?:[A-Z_]+=\S+ )*((?:hf_)?(?:dump|train))( .*)?$", line) for line in lines]
    commands = [(call[1], call[2] or "") for call in found if call]
    assert len(commands) > 10
    assert {function for function, _ in commands} == functions.keys()
    for function, arguments in commands:
        text = functions[function].replace('"$@"', arguments).replace("$NAME", "name")
        for name, overrides in calls(text):
            compose_command(name, overrides)


def commented_command(path: Path) -> str:
    """The command in a file's comments: lines that begin with # and three spaces."""
    found = re.search(r"^(?:#   .*\n)+", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} does not show how it is called"
    return re.sub(r"^#", "", found[0], flags=re.MULTILINE)


COMMENTED = [
    *sorted((ROOT / "examples" / "conf").rglob("*.yaml")),
    ROOT / "examples" / "slurm" / "dump_array.sh",
    ROOT / "examples" / "slurm" / "train.sh",
]


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.name)
def test_the_command_in_a_files_comments_composes(path: Path) -> None:
    ((name, overrides),) = calls(commented_command(path))
    if path.parent.name == "experiment":
        assert f"+experiment={path.stem}" in overrides
    elif path.suffix == ".yaml":
        assert Path(name).name == path.stem
    assert "..." not in overrides
    compose_command(name, overrides)


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
                if page.name == "README.md":
                    linked.add(target)
    assert {f"docs/{page.name}" for page in PAGES if page.name != "README.md"} <= linked


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        code = "\n".join([*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", page.read_text())])
        assert set(re.findall(r"(?:^|&& )make ([a-z-]+)", code, re.MULTILINE)) <= targets, page


def test_the_python_of_the_readme_runs() -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(compile(snippet, "README.md", "exec"), namespace := {})
    gradient = namespace["logits"].grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_the_readme_has_the_figures_of_the_docs() -> None:
    readme = (ROOT / "README.md").read_text()
    study = (ROOT / "docs" / "study.md").read_text()
    rows = re.findall(r"\| \d+ (?:\| \d+\.\d+ ± \d+\.\d+ ){2}\|", readme)
    assert len(rows) == 4
    for row in rows:
        assert row in study
    (num_bytes,) = re.findall(r"(\d+) bytes per answer token for a vocabulary of 128,256", readme)
    sizing = (ROOT / "docs" / "sizing.md").read_text()
    assert re.search(rf"\| 128,256 \| \d+ \| {num_bytes} \|", sizing), "with all files"


@pytest.mark.timeout(900)  # six processes, one after the other
def test_the_three_steps_of_the_readme_run(
    nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    """With tiny models in one process; then the export of docs/checkpoints.md. nemos imports."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, model in (("teacher", "untied"), ("student", "tied")):
        (tmp_path / f"{name}.nemo").symlink_to(nemos[model])
    for name in ("train", "heldout"):
        shutil.copyfile(jsonl, tmp_path / f"{name}.jsonl")
    (steps,) = (block for block in blocks(ROOT / "README.md", "bash") if "torchrun" in block)
    (export,) = (
        block
        for block in blocks(ROOT / "docs" / "checkpoints.md", "bash")
        if "export_hf_llama.py" in block
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    num_run = 0
    for command in [*lines_of(steps), *lines_of(export)]:
        if not command or command.startswith("hf download") or "import_hf_llama.py" in command:
            continue
        for script, settings in SMALL.items():
            if script in command:
                command = shlex.join([*shlex.split(command), *settings])
        command = command.replace("torchrun --nproc-per-node 8 examples/train_kd_sft.py", TRAIN)
        command = command.replace("torchrun --nproc-per-node 8", "python")
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-6000:]}"
        num_run += 1
    assert num_run == 6
    assert (tmp_path / "kd.nemo").exists()
    assert (tmp_path / "kd-hf" / "config.json").exists()


def test_the_data_and_the_models_of_the_cluster_page(tmp_path: Path) -> None:
    """The commands that split the data and unpack the models, on files that stand for them."""
    lines = [f'{{"input": "{number}", "output": "x"}}' for number in range(1100)]
    (tmp_path / "all.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "model_config.yaml").write_text("a: 1\n")
    for name in ("teacher", "student"):
        with tarfile.open(tmp_path / f"{name}.nemo", "w") as tar:
            tar.add(tmp_path / "model_config.yaml", "model_config.yaml")
    page = blocks(ROOT / "docs" / "cluster.md", "bash")
    chosen = [block for block in page if "shuf" in block or "tar -xf" in block]
    assert len(chosen) == 2
    for block in chosen:
        subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True)
    heldout, train = (
        (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("heldout", "train")
    )
    assert len(heldout) == 1000
    assert sorted([*heldout, *train]) == sorted(lines)
    assert (tmp_path / "student" / "model_config.yaml").exists()


def test_the_tests_of_the_reliability_page_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| (?!fault|---)", line)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", row.rsplit("|", 2)[-2])
        assert named, row
        for path, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), row
