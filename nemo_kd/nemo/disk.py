"""A full disk while weights are written: what failed, where, and what is left to resume from."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

# Of no space, no quota, a limit on the size of a file, and a disk that fails.
_CAUSES = tuple(
    os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
)
_TORCH = "inline_container.cc"  # torch.save's and torch.load's, which do not say why


@contextmanager
def one_line_if_full(place: Path, remains: Callable[[], str]) -> Iterator[None]:
    """Turn a write that failed into one OSError, which says what survives.

    Megatron writes in a process of its own and passes its error on as a text, so that the text of
    each exception in the chain is searched.

    Args:
        place: The file or the directory that was written.
        remains: Called after the failure; it may clear what is half written, and says what is left.

    Raises:
        OSError: A write failed. Every other exception passes as it is.
    """
    try:
        yield
    except ValueError:  # of the model that is read: check_files and one_line raise it
        raise
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        cause = _cause(error)
        if cause is None:
            raise
        text = remains()
        free = shutil.disk_usage(_existing(place)).free / 1e9
        raise OSError(f"cannot write {place}: {cause} ({free:.3g} GB free); {text}") from error


def _cause(error: BaseException | None) -> str | None:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    texts = [str(each) for each in seen]
    for text in texts:
        for cause in _CAUSES:
            if cause in text:
                return cause
    writes = any(_TORCH in text and "PytorchStreamReader" not in text for text in texts)
    return "the write failed" if writes else None


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())
