"""What a terminal shows of NeMo and Lightning: warnings and errors. The rest is for a log file."""

import logging
import multiprocessing
import os
import sys

from tqdm import tqdm

HOSTS = ("nemo_logger", "lightning.pytorch", "lightning.fabric")
# Warnings that ask for nothing; they go where NeMo's INFO goes.
NOISE = (
    "Apex was not found",
    "does not have field.name",  # one for each field that a checkpoint leaves out
    "There were no checkpoints found",  # as in every first run
    "was told to monitor a validation value",  # the steps end the run, not an epoch
    "You have overridden `MegatronGPTSFT",
    "the `dataloader_iter` step flavor",
    "sync_dist=True",  # the metrics are the same on every rank before they are logged
)
SHORT_FIELD = "is not long enough to truncate"


class Terminal(logging.Handler):
    """Shows warnings and errors, above a bar if there is one."""

    def __init__(self) -> None:
        super().__init__()
        # Shared with the processes that this one forks: data loader workers tokenise.
        self.num_short_fields = multiprocessing.Value("q")

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if SHORT_FIELD in message:  # one a sample
            with self.num_short_fields.get_lock():
                self.num_short_fields.value += 1
            return False
        return record.levelno > logging.INFO and not any(noise in message for noise in NOISE)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage().strip()}", file=sys.stderr)


def quiet_host() -> None:
    """Leave only warnings and errors of NeMo and Lightning on the terminal.

    NeMo keeps everything in memory for the log file that exp_manager or `log_to` opens later.
    """
    from nemo.utils import logging as nemo_logging
    from nemo.utils.get_rank import is_global_rank_zero

    os.environ.setdefault("MAKEFLAGS", "--silent --no-print-directory")  # NeMo calls make
    # A log file that cannot be written, as on a full disk, shows no traceback: the run goes on, or
    # ends with the line about what it could not save.
    logging.raiseExceptions = False
    nemo_logging.remove_stream_handlers()
    terminal = Terminal()
    for logger in map(logging.getLogger, HOSTS):
        for handler in logger.handlers[:]:
            if type(handler) in (logging.StreamHandler, Terminal):
                logger.removeHandler(handler)
        if is_global_rank_zero():
            logger.addHandler(terminal)


def log_to(path: str) -> None:
    """Write what the terminal does not show to a file, which a resumed run continues."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.add_file_handler(path)
    for name in HOSTS[1:]:
        logging.getLogger(name).addHandler(logging.FileHandler(path))


def forget_short_fields() -> None:
    """Count anew, after samples were tokenised that will be again."""
    for handler in logging.getLogger(HOSTS[0]).handlers:
        if isinstance(handler, Terminal):
            handler.num_short_fields.value = 0


def report_short_fields() -> None:
    """Say how often a sample was longer than its truncation_field can make up for."""
    for handler in logging.getLogger(HOSTS[0]).handlers:
        if isinstance(handler, Terminal) and (number := handler.num_short_fields.value):
            tqdm.write(
                f"warning: {number:,} times a sample's truncation_field was too short to make it "
                "fit into max_seq_length, and its answer was cut",
                file=sys.stderr,
            )
