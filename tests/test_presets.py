"""The presets: their sizes fit the published models, and docs/sizing.md says what they take.

`python tests/test_presets.py` prints the tables of docs/sizing.md.
"""

import ast
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cache.codec import LogProbs, PackedCodec, Rows

ROOT = Path(__file__).parent.parent
CONF = ROOT / "examples" / "conf"
K = 100
# Keys of NeMo's that the YAML leaves out, so that those of a .nemo stay.
NEMOS_OWN = ("overlap_grad_sync", "apply_rope_fusion", "gradient_accumulation_fusion")
GPU_GB = 80
LLM = "collections/llm/gpt/model"  # of NeMo


@dataclass(frozen=True)
class Shape:
    """A model as its authors published it; docs/sizing.md names the source of each."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab_size: int  # the tokenizer's own, as NeMo counts it
    gated: bool = True  # three matrices in the feed-forward layer, not two
    qkv_bias: bool = False
    tied: bool = False  # embedding and output layer are one
    rows: int = 0  # of the embedding, where it has spare ones
    own_head_dim: int = 0  # where it is not hidden / heads
    qk_norms: bool = False  # of each head's query and key

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        head_dim = self.head_dim
        attention = 2 * self.hidden * head_dim * (self.heads + self.groups)
        bias = head_dim * (self.heads + 2 * self.groups) * self.qkv_bias
        norms = 2 * self.hidden * (1 if self.gated else 2)  # Nemotron's have a bias
        norms += 2 * head_dim * self.qk_norms
        return attention + bias + (2 + self.gated) * self.hidden * self.ffn + norms

    @property
    def values_per_token(self) -> int:
        """What a layer keeps of a token for its backward pass."""
        norms = 4 * self.hidden  # what goes into each of the two, and what comes out
        # Query and what comes out, key and value.
        attention = 2 * self.head_dim * (self.heads + self.groups)
        return norms + attention + (2 + self.gated) * self.ffn

    def num_parameters(self, vocab_rows: int) -> int:
        norm = self.hidden * (1 if self.gated else 2)
        embeddings = (2 - self.tied) * vocab_rows * self.hidden
        return self.num_layers * self.layer_parameters + embeddings + norm


MODELS = {
    "Nemotron-4-340B": Shape(96, 18432, 73728, 96, 8, 256000, gated=False),
    "Nemotron-4-15B": Shape(32, 6144, 24576, 48, 8, 256000, gated=False),
    "Llama-3-70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 128256, tied=True),
    "Qwen2-72B": Shape(80, 8192, 29568, 64, 8, 151646, qkv_bias=True, rows=152064),
    "Qwen2-7B": Shape(28, 3584, 18944, 28, 4, 151646, qkv_bias=True, rows=152064),
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "SmolLM2, 6 layers": Shape(6, 576, 1536, 9, 3, 49152, tied=True),
}
PRESETS = {
    "nemotron4_340b_to_15b": ("Nemotron-4-340B", "Nemotron-4-15B"),
    "llama3_70b_to_8b": ("Llama-3-70B", "Llama-3-8B"),
    "llama3_8b_to_1b": ("Llama-3.1-8B", "Llama-3.2-1B"),
    "qwen2_72b_to_7b": ("Qwen2-72B", "Qwen2-7B"),
    "smollm2_cpu": ("SmolLM2-135M", "SmolLM2, 6 layers"),
}


@dataclass(frozen=True)
class Run:
    """One side of a preset: a model at its layout."""

    shape: Shape
    config: DictConfig
    section: str  # "teacher" or "model"

    @property
    def on_cpu(self) -> bool:
        return bool(self.config.trainer.accelerator == "cpu")

    @property
    def tensor(self) -> int:
        return int(self.config[self.section].tensor_model_parallel_size)

    @property
    def pipeline(self) -> int:
        return int(self.config[self.section].pipeline_model_parallel_size)

    @property
    def world_size(self) -> int:
        return int(self.config.trainer.devices * self.config.trainer.num_nodes)

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def padded_vocab_size(self) -> int:
        """MegatronBaseModel._vocab_size_with_padding, or the rows that the import keeps."""
        multiple = 128 * self.tensor
        return self.shape.rows or math.ceil(self.shape.vocab_size / multiple) * multiple

    @property
    def local_parameters(self) -> float:
        """Of one rank of the first stage, which with PP=1 is the only one."""
        shape = self.shape
        embeddings = (1 if shape.tied or self.pipeline > 1 else 2) * self.padded_vocab_size
        layers = shape.num_layers / self.pipeline * shape.layer_parameters
        return (layers + embeddings * shape.hidden) / self.tensor

    def logits_bytes(self, micro_batch_size: int, length: int) -> float:
        value_bytes = 4 if self.on_cpu else 2
        return micro_batch_size * length * self.padded_vocab_size / self.tensor * value_bytes


@cache
def preset(name: str, *overrides: str) -> tuple[Run, Run]:
    """The teacher's run and the student's."""
    with initialize_config_dir(str(CONF), version_base=None):
        dump = compose("dump_teacher_topk", [f"+experiment={name}_dump", *overrides])
        train = compose("train_kd_sft", [f"+experiment={name}", *overrides])
    teacher, student = (MODELS[model] for model in PRESETS[name])
    return Run(teacher, dump, "teacher"), Run(student, train, "model")


def test_nemos_measure_of_flops_is_off() -> None:
    """With W&B as the only logger it would fail when the training has ended."""
    config = OmegaConf.load(CONF / "train_kd_sft.yaml")
    assert config.exp_manager.log_tflops_per_sec_per_gpu is False


def test_every_preset_is_known() -> None:
    files = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert files == {name + end for name in PRESETS for end in ("", "_dump")}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_divide(name: str) -> None:
    teacher, student = preset(name)
    assert teacher.shape.vocab_size == student.shape.vocab_size, "one tokenizer"
    for run in (teacher, student):
        shape, settings = run.shape, run.config[run.section]
        for size in (shape.heads, shape.groups, shape.ffn, run.padded_vocab_size):
            assert size % run.tensor == 0
        assert shape.num_layers % run.pipeline == 0
        assert run.world_size % (run.tensor * run.pipeline) == 0
        assert run.tensor <= run.config.trainer.devices, "tensor parallelism within a node"
        assert settings.sequence_parallel == (run.tensor > 1)
        assert run.config.trainer.precision == "bf16-mixed"
    on_gpu = not student.on_cpu
    assert student.config.model.get("apply_rope_fusion", False) == on_gpu
    assert student.config.model.get("gradient_accumulation_fusion", False) == on_gpu
    assert teacher.config.teacher.get("apply_rope_fusion", False) == on_gpu
    assert student.config.model.pipeline_model_parallel_size == 1, "docs/sizing.md counts so"
    data = student.config.model.data
    for source in (data.train_ds, data.validation_ds):
        assert source.global_batch_size % (source.micro_batch_size * student.data) == 0
        assert source.max_seq_length >= teacher.config.data.max_seq_length


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_differs(name: str) -> None:
    """And every key of it is one of the YAML's own, or one of NEMOS_OWN."""
    for file, entry in ((name, "train_kd_sft"), (f"{name}_dump", "dump_teacher_topk")):
        settings = OmegaConf.load(CONF / "experiment" / f"{file}.yaml")
        base = OmegaConf.to_container(OmegaConf.load(CONF / f"{entry}.yaml"))
        for path, value in leaves(OmegaConf.to_container(settings)):
            known: Any = base
            for key in path[:-1]:
                known = known[key]
            if path[-1] in known:
                assert known[path[-1]] != value, path
            else:
                assert path[-1] in NEMOS_OWN


def leaves(
    tree: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_the_published_experiment() -> None:
    teacher, student = preset("nemotron4_340b_to_15b")
    assert student.config.trainer.max_steps == 0.7 * 600_000
    objective = student.config.model.knowledge_distillation
    assert objective.kd_loss_weight == 1
    assert objective.sft_loss_weight > 0
    assert teacher.config.selection.kind == "top_k"
    assert teacher.config.selection.k == K


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_can_be_overridden(name: str) -> None:
    for run in preset(name, "trainer.devices=3"):
        assert run.config.trainer.devices == 3


@pytest.mark.parametrize(
    ("model", "vocab_rows", "published"),
    [
        ("Llama-3-70B", 128256, 70_553_706_496),
        ("Llama-3-8B", 128256, 8_030_261_248),
        ("Llama-3.1-8B", 128256, 8_030_261_248),
        ("Llama-3.2-1B", 128256, 1_235_814_400),
        ("Qwen2-72B", 152064, 72_706_203_648),
        ("Qwen2-7B", 152064, 7_615_616_512),
        ("SmolLM2-135M", 49152, 134_515_008),
        # theirs are rounded, and 0 rows: without the embeddings
        ("Nemotron-4-340B", 0, 331.6e9),
        ("Nemotron-4-340B", 256000, 331.6e9 + 9.4e9),
        ("Nemotron-4-15B", 0, 12.5e9),
    ],
)
def test_shapes_have_the_published_number_of_parameters(
    model: str, vocab_rows: int, published: float
) -> None:
    digits = 3 if isinstance(published, float) else 12
    number = MODELS[model].num_parameters(vocab_rows)
    assert f"{number:.{digits}g}" == f"{published:.{digits}g}"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("Nemotron-4-340B", "nemotron.Nemotron4Config340B"),
        ("Nemotron-4-15B", "nemotron.Nemotron4Config15B"),
        ("Llama-3-70B", "llama.Llama3Config70B"),
        ("Llama-3-8B", "llama.Llama3Config8B"),
        ("Llama-3.1-8B", "llama.Llama31Config8B"),
        ("Llama-3.2-1B", "llama.Llama32Config1B"),
        ("Qwen2-72B", "qwen2.Qwen2Config72B"),
        ("Qwen2-7B", "qwen2.Qwen2Config7B"),
    ],
)
def test_shapes_are_those_of_nemos_own_configs(model: str, config: str) -> None:
    module, name = config.split(".")
    nemo = defaults_of(name, ast.parse((nemo_directory() / LLM / f"{module}.py").read_text()))
    assert MODELS[model] == Shape(
        nemo["num_layers"],
        nemo["hidden_size"],
        nemo["ffn_hidden_size"],
        nemo["num_attention_heads"],
        nemo["num_query_groups"],
        MODELS[model].vocab_size,
        nemo.get("gated_linear_unit", False),
        nemo.get("add_qkv_bias", False),
        nemo["share_embeddings_and_output_weights"],
        MODELS[model].rows,
    )


def defaults_of(name: str, module: ast.Module) -> dict[str, Any]:
    """A dataclass's literal defaults, inherited ones too.

    Read, not imported: nemo.collections.llm imports more than nemo.collections.nlp needs.
    """
    found = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    defaults: dict[str, Any] = {}
    for node in found:
        for base in node.bases:
            defaults |= defaults_of(ast.unparse(base), module)
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant):
                defaults[ast.unparse(line.target)] = line.value.value
    return defaults


def nemo_directory() -> Path:
    return Path(next(iter(find_spec("nemo").submodule_search_locations)))


@pytest.mark.parametrize("table", ["models", "layouts", "students", "teachers", "caches"])
def test_docs_have_these_numbers(table: str) -> None:
    assert tables()[table] in (ROOT / "docs" / "sizing.md").read_text()


def test_students_fit_their_gpus() -> None:
    for name in PRESETS:
        teacher, student = preset(name)
        assert sum(student_gb(student)[part] for part in COUNTED) < 0.9 * GPU_GB
        assert sum(teacher_gb(teacher)) < 0.75 * GPU_GB


# The tables of docs/sizing.md, in GB of 10^9 bytes.

COUNTED = ("weights", "gradients", "optimizer", "logits", "activations")


def student_gb(run: Run) -> dict[str, float]:
    """Of one GPU; on the CPU all is float32, and AdamW keeps no second copy of the weights."""
    data = run.config.model.data.train_ds
    parameters, shape = run.local_parameters, run.shape
    tokens = data.micro_batch_size * data.max_seq_length
    value_bytes = 4 if run.on_cpu else 2
    logits = run.logits_bytes(data.micro_batch_size, data.max_seq_length)
    weight_gradient = 4 * run.padded_vocab_size / run.tensor * shape.hidden
    block = min(logits, 2**26 if run.on_cpu else 2**29)
    activations = value_bytes * tokens * shape.values_per_token * shape.num_layers / run.tensor
    sizes = {
        "weights": value_bytes * parameters,
        "gradients": 4 * parameters,
        "optimizer": (8 if run.on_cpu else 12 / run.data) * parameters,
        "logits": logits,
        "fused": block + weight_gradient,
        "activations": activations,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def teacher_gb(run: Run) -> tuple[float, float]:
    """Weights and logits of one GPU."""
    value_bytes = 4 if run.on_cpu else 2
    data = run.config.data
    logits = run.logits_bytes(data.micro_batch_size, data.max_seq_length) * 4 / value_bytes
    block = min(logits, 2**26 if run.on_cpu else 2**29)
    return value_bytes * run.local_parameters / 1e9, 2 * block / 1e9


def packed_row_bytes(vocab_size: int) -> float:
    """Of a row of K entries, as the codec packs 500 of them."""
    rng, num_rows = np.random.default_rng(0), 500
    ids = np.concatenate([rng.choice(vocab_size, K, replace=False) for _ in range(num_rows)])
    log_probs = -rng.random(num_rows * K, dtype=np.float32)
    tails = np.full(num_rows, -1, np.float32)
    rows = Rows(np.full(num_rows, K), ids, log_probs, tails)
    packed = PackedCodec(vocab_size, LogProbs()).encode(rows)
    return float(packed["packed_rows"].size / num_rows)


@cache
def tables() -> dict[str, str]:
    """Each table of docs/sizing.md."""
    runs = {name: preset(name) for name in PRESETS}
    models = [
        (
            name,
            shape.num_layers,
            f"{shape.hidden:,}",
            f"{shape.ffn:,}",
            shape.heads,
            shape.groups,
            f"{shape.vocab_size:,}",
            f"{shape.num_parameters(shape.vocab_size) / 1e9:.2f}",
        )
        for name, shape in MODELS.items()
    ]
    layouts = [
        (
            f"`{name}{'_dump' * (side == 0)}`",
            PRESETS[name][side],
            run.world_size,
            run.tensor,
            run.pipeline,
            run.data,
            f"{run.padded_vocab_size:,}",
        )
        for name, pair in runs.items()
        for side, run in enumerate(pair)
    ]
    students = []
    for name, (_, run) in runs.items():
        sizes = student_gb(run)
        data = run.config.model.data.train_ds
        batch = f"{data.global_batch_size} / {data.micro_batch_size}"
        total = sum(sizes[part] for part in COUNTED)
        columns = [f"{size:.2f}" for size in sizes.values()]
        students.append((f"`{name}`", batch, *columns, f"**{total:.1f}**"))
    teachers = [
        (f"`{name}_dump`", run.config.data.micro_batch_size, *(f"{x:.2f}" for x in teacher_gb(run)))
        for name, (run, _) in runs.items()
    ]
    caches = []
    for vocab_size in sorted({shape.vocab_size for shape in MODELS.values()}):
        row = packed_row_bytes(vocab_size)
        sample = 500 * row + 750 * 5 + 88
        caches.append(
            (f"{vocab_size:,}", f"{row:.0f}", f"{sample / 500:.0f}", f"{2e-3 * sample:.0f}")
        )
    return {
        "models": table(
            "model | layers | hidden | FFN | heads | KV groups | vocabulary | parameters, 10^9",
            models,
        ),
        "layouts": table("preset | model | GPUs | TP | PP | DP | padded vocabulary", layouts),
        "students": table(
            "preset | batch: global / micro | weights | gradients | optimizer | logits "
            "| instead, fused | activations | sum, not fused",
            students,
        ),
        "teachers": table("preset | micro batch | weights | logits", teachers),
        "caches": table("vocabulary | row | with its share of the rest | 10^9 tokens, GB", caches),
    }


def table(header: str, rows: list[tuple[Any, ...]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables().values()) + "\n")
