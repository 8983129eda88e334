"""What Megatron-Bridge and Core would say without a use for the reader."""

import logging
import warnings

_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    'The fp8 argument in "get_gpt_layer',
    ".* is experimental",
    "`.*` is deprecated",
    "Failed to import modelopt",
    "Could not determine rank",
)
# Bridge 0.6 prints each exception before it raises it, and each part of Transformer Engine that is
# not there.
_TELL_ERRORS = ("megatron.bridge.training.pretrain", "megatron.bridge.utils.import_utils")


def quiet_host() -> None:
    """Leave out warnings that ask for nothing. Call it before Bridge is imported."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in _TELL_ERRORS:
        logging.getLogger(name).addFilter(_is_no_traceback)
    # A line for each parameter that is initialised on the CPU.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None and "Traceback" not in record.getMessage()
