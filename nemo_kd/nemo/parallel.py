"""Where the student's gradient and its metrics cross ranks in another way than NeMo has it."""

import inspect
from functools import cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from nemo_kd.student.terms import MeanTerms


def sum_gradients_of_qk_norms(model: Any) -> None:
    """Sum the gradients of the norms of q and k over the tensor-parallel ranks, in each backward.

    Each rank has the norm's whole weight and some of the heads. Megatron Core sums these gradients
    where its distributed optimizer finalizes them, and NeMo's own loop only with sequence
    parallelism: without this, the ranks' weights would part.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            parameter.register_hook(partial(_summed, group=group))


def _summed(gradient: Tensor, group: Any) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def means_on_every_rank(terms: MeanTerms) -> tuple[dict[str, Tensor], Tensor]:
    """Means of a step or a validation set over all replicas, in Megatron's groups; their weight."""
    has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
    return terms.means(
        parallel_state.get_data_parallel_group(),
        device=torch.cuda.current_device(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group() if has_stages else None,
        last_stage_rank=(
            parallel_state.get_pipeline_model_parallel_last_rank() if has_stages else None
        ),
    )


@cache
def schedule_multiplies_by_context_size() -> bool:
    """Whether Megatron Core's schedule multiplies a loss by the context-parallel size.

    It does in 0.12 and 0.13, by `output_tensor *= ...` in forward_step. Read off the source: no
    argument or attribute tells, and a version number would have to be guessed for other releases.
    """
    return "output_tensor *=" in inspect.getsource(schedules.forward_step)
