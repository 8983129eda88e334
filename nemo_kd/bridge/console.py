"""What Megatron-Bridge and Core would say without a use for the reader."""

import logging
import warnings

_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    'The fp8 argument in "get_gpt_layer',
    "Function '.*' is experimental",
    "`torch.distributed.* is deprecated",
    "Could not determine rank",
)


def quiet_host() -> None:
    """Leave out warnings that ask for nothing. Call it before Bridge is imported."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # A line for each parameter that is initialised on the CPU.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
