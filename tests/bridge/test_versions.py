"""What nemo_kd/bridge uses of Bridge is in the newest release too, as its wheel has it.

The wheel is read, not installed: its dependencies are CUDA builds for another Python.
"""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NEWEST = "0.6.2"
SOURCES = sorted((Path(__file__).parents[2] / "nemo_kd" / "bridge").glob("*.py"))
# Modules that the newest release has under another name, which the code tries as well.
RENAMED = {"megatron.bridge.data.datasets.sft": "megatron.bridge.data.datasets.gpt_sft"}
MOVED = {
    ("megatron.bridge.data.datasets.sft", "GPTSFTPackedDataset"): (
        "megatron.bridge.data.packing.gpt_sft"
    )
}
# Methods, fields and keywords, by the class or the module that has them: what is called on objects.
SFT = "megatron.bridge.data.datasets.gpt_sft:GPTSFTDataset"
AUTO = "megatron.bridge.models.conversion.auto_bridge:AutoBridge"
PROVIDER = "megatron.bridge.models.model_provider:ModelProviderMixin"
USED: dict[str, dict[str, tuple[str, ...]]] = {
    AUTO: {
        "from_hf_pretrained": (),
        "to_megatron_provider": ("load_weights",),
        "get_conversion_tasks": (),
        "save_hf_pretrained": ("show_progress",),
        "_model_bridge": (),
    },
    PROVIDER: {
        "register_pre_wrap_hook": ("prepend",),
        "provide_distributed_model": ("wrap_with_ddp",),
        "initialize_model_parallel": ("seed",),
    },
    SFT: {
        "__init__": (
            *("max_seq_length", "min_seq_length", "pad_seq_length_to_mult", "add_bos", "add_eos"),
            *("add_sep", "sep_id", "max_num_samples", "seed", "label_key", "answer_only_loss"),
            *("truncation_field", "index_mapping_dir", "prompt_template", "memmap_workers"),
            *("truncation_method", "get_attention_mask_from_fusion"),
        ),
        "_load_dataset": (),
        "_maybe_validate_prompt_template": (),
        "_build_samples_mapping": (),
        "_build_loss_mask": (),
        "_process_example": (),
        "_ceil_to_nearest": (),
        "collate_fn": (),
    },
    "megatron.bridge.data.packing.gpt_sft:GPTSFTPackedDataset": {
        **dict.fromkeys(("_load_dataset", "_build_samples_mapping", "_build_loss_mask"), ()),
        "collate_fn": (),
    },
    "megatron.bridge.data.datasets.utils:_OnlineSampleMapping": {"__init__": ("seed",)},
    "megatron.bridge.data.base:DatasetProvider": {"build_datasets": ()},
    "megatron.bridge.models.conversion.param_mapping:MegatronParamMapping": {
        "scatter_to_tp_ranks": ()
    },
    "megatron.bridge.training.callbacks:CallbackManager": {"register": ()},
    "megatron.bridge.training.callbacks:CallbackContext": {
        **dict.fromkeys(("state", "optimizer", "scheduler"), ())
    },
    "megatron.bridge.training.state:TrainState": {"step": (), "consumed_valid_samples": ()},
    "megatron.bridge.training.state:GlobalState": {
        **dict.fromkeys(("cfg", "train_state", "signal_handler"), ())
    },
    "megatron.bridge.training.config:ConfigContainer": {
        **dict.fromkeys(("train", "model", "optimizer", "scheduler", "dataset", "logger"), ()),
        **dict.fromkeys(("tokenizer", "checkpoint", "rng", "ddp", "dist", "peft"), ()),
        "mixed_precision": (),
    },
    "megatron.bridge.peft.base:PEFT": {"set_params_to_save": ()},
    "megatron.bridge.peft.lora:LoRA": {
        **dict.fromkeys(("target_modules", "dim", "alpha", "dropout", "dropout_position"), ())
    },
    "megatron.bridge.peft.adapter_wrapper:AdapterWrapper": {"__init__": ("to_wrap", "adapter")},
    "megatron.bridge.training.pretrain": {"pretrain": ("callbacks",)},
    "megatron.bridge.training.initialize": {
        "initialize_megatron": ("allow_no_cuda",),
        "_set_random_seed": ("pg_collection",),
    },
    "megatron.bridge.training.utils.pg_utils": {"get_pg_collection": ()},
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    path = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(path)]
    target = ["--only-binary", ":all:", "--python-version", "3.12", f"megatron-bridge=={NEWEST}"]
    got = subprocess.run([*pip, *target], capture_output=True, text=True, timeout=120)
    if got.returncode:
        pytest.skip(f"no megatron-bridge {NEWEST} from the registry: {got.stderr.strip()[-200:]}")
    (file,) = path.glob("*.whl")
    zipfile.ZipFile(file).extractall(path)
    return path


def module(wheel: Path, name: str) -> ast.Module | None:
    base = wheel / name.replace(".", "/")
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((ast.parse(file.read_text()) for file in files if file.exists()), None)


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Of a module or class, and of the blocks in it that are no functions and no classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from statements(node)


def defined(tree: ast.AST) -> dict[str, ast.stmt]:
    """The statement that defines or imports each name of a module or class."""
    found: dict[str, ast.stmt] = {}
    for node in statements(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                elements = target.elts if isinstance(target, ast.Tuple) else [target]
                found |= {each.id: node for each in elements if isinstance(each, ast.Name)}
    return found


def imported() -> dict[tuple[str, str | None], str]:
    """Each module of Bridge that is imported, and each name of one, with the file that does it."""
    found: dict[tuple[str, str | None], str] = {}
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        modules = {}  # by the name that they have in the file
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("megatron.bridge"):
                        found[alias.name, None] = source.name
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron.b"):
                for alias in node.names:
                    found[str(node.module), alias.name] = source.name
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id, "")
                if owner.rpartition(".")[2].islower():  # a module, and not a class
                    found[owner, node.attr] = source.name
    return found


def missing_imports(wheel: Path) -> list[str]:
    missing = []
    for (name, attribute), source in imported().items():
        tree = module(wheel, MOVED.get((name, str(attribute)), RENAMED.get(name, name)))
        is_module = module(wheel, f"{name}.{attribute}") is not None
        if tree is None or not (attribute is None or is_module or attribute in defined(tree)):
            missing.append(f"{source}: {name} {attribute or ''}")
    return missing


def missing_members(wheel: Path) -> list[str]:
    missing = []
    for owner, members in USED.items():
        name, _, class_name = owner.partition(":")
        tree: ast.AST | None = module(wheel, name)
        if tree is not None and class_name:
            tree = defined(tree).get(class_name)
        names = defined(tree) if tree is not None else {}
        if class_name and "__init__" in names:  # fields that it sets
            names |= {
                node.attr: names["__init__"]
                for node in ast.walk(names["__init__"])
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
        for member, keywords in members.items():
            node = names.get(member)
            if node is None:
                missing.append(f"{owner} {member}")
            elif isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                known = {argument.arg for argument in arguments}
                takes_all = node.args.kwarg is not None
                unknown = [] if takes_all else [word for word in keywords if word not in known]
                missing += [f"{owner} {member}({word}=)" for word in unknown]
    return missing


def test_every_name_is_in_the_newest_release(wheel: Path) -> None:
    assert len(imported()) > 20
    assert missing_imports(wheel) + missing_members(wheel) == []
    events = (wheel / "megatron/bridge/training/callbacks.py").read_text()
    for event in "on_train_start", "on_train_end", "on_eval_end":
        assert event in events


def test_a_name_that_is_gone_is_found(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(USED, PROVIDER, {"provide_distributed_model": ("wrap_with_dpp",)})
    monkeypatch.setitem(USED, AUTO, {"from_hugging_face": ()})
    assert missing_members(wheel) == [
        f"{AUTO} from_hugging_face",
        f"{PROVIDER} provide_distributed_model(wrap_with_dpp=)",
    ]
    monkeypatch.setattr(sys.modules[__name__], "RENAMED", {})
    assert [line.split()[1] for line in missing_imports(wheel)] == [
        "megatron.bridge.data.datasets.sft"
    ] * 2
