"""The presets of the second host: layouts that divide, models that fit, and docs/sizing.md's table.

PYTHONPATH=tests python tests/test_presets_bridge.py   # prints the table
"""

import re
import sys
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from test_presets import CONF, GPU_GB, MODELS, ROOT, Shape, leaves, table

BRIDGE = CONF / "bridge"
SHAPES = {
    "Llama-3-70B": MODELS["Llama-3-70B"],
    "Llama-3-8B": MODELS["Llama-3-8B"],
    "Qwen3-32B": Shape(64, 5120, 25600, 64, 8, 151936, own_head_dim=128, qk_norms=True),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 151936, tied=True, own_head_dim=128, qk_norms=True),
    "Minitron-8B": Shape(32, 4096, 16384, 48, 8, 256000, gated=False, own_head_dim=128),
    "Nemotron-Mini-4B": Shape(32, 3072, 9216, 24, 8, 256000, gated=False),
}
PRESETS = {
    "llama3_70b_to_8b": ("Llama-3-70B", "Llama-3-8B"),
    "minitron_8b_to_4b": ("Minitron-8B", "Nemotron-Mini-4B"),
    "qwen3_32b_to_4b": ("Qwen3-32B", "Qwen3-4B"),
}
NUM_GPUS = 8


@cache
def preset(name: str) -> tuple[DictConfig, DictConfig]:
    """The teacher's run and the student's."""
    with initialize_config_dir(str(BRIDGE), version_base=None):
        dump = compose("dump_teacher_topk", [f"+experiment={name}_dump"])
        return dump, compose("train_kd_sft", [f"+experiment={name}"])


def test_every_preset_is_known() -> None:
    files = {path.stem for path in (BRIDGE / "experiment").glob("*.yaml")}
    assert files == {name + end for name in PRESETS for end in ("", "_dump")}


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen3-4B", 4_022_468_096),
        ("Minitron-8B", 8.27e9),
        ("Nemotron-Mini-4B", 4.19e9),
    ],
)
def test_shapes_have_the_published_number_of_parameters(model: str, published: float) -> None:
    digits = 3 if isinstance(published, float) else 12
    number = SHAPES[model].num_parameters(SHAPES[model].vocab_size)
    assert f"{number:.{digits}g}" == f"{published:.{digits}g}"


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_divide(name: str) -> None:
    for config, model in zip(preset(name), PRESETS[name], strict=True):
        shape, tensor = SHAPES[model], config.model.tensor_model_parallel_size
        for size in (shape.heads, shape.groups, shape.ffn, shape.vocab_size, NUM_GPUS):
            assert size % tensor == 0
        assert config.model.sequence_parallel == (tensor > 1)
    dump, train = preset(name)
    replicas = NUM_GPUS // train.model.tensor_model_parallel_size
    assert train.train.global_batch_size % (train.train.micro_batch_size * replicas) == 0
    assert train.model.seq_length >= dump.data.max_seq_length


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_what_differs(name: str) -> None:
    for file, entry in ((name, "train_kd_sft"), (f"{name}_dump", "dump_teacher_topk")):
        settings = OmegaConf.load(BRIDGE / "experiment" / f"{file}.yaml")
        base = OmegaConf.load(BRIDGE / f"{entry}.yaml")
        for path, value in leaves(OmegaConf.to_container(settings)):
            assert OmegaConf.select(base, ".".join(path), throw_on_missing=False) != value
            assert path[-1] in OmegaConf.select(base, ".".join(path[:-1]))


@pytest.mark.parametrize("name", PRESETS)
def test_models_fit_their_gpus(name: str) -> None:
    assert sum(student_gb(name)) < 0.9 * GPU_GB
    assert sum(teacher_gb(name)) < 0.75 * GPU_GB


def test_docs_have_these_numbers() -> None:
    sizing = (ROOT / "docs" / "sizing.md").read_text()
    assert presets_table() in sizing
    for name in PRESETS:
        assert re.search(rf"`{name}`", sizing)


def student_gb(name: str) -> list[float]:
    """Weights, gradients, optimizer, logits and activations of one GPU: see docs/sizing.md."""
    config, shape = preset(name)[1], SHAPES[PRESETS[name][1]]
    tensor = config.model.tensor_model_parallel_size
    parameters = shape.num_parameters(shape.vocab_size) / tensor
    tokens = config.train.micro_batch_size * config.model.seq_length
    sizes = [
        2 * parameters,
        4 * parameters,
        12 * parameters / (NUM_GPUS // tensor),
        2 * tokens * shape.vocab_size / tensor,
        2 * tokens * shape.values_per_token * shape.num_layers / tensor,
    ]
    return [size / 1e9 for size in sizes]


def teacher_gb(name: str) -> list[float]:
    """Weights and blocks of logits of one GPU."""
    shape, tensor = SHAPES[PRESETS[name][0]], preset(name)[0].model.tensor_model_parallel_size
    return [2 * shape.num_parameters(shape.vocab_size) / tensor / 1e9, 2 * 2**29 / 1e9]


def presets_table() -> str:
    rows = []
    for name, (teacher, student) in PRESETS.items():
        dump, train = preset(name)
        parts = student_gb(name)
        rows.append(
            (
                f"`{name}`",
                f"{teacher}, TP {dump.model.tensor_model_parallel_size}",
                f"{sum(teacher_gb(name)):.1f}",
                f"{student}, TP {train.model.tensor_model_parallel_size}",
                *(f"{part:.2f}" for part in parts),
                f"**{sum(parts):.1f}**",
            )
        )
    return table(
        "preset | teacher | GB | student | weights | gradients | optimizer | logits | activations "
        "| sum, GB",
        rows,
    )


if __name__ == "__main__":
    sys.stdout.write(presets_table() + "\n")
