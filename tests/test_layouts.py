"""A layout, a batch or a length that does not fit the model stops with one sentence."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from runs import EXAMPLES

from nemo_kd.layout import (
    check_expert_training,
    check_layout,
    check_replica,
    check_sequence_length,
    check_slices,
)
from nemo_kd.student.dataset import padding_multiple

MODEL = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_layers": 6,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "position_embedding_type": "rope",
    "encoder_seq_length": 128,
    "max_position_embeddings": 128,
}


def model(**changes: object) -> DictConfig:
    return OmegaConf.create(MODEL | changes)


@pytest.mark.parametrize(
    ("changes", "num_processes", "num_replicas"),
    [
        ({}, 3, 3),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, 12, 2),
        ({"context_parallel_size": 2}, 4, 2),
        ({"tensor_model_parallel_size": 4, "num_query_groups": None}, 4, 1),
        ({"expert_model_parallel_size": 2, "num_moe_experts": 4}, 4, 4),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            2,
            1,
        ),
        # Megatron divides the layers itself.
        ({"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 3}, 4, 1),
        (
            {
                "pipeline_model_parallel_size": 4,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            4,
            1,
        ),
    ],
)
def test_what_divides_is_laid_out(
    changes: dict[str, object], num_processes: int, num_replicas: int
) -> None:
    assert check_layout(model(**changes), num_processes, "model") == num_replicas


@pytest.mark.parametrize(
    ("changes", "num_processes", "message"),
    [
        ({"tensor_model_parallel_size": 2}, 3, "processes divisible by tensor 2 x pipeline 1"),
        ({"context_parallel_size": 2}, 1, "x context 2 parallel sizes, got 1"),
        (
            {"tensor_model_parallel_size": 3},
            3,
            "teacher.tensor_model_parallel_size to divide the model's num_attention_heads, 8, got",
        ),
        ({"tensor_model_parallel_size": 4}, 4, "num_query_groups, 2, got 4"),
        ({"tensor_model_parallel_size": 2, "ffn_hidden_size": 33}, 2, "ffn_hidden_size, 33, got 2"),
        ({"expert_model_parallel_size": 2}, 2, "parallel_size=1 for a model without experts, got"),
        (
            {"expert_model_parallel_size": 2, "num_moe_experts": 5},
            2,
            "teacher.expert_model_parallel_size to divide the model's num_moe_experts, 5, got 2",
        ),
        (
            {"expert_model_parallel_size": 4, "num_moe_experts": 8},
            2,
            "x tensor 1 parallel sizes to divide the 2 processes of a pipeline stage, got 4",
        ),
        (
            {"tensor_model_parallel_size": 2, "num_moe_experts": 8, "moe_ffn_hidden_size": 33},
            2,
            "moe_ffn_hidden_size, 33, got 2",
        ),
        (
            {"pipeline_model_parallel_size": 4},
            4,
            "teacher.pipeline_model_parallel_size to divide the model's num_layers, 6, got 4",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            2,
            "got 2 x virtual_pipeline_model_parallel_size 2",
        ),
    ],
)
def test_what_does_not_divide_is_refused(
    changes: dict[str, object], num_processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(model(**changes), num_processes, "teacher")


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 128, None),
        ({}, 129, r"data.max_seq_length of at most the model's 128 positions, got 129; .*\+model"),
        ({"encoder_seq_length": 256}, 256, None),  # the user says that the model takes more
        ({"position_embedding_type": "learned_absolute"}, 129, "got 129; lower it$"),
        ({"position_embedding_type": None, "encoder_seq_length": 256}, 129, "128 positions"),
        ({"encoder_seq_length": None, "max_position_embeddings": None}, 9999, None),
    ],
    ids=["fits", "rotary", "extrapolates", "learned", "learned by default", "unknown"],
)
def test_longer_sequences_than_the_models_are_refused(
    changes: dict[str, object], length: int, message: str | None
) -> None:
    def check() -> None:
        check_sequence_length(model(**changes), "model", length, "data.max_seq_length")

    if message is None:
        return check()
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("train_ds", {}, None),
        ("train_ds", {"micro_batch_size": 4}, "data.train_ds.global_batch_size divisible by its"),
        (
            "validation_ds",
            {"global_batch_size": 10},
            "data.validation_ds.global_batch_size .* 2 x data-parallel size 2, got 10",
        ),
        ("validation_ds", {"max_seq_length": 129}, "model.data.validation_ds.max_seq_length of"),
    ],
)
def test_batches_fit_the_layout(name: str, changes: dict[str, int], message: str | None) -> None:
    from nemo_kd.nemo.train import check_batches

    batch = {"global_batch_size": 12, "micro_batch_size": 2, "max_seq_length": 128}
    data = {"train_ds": batch, "validation_ds": batch}
    config = model(data=data | {name: batch | changes}, tensor_model_parallel_size=2)
    if message is None:
        return check_batches(config, 4)
    with pytest.raises(ValueError, match=message):
        check_batches(config, 4)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 47, None),
        ({"context_parallel_size": 2}, 48, None),
        ({"context_parallel_size": 2}, 46, "seq_length divisible by 4, the slices .*, got 46"),
        (
            {
                "tensor_model_parallel_size": 8,
                "context_parallel_size": 4,
                "sequence_parallel": True,
            },
            96,
            "divisible by 64",
        ),
    ],
)
def test_context_and_sequence_parallelism_divide_the_length(
    changes: dict[str, object], length: int, message: str | None
) -> None:
    if message is None:
        return check_slices(model(**changes), length, "seq_length")
    with pytest.raises(ValueError, match=message):
        check_slices(model(**changes), length, "seq_length")


def test_experts_train_at_tensor_parallel_sizes_with_sequence_parallelism() -> None:
    experts = model(tensor_model_parallel_size=2, num_moe_experts=4)
    with pytest.raises(ValueError, match=r"expected model.sequence_parallel=true .*_size=2, got"):
        check_expert_training(experts, "model")
    check_expert_training({**experts, "sequence_parallel": True}, "model")
    check_expert_training(model(tensor_model_parallel_size=2), "model")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (8, 2), (8, 4), (4, 16), (32, 8)])
def test_batches_are_padded_to_what_the_ranks_divide(
    tensor: int, context: int, sequence_parallel: bool
) -> None:
    """Also above tensor x context = 16, which is what a host pads to by itself."""
    layout = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
    config = OmegaConf.create(layout | {"sequence_parallel": sequence_parallel})
    check_slices(config, padding_multiple(config), "the batch")


def test_ranks_may_share_a_group_on_bridge() -> None:
    wide = model(tensor_model_parallel_size=4)
    with pytest.raises(ValueError, match="to divide the model's num_query_groups, 2, got 4"):
        check_layout(wide, 4, "model")
    assert check_layout(wide, 4, "model", shares_groups=True) == 1
    with pytest.raises(ValueError, match="num_query_groups, 3"):
        check_layout(model(tensor_model_parallel_size=4, num_query_groups=3), 4, "m", "", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size: the teacher run has none, got 2"),
        ({"expert_tensor_parallel_size": 1}, "multiple of tensor_model_parallel_size 2"),
        ({"expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}, None),
        ({}, None),
    ],
)
def test_the_teachers_experts_are_on_all_ranks(
    changes: dict[str, object], message: str | None
) -> None:
    sizes = {"tensor_model_parallel_size": 2, "num_moe_experts": 4, "context_parallel_size": 1}
    teacher = model(**sizes | {"virtual_pipeline_model_parallel_size": None} | changes)
    if message is None:
        check_replica(teacher, "model")
    else:
        with pytest.raises(ValueError, match=message):
            check_replica(teacher, "model")


OVERLAPS = {
    "virtual_pipeline_model_parallel_size=2": "expected null, got 2",
    "ub_tp_comm_overlap=true": "ub_tp_comm_overlap=true needs pad_to_max_length=true",
    "defer_embedding_wgrad_compute=true": "defer_embedding_wgrad_compute: expected false with",
}


@pytest.mark.parametrize("override", OVERLAPS)
def test_overlaps_that_cannot_be_are_refused(override: str) -> None:
    from nemo_kd.nemo.train import check_overlaps

    fused = "model.knowledge_distillation.fuse_output_layer=true"
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        config = compose("train_kd_sft", [f"+model.{override}", fused])
        plain = compose("train_kd_sft", [fused])
    with pytest.raises(ValueError, match=re.escape(OVERLAPS[override])):
        check_overlaps(config.model)
    check_overlaps(plain.model)


def test_what_a_student_was_trained_with_is_not_inherited(nemos: dict[str, Path]) -> None:
    from nemo_kd.nemo.nemo_file import read_model_config
    from nemo_kd.nemo.train import merge_model_config

    student = read_model_config(str(nemos["tied"]), "student")
    set_before = {
        "virtual_pipeline_model_parallel_size": 2,
        "ub_tp_comm_overlap": True,
        "defer_embedding_wgrad_compute": True,
    }
    with open_dict(student):
        student.update(set_before)
    directory = nemos["tied"].parent
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        files = [
            f"model.data.{name}_ds.file_names=[{directory}]" for name in ("train", "validation")
        ]
        config = compose("train_kd_sft", files)
    merged = merge_model_config(config, student)
    assert [bool(merged[key]) for key in set_before] == [False] * 3
