"""A .nemo that was written without a GPU is restored with one, and nothing else may be missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from nemo_models import restore


def changed_model(change: Any) -> type:
    """NeMo's model, whose module is changed before its weights are read."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    class Changed(MegatronGPTSFTModel):
        def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
            module = super().model_provider_func(pre_process, post_process)
            change(module)
            return module

    return Changed


def with_state(module: Any) -> None:
    """Give a norm what each layer of Transformer Engine has: an entry _extra_state."""
    norm = module.decoder.final_layernorm
    methods = {
        "get_extra_state": lambda self: None,
        "set_extra_state": lambda self, state: None,
    }
    norm.__class__ = type("Norm", (type(norm),), methods)
    assert "decoder.final_layernorm._extra_state" in module.state_dict()


def with_more_weights(module: Any) -> None:
    more = torch.nn.Parameter(torch.ones(3))
    module.decoder.final_layernorm.register_parameter("more", more)


def restored(rank: int, world_size: int, nemo: Path, change: str) -> dict[str, torch.Tensor]:
    """The weights of the changed model."""
    from nemo_kd.nemo import cpu_backend

    cpu_backend.enable()
    changes = {"state": with_state, "weights": with_more_weights, "nothing": id}
    model = restore(nemo, model_class=changed_model(changes[change]))
    assert "dist_ckpt_load_strictness" not in model.cfg
    (module,) = model.get_model_module_list()
    return {name: weight.detach() for name, weight in module.named_parameters()}


def test_a_nemo_without_the_states_of_transformer_engine(nemos: dict[str, Path]) -> None:
    (weights,) = run_distributed(restored, 1, nemos["tied"], "state")
    (expected,) = run_distributed(restored, 1, nemos["tied"], "nothing")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_nemo_that_lacks_a_weight(nemos: dict[str, Path]) -> None:
    message = r"ValueError: path: cannot read .*final_layernorm\.more"
    with pytest.raises(RuntimeError, match=message):
        run_distributed(restored, 1, nemos["tied"], "weights")
