"""Whether the files of a model or of a checkpoint are as they were written.

Torch's files are zips: a .pt or a .ckpt is one, and a .distcp is a row of them, at the places that
.metadata lists. Each entry of a zip has a CRC, which torch does not compare when it reads. The
other files (the config, the tokenizer's, .metadata) have no CRC, so that this package writes
checksums.json beside them.
"""

import io
import json
import os
import pickle
import tarfile
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from megatron.core.dist_checkpointing.core import CheckpointingException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.checkpoint.api import CheckpointException

from nemo_kd.nemo.disk import one_line_if_full

SEAL = "checksums.json"
_ZIPS = (".ckpt", ".distcp", ".pt")
# What reading a damaged file raises, and NeMo where the weights do not fit the model.
_UNREADABLE = (
    *(CheckpointingException, CheckpointException, OmegaConfBaseException, yaml.YAMLError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError),
)
_LOADING = ("Error(s) in loading state_dict", "PytorchStreamReader", "Invalid magic number")
_Files = dict[str, Callable[[], Any]]
_Part = tuple[str, int, int]  # of a file: its name, where a zip begins, its bytes; -1 is to the end


def seal_directory(directory: Path) -> None:
    """Write checksums.json into a checkpoint; rank 0 alone calls it."""
    with _opened(directory) as files:
        content = _seal(files)
    temporary = directory / f"{SEAL}.tmp"
    temporary.write_bytes(content)
    os.replace(temporary, directory / SEAL)


def seal_nemo(path: Path) -> None:
    """Append checksums.json to a .nemo that NeMo has just written; rank 0 alone calls it."""
    with _opened(path) as files:
        content = _seal(files)
    with tarfile.open(path, "a") as nemo:
        member = tarfile.TarInfo(f"./{SEAL}")
        member.size = len(content)
        nemo.addfile(member, io.BytesIO(content))


def check_files(
    path: str | Path, key: str, weights: bool = True, remedy: str = "write or copy it again"
) -> None:
    """Compare every checksum that a model or a checkpoint has.

    Args:
        path: A .nemo, unpacked or not, or a checkpoint of a run: a directory or a .ckpt.
        key: The YAML key that named it, for the message.
        weights: Also those of the weights. Each rank of the job then reads its share of them, so
            that every rank has to call it.
        remedy: What to do, for the message.

    Raises:
        ValueError: A file is damaged or missing.
    """
    faults: list[str] = []
    try:
        with _opened(Path(path)) as files:
            faults = _sealed_faults(files)
            if weights and not faults:
                parts, faults = _parts(files)
                rank, num_ranks = _place()
                faults += [
                    f"{part[0]} is damaged"
                    for part in parts[rank::num_ranks]
                    if not _is_whole(files, part)
                ]
    except (*_UNREADABLE, OSError) as error:  # no rank may leave the others in the collective
        faults = [_in_one_line(error)]
    if weights and _place()[1] > 1:
        of_ranks: list[Any] = [None] * _place()[1]
        torch.distributed.all_gather_object(of_ranks, faults)
        faults = [fault for each in of_ranks for fault in each]
    if faults:
        more = f" (and {len(set(faults)) - 1} more faults)" if len(set(faults)) > 1 else ""
        raise ValueError(f"{key}: {path} is not as it was written: {faults[0]}{more}; {remedy}")


@contextmanager
def one_line(path: str | Path, key: str) -> Iterator[None]:
    """Turn what reading a damaged or an ill-fitting model raises into one ValueError."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{key}: cannot read {path}: {_in_one_line(error)}") from error
    except RuntimeError as error:  # torch has no class of its own for these
        if not any(text in str(error) for text in _LOADING):
            raise
        raise ValueError(f"{key}: cannot read {path}: {_in_one_line(error)}") from error


def restore_model(model_class: Any, path: str, key: str, config: Any, trainer: Any) -> Any:
    """Return NeMo's model of a .nemo whose checksums are right. Every rank calls it.

    Args:
        model_class: A MegatronGPTSFTModel.
        path: The .nemo.
        key: The YAML key that named it, for the message.
        config: The model's config, in the place of the .nemo's.
        trainer: The model's trainer.

    Raises:
        ValueError: The .nemo is damaged, or its weights do not fit the config.
        OSError: The disk on which NeMo unpacks it is full.
    """
    check_files(path, key)
    # A .nemo that was written without Transformer Engine lacks the _extra_state of its layers. With
    # log_all Megatron passes over what a .nemo lacks, and NeMo then refuses all but _extra_state.
    lenient = OmegaConf.merge(config, {"dist_ckpt_load_strictness": "log_all"})
    room = "NeMo unpacks the .nemo there: set TMPDIR to a directory with more room"
    with one_line(path, key), one_line_if_full(Path(tempfile.gettempdir()), lambda: room):
        model = model_class.restore_from(path, override_config_path=lenient, trainer=trainer)
    with open_dict(model.cfg):
        del model.cfg.dist_ckpt_load_strictness
    return model


@contextmanager
def _opened(path: Path) -> Iterator[_Files]:
    """The files of a model, by their names: what opens each."""
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.is_file())
        yield {str(file.relative_to(path)): partial(open, file, "rb") for file in names}
    elif path.suffix != ".ckpt":
        with tarfile.open(path) as nemo:
            members = [member for member in nemo.getmembers() if member.isfile()]
            # At a damaged header tarfile takes the rest of the file for nothing.
            stream: Any = nemo.fileobj
            stream.seek(nemo.offset)
            if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the file is cut off, or a header in it is damaged")
            yield {
                member.name.removeprefix("./"): partial(nemo.extractfile, member)
                for member in members
            }
    else:
        yield {path.name: partial(open, path, "rb")}


def _seal(files: _Files) -> bytes:
    """The content of checksums.json: of each file its checksum, or null where it has CRCs."""
    sums = {
        name: None if name.endswith(_ZIPS) else _checksum(open_file)
        for name, open_file in files.items()
        if name != SEAL
    }
    return json.dumps({"xxh3_64": sums}, indent=1).encode()


def _checksum(open_file: Callable[[], Any]) -> str:
    digest = xxhash.xxh3_64()
    with open_file() as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed_faults(files: _Files) -> list[str]:
    """What checksums.json says against the small files; nothing where there is none."""
    if SEAL not in files:
        return []
    try:
        with files[SEAL]() as stream:
            sums = json.load(stream)["xxh3_64"].items()
    except (ValueError, KeyError, AttributeError, TypeError):
        return [f"{SEAL} is damaged"]
    missing = [f"{name} is missing" for name, _ in sums if name not in files]
    return missing or [
        f"{name} is damaged (if you changed it, remove {SEAL})"
        for name, expected in sums
        if expected is not None and _checksum(files[name]) != expected
    ]


def _parts(files: _Files) -> tuple[list[_Part], list[str]]:
    """The zips within a model's files, and what is wrong with their places."""
    parts, faults = [], []
    for name, open_file in files.items():
        if name.endswith((".ckpt", ".pt")):
            parts.append((name, 0, -1))
        elif name.rpartition("/")[2] == ".metadata":
            try:
                with open_file() as stream:
                    listed = pickle.load(stream).storage_data.values()
                places = defaultdict(list)
                for each in listed:
                    if not getattr(each, "transform_descriptors", None):  # compressed, say
                        places[each.relative_path].append((each.offset, each.length))
            except Exception:  # a flipped byte in a pickle may raise anything
                faults.append(f"{name} is damaged")
                continue
            for file, spans in places.items():
                file = name.removesuffix(".metadata") + file
                if file not in files:
                    faults.append(f"{file} is missing")
                    continue
                parts += [(file, *span) for span in sorted(spans)]
                faults += _gaps(files, file, sorted(spans))
    return parts, faults


def _gaps(files: _Files, name: str, spans: list[tuple[int, int]]) -> list[str]:
    """Whether spans, which are sorted, fill a file from its begin to its end."""
    with files[name]() as stream:
        num_bytes = stream.seek(0, io.SEEK_END)
    begins = [begin for begin, _ in spans]
    ends = [begin + length for begin, length in spans]
    if begins == [0, *ends[:-1]] and ends[-1] == num_bytes:
        return []
    return [
        f"{name} does not have the parts that .metadata lists: expected {ends[-1]} bytes, got "
        f"{num_bytes}"
    ]


def _is_whole(files: _Files, part: _Part) -> bool:
    """Whether the CRC of each entry of a zip is right."""
    name, begin, length = part
    with files[name]() as stream:
        if length >= 0:
            stream.seek(begin)
            stream = io.BytesIO(stream.read(length))
        try:
            return zipfile.ZipFile(stream).testzip() is None
        except Exception:  # a flipped byte in a zip's directory may raise anything
            return False


def _place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _in_one_line(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, CheckpointException):  # its text is a traceback, and ends in the cause
        text = text.splitlines()[-1]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."
