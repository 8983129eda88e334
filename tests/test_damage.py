"""Damaged files, files of something else, and full disks: one line with the path, and nothing lost.

tests/test_cache.py and tests/test_lines.py do the same for caches and for jsonl files.
"""

import io
import random
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import dump_arguments, run_example
from test_export import weights_of
from test_lora import LORA, pytestmark  # noqa: F401  the adapters' tests have its condition
from test_resume import SCRIPT, checkpoints
from test_resume import arguments as arguments_of_resume

from nemo_kd.nemo.integrity import SEAL, check_files, seal_nemo
from nemo_kd.nemo.nemo_file import load_weights, read_model_config

LIMITED_RUN = str(Path(__file__).parent / "limited_run.py")
# The student's .nemo is larger, and each file in it is smaller; those of a checkpoint are larger.
SMALL_DISK_BYTES = 300_000
NUM_FLIPS = 200


def arguments(student: Path, cache: Path, logs: Path, *more: str) -> list[str]:
    """A run of two steps, which ends in a validation and a checkpoint."""
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    return arguments_of_resume(student, cache, logs, *short, *more)


def without_seal(nemo: Path, target: Path) -> Path:
    """The .nemo as NeMo itself writes it."""
    with tarfile.open(nemo) as source, tarfile.open(target, "w:") as copy:
        for member in source:
            if SEAL not in member.name:
                copy.addfile(member, source.extractfile(member) if member.isfile() else None)
    return target


def weights_at(nemo: Path) -> tuple[int, int]:
    """The first and the last byte of the weights' files within a .nemo."""
    with tarfile.open(nemo) as files:
        found = [member for member in files if member.name.endswith((".distcp", ".ckpt"))]
    return found[0].offset_data, found[-1].offset_data + found[-1].size


def middle_of_weights(nemo: Path) -> int:
    """A byte of a matrix."""
    with tarfile.open(nemo) as files:
        largest = max(files, key=lambda member: member.size)
        content = files.extractfile(largest).read()
    return largest.offset_data + middle_of_matrix(content)


def middle_of_matrix(content: bytes) -> int:
    """A byte of the largest entry of a zip: between the entries there is padding."""
    with zipfile.ZipFile(io.BytesIO(content)) as entries:
        largest = max(entries.infolist(), key=lambda entry: entry.file_size)
    start = largest.header_offset
    name_and_extra = struct.unpack("<HH", content[start + 26 : start + 30])
    return start + 30 + sum(name_and_extra) + largest.file_size // 2


def flip(path: Path, position: int, bit: int = 3) -> Path:
    with open(path, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))
    return path


def flipped(nemo: Path, target: Path) -> Path:
    """A copy with a flipped bit in a matrix."""
    shutil.copy(nemo, target)
    return flip(target, middle_of_weights(target))


def refused(output: str) -> str:
    """The one line of an error, for which no traceback was shown."""
    assert "Traceback" not in output
    (line,) = re.findall("^error.*$", output, re.MULTILINE)
    return line


FULL = "error: cannot write {}: CAUSE ("


def no_cause(line: str) -> str:
    """Whether torch passes the cause on depends on where in a file the disk ends."""
    return re.sub("File too large|No space left on device|the write failed", "CAUSE", line)


@pytest.mark.parametrize("sealed", [True, False], ids=["ours", "of NeMo itself"])
def test_a_flipped_bit_is_named_or_changes_nothing(
    sealed: bool, nemos: dict[str, Path], tmp_path: Path
) -> None:
    """All of ours; of NeMo's own the weights, whose CRCs torch does not compare when it reads."""
    whole = nemos["tied"] if sealed else without_seal(nemos["tied"], tmp_path / "whole.nemo")
    check_files(whole, "key")
    expected = load_weights(str(whole), str(tmp_path))
    with tarfile.open(whole) as files:
        config = files.extractfile("./model_config.yaml").read()
    content, first_and_last = whole.read_bytes(), (0, whole.stat().st_size)
    copy, rng, messages = tmp_path / "copy.nemo", random.Random(0), []
    for _ in range(NUM_FLIPS):
        position = rng.randrange(*(first_and_last if sealed else weights_at(whole)))
        copy.write_bytes(content)
        flip(copy, position, rng.randrange(8))
        try:
            weights = load_weights(str(copy), str(tmp_path))
        except ValueError as error:
            messages.append(str(error))
            continue
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), position
        with tarfile.open(copy) as files:
            assert files.extractfile("./model_config.yaml").read() == config
    assert all(str(copy) in message and "\n" not in message for message in messages), messages
    assert len(messages) > 0.8 * NUM_FLIPS, "the others hit padding, or dates in headers"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.97])
def test_a_truncated_nemo(share: float, nemos: dict[str, Path], tmp_path: Path) -> None:
    """Found when its config is read, before any work; the weights are not read for it."""
    content = nemos["tied"].read_bytes()
    path = tmp_path / "cut.nemo"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"key: {path} is not as it was written: ")):
        read_model_config(str(path), "key")


def test_an_unpacked_nemo(nemos: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "unpacked"
    with tarfile.open(nemos["tied"]) as nemo:
        nemo.extractall(directory, filter="data")
    check_files(directory, "key")
    config = directory / "model_config.yaml"
    config.write_text(config.read_text() + "\n# mine\n")
    with pytest.raises(ValueError, match=r"model_config.yaml is damaged \(if you changed it"):
        read_model_config(str(directory), "key")
    (directory / SEAL).unlink()
    read_model_config(str(directory), "key")
    shard = next(directory.rglob("*_1.distcp"))
    with open(shard, "r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"_1.distcp does not have the parts .* got \d+"):
        check_files(directory, "key")
    shard.unlink()
    with pytest.raises(ValueError, match=r"model_weights/__0_1.distcp is missing"):
        check_files(directory, "key")


def test_a_seal_that_lies(nemos: dict[str, Path], tmp_path: Path) -> None:
    """A seal with another sum, a broken one, and one that lists a file that is not there."""
    whole = without_seal(nemos["tied"], tmp_path / "whole.nemo")
    for content, fault in (
        (b'{"xxh3_64": {"model_config.yaml": "0"}}', "model_config.yaml is damaged"),
        (b"{", f"{SEAL} is damaged"),
        (b'{"xxh3_64": {"x": "0"}}', "x is missing"),
    ):
        path = tmp_path / "lies.nemo"
        shutil.copy(whole, path)
        with tarfile.open(path, "a") as nemo:
            member = tarfile.TarInfo(f"./{SEAL}")
            member.size = len(content)
            nemo.addfile(member, io.BytesIO(content))
        with pytest.raises(ValueError, match=fault):
            check_files(path, "key", weights=False)
    seal_nemo(whole)
    check_files(whole, "key")


@pytest.mark.parametrize("processes", [1, 2])
def test_no_run_begins_on_damaged_weights(
    processes: int, nemos: dict[str, Path], cache: Path, jsonl: Path, tmp_path: Path
) -> None:
    """Each rank reads a share; all end. One more bit in one matrix, and today the run goes on."""
    student = flipped(nemos["tied"], tmp_path / "student.nemo")
    parallel = f"tensor_model_parallel_size={processes}"
    run = arguments(student, cache, tmp_path / "run", f"model.{parallel}")
    output = run_example(SCRIPT, *run, processes=processes, succeeds=False)
    assert f"model.restore_from_path: {student} is not as it was written" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("events*"))
    teacher = flipped(nemos["untied"], tmp_path / "teacher.nemo")
    run = dump_arguments(teacher, jsonl, tmp_path / "cache", f"teacher.{parallel}")
    output = run_example("dump_teacher_topk.py", *run, processes=processes, succeeds=False)
    assert f"teacher.restore_from_path: {teacher} is not as it was written" in output
    assert "Traceback" not in output
    assert not (tmp_path / "cache").exists()


def test_no_export_of_damaged_weights(nemos: dict[str, Path], tmp_path: Path) -> None:
    source = flipped(nemos["tied"], tmp_path / "student.nemo")
    output = run_example(
        "export_hf_llama.py", f"source={source}", f"output={tmp_path / 'hf'}", succeeds=False
    )
    assert f"source: {source} is not as it was written: model_weights/" in refused(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.nemo"]


def test_an_unreadable_source_is_not_a_full_disk(nemos: dict[str, Path], tmp_path: Path) -> None:
    """A disk that fails where the export reads, as a read of /proc/self/mem at 0 does."""
    source = tmp_path / "student"
    shutil.unpack_archive(nemos["tied"], source, "tar")
    weights = source / "model_weights" / "common.pt"
    weights.unlink()
    weights.symlink_to("/proc/self/mem")
    output = run_example(
        "export_hf_llama.py", f"source={source}", f"output={tmp_path / 'hf'}", succeeds=False
    )
    line = refused(output)
    assert f"source: {source} is not as it was written: " in line
    assert "cannot write" not in line


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path) -> Path:
    """The directory of a run of two steps."""
    logs = tmp_path_factory.mktemp("half") / "run"
    run_example(SCRIPT, *arguments(nemos["tied"], cache, logs))
    return logs


def last(logs: Path) -> Path:
    (path,) = (logs / "checkpoints").glob("*-last*")
    return path


def test_a_damaged_checkpoint_is_named_before_resuming(
    half: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "run"
    shutil.copytree(half, logs)
    run = arguments(nemos["tied"], cache, logs, "trainer.max_steps=4")
    for name in ("__0_0.distcp", ".metadata", "common.pt", "metadata.json"):
        file = last(logs) / name
        content = file.read_bytes()
        flip(file, len(content) // 2)
        if name in ("__0_0.distcp", ".metadata"):
            line = refused(run_example(SCRIPT, *run, succeeds=False))
            assert f"the checkpoint to resume from: {last(logs)} is not as it was" in line
            assert f"{name} is damaged" in line
            assert "move it away, and the same command resumes from the newest other" in line
        else:
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                check_files(last(logs), "key")
        file.write_bytes(content)
    shutil.rmtree(last(logs))  # as the line says
    output = run_example(SCRIPT, *run)
    assert "trained 2 steps, to step 4" in output


def test_a_given_checkpoint_is_checked_and_stays(
    half: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(last(half), other)
    key = "exp_manager.resume_from_checkpoint"

    def run(path: Path, *more: str) -> list[str]:
        return arguments(nemos["tied"], cache, tmp_path / "run", f"+{key}={path}", *more)

    for path in (tmp_path / "none", tmp_path):
        line = refused(run_example(SCRIPT, *run(path), succeeds=False))
        assert f"{key}: expected a checkpoint of a run, found none at {path}" in line
    file = other / "__0_0.distcp"
    whole = file.read_bytes()
    flip(file, len(whole) // 2)
    line = refused(run_example(SCRIPT, *run(other), succeeds=False))
    assert f"{key}: {other} is not as it was written: __0_0.distcp is damaged" in line
    file.write_bytes(whole)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    output = run_example(SCRIPT, *run(other, "trainer.max_steps=4"))
    assert f"no whole checkpoint, the run starts from {other}" in output
    assert "trained 2 steps, to step 4" in output
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    output = run_example(SCRIPT, *run(other, "trainer.max_steps=5"))
    assert "trained 1 steps, to step 5" in output
    shutil.rmtree(other)  # a run with checkpoints of its own needs it no more
    output = run_example(SCRIPT, *run(other, "trainer.max_steps=6"))
    assert "trained 1 steps, to step 6" in output


def test_damaged_settings_of_a_run(
    half: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "run"
    shutil.copytree(half, logs)
    record = logs / "checkpoints" / "settings.json"
    record.write_bytes(record.read_bytes()[:100])
    run = arguments(nemos["tied"], cache, logs, "trainer.max_steps=4")
    line = refused(run_example(SCRIPT, *run, succeeds=False))
    assert f"{record} is damaged" in line
    assert "remove it" in line


def test_a_full_disk_in_an_import(small_disk: Path, hf_llamas: dict[str, Path]) -> None:
    """The converted weights lie in mapped files, where a lack of room would kill the process."""
    (small_disk / "filler").write_bytes(bytes(5 * 2**20 - 300_000))
    output = small_disk / "student.nemo"
    run = ("import_hf_llama.py", f"source={hf_llamas['tied']}", f"output={output}")
    line = refused(run_example(*run, status=1))
    assert FULL.format(output) in no_cause(line)
    assert "what stood there before is as it was" in line
    assert {path.name for path in small_disk.iterdir()} == {"filler", "student.tokenizer"}


def test_a_full_disk_in_a_checkpoint(
    half: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Nothing half written stays, and the run resumes from the checkpoint before."""
    logs = tmp_path / "run"
    shutil.copytree(half, logs)
    before = sorted(path.name for path in (logs / "checkpoints").iterdir())
    run = arguments(nemos["tied"], cache, logs, "trainer.max_steps=4")
    output = run_example(LIMITED_RUN, SMALL_DISK_BYTES, SCRIPT, *run, status=1)
    line = refused(output)
    assert FULL.format(logs / "checkpoints") in no_cause(line)
    assert f"resumes from the newest whole checkpoint, {last(logs).name}" in line
    assert sorted(path.name for path in (logs / "checkpoints").iterdir()) == before
    output = run_example(SCRIPT, *run)
    assert "trained 2 steps, to step 4" in output
    assert checkpoints(logs) == ["4"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MB, which has room for three checkpoints of the student."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full(
    small_disk: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """The same on a disk that fills: two checkpoints fit, and a third does not."""
    logs = small_disk / "run"
    run = arguments(nemos["tied"], cache, logs, "trainer.max_steps=4")
    filler = small_disk / "filler"
    run_example(SCRIPT, *arguments(nemos["tied"], cache, logs))
    filler.write_bytes(bytes(2_000_000))
    line = refused(run_example(SCRIPT, *run, status=1))
    assert FULL.format(logs / "checkpoints") in no_cause(line)
    assert "resumes from the newest whole checkpoint, " in line
    assert checkpoints(logs) == ["2"]
    filler.unlink()
    assert "trained 2 steps, to step 4" in run_example(SCRIPT, *run)


def test_a_full_disk_in_the_save(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """What stood at save_to stays, and the same command saves once there is room."""
    logs, target = tmp_path / "run", tmp_path / "kd.nemo"
    target.write_text("an earlier one")
    run = arguments(nemos["tied"], cache, logs, f"save_to={target}")
    run_example(SCRIPT, *run[:-1])
    output = run_example(LIMITED_RUN, SMALL_DISK_BYTES, SCRIPT, *run, status=1)
    line = refused(output)
    assert FULL.format(target) in no_cause(line)
    assert "what stood there before is as it was. The checkpoints are whole" in line
    assert target.read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd.nemo", "run"]
    run_example(SCRIPT, *run)
    check_files(target, "key")


def test_no_room_to_unpack(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    run = arguments(nemos["tied"], cache, tmp_path / "run")
    line = refused(run_example(LIMITED_RUN, 100_000, SCRIPT, *run, status=1))
    assert "File too large" in line
    assert "NeMo unpacks the .nemo there: set TMPDIR" in line


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path) -> Path:
    """A run of LoRA: its directory, and beside it adapters.nemo."""
    logs = tmp_path_factory.mktemp("adapters") / "run"
    run = arguments(nemos["tied"], cache, logs, *LORA, f"save_to={logs.parent / 'adapters.nemo'}")
    run_example(SCRIPT, *run)
    return logs


OTHER_ADAPTERS = {
    "model.peft.lora_tuning.adapter_dim=8": (
        "expected adapters of a model with peft.lora_tuning.adapter_dim=8, but those of PATH have "
        "peft.lora_tuning.adapter_dim=4"
    ),
    "model.restore_from_path=UNTIED": (
        "expected adapters of a model with num_layers=3, but those of PATH have num_layers=2"
    ),
    "model.peft.lora_tuning.target_modules=[attention]": (
        "PATH has adapters of other layers than model.peft.lora_tuning asks for, ['attention']"
    ),
}


@pytest.mark.parametrize("change", OTHER_ADAPTERS)
def test_adapters_of_another_model(
    change: str, adapters: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    path = adapters.parent / "adapters.nemo"
    run = arguments(nemos["tied"], cache, tmp_path / "run", *LORA)
    more = change.replace("UNTIED", str(nemos["untied"]))
    output = run_example(SCRIPT, *run, f"model.peft.restore_from_path={path}", more, succeeds=False)
    expected = OTHER_ADAPTERS[change].replace("PATH", str(path))
    assert f"model.peft.restore_from_path: {expected}" in refused(output)


def test_damaged_adapters(
    adapters: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    path = flipped(adapters.parent / "adapters.nemo", tmp_path / "adapters.nemo")
    run = arguments(nemos["tied"], cache, tmp_path / "run", *LORA)
    output = run_example(SCRIPT, *run, f"model.peft.restore_from_path={path}", succeeds=False)
    assert f"model.peft.restore_from_path: {path} is not as it was written" in refused(output)
    logs = tmp_path / "resumed"
    shutil.copytree(adapters, logs)
    flip(last(logs), middle_of_matrix(last(logs).read_bytes()))
    run = arguments(nemos["tied"], cache, logs, *LORA, "trainer.max_steps=4")
    line = refused(run_example(SCRIPT, *run, succeeds=False))
    assert f"the checkpoint to resume from: {last(logs)} is not as it was written" in line


def test_a_full_disk_in_a_checkpoint_of_adapters(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Adapters that are larger than the model's matrices."""
    large = [part.replace("adapter_dim=4", "adapter_dim=64") for part in LORA]
    run = arguments(nemos["tied"], cache, tmp_path / "run", *large)
    line = refused(run_example(LIMITED_RUN, SMALL_DISK_BYTES, SCRIPT, *run, status=1))
    assert FULL.format(tmp_path / "run" / "checkpoints") in no_cause(line)
    assert "there is no checkpoint yet: free space" in line
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_export_of_a_checkpoint(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """The best checkpoint of a run becomes the model that save_checkpoint=best would give."""
    run = arguments(nemos["tied"], cache, tmp_path / "run")
    run_example(SCRIPT, *run, f"save_to={tmp_path / 'kd.nemo'}")
    checkpoint = last(tmp_path / "run")
    for source, output in ((checkpoint, "checkpoint"), (tmp_path / "kd.nemo", "nemo")):
        run_example("export_hf_llama.py", f"source='{source}'", f"output={tmp_path / output}")
    expected, exported = weights_of(tmp_path / "nemo"), weights_of(tmp_path / "checkpoint")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "checkpoint" / name).read_text() == (
            tmp_path / "nemo" / name
        ).read_text()


def test_no_export_of_adapters_alone(adapters: Path, tmp_path: Path) -> None:
    for source, fault in (
        (last(adapters), "NeMo writes such files of adapters alone"),
        (adapters.parent / "adapters.nemo", "found none: adapters alone"),
    ):
        output = run_example(
            *("export_hf_llama.py", f"source='{source}'", f"output={tmp_path / 'hf'}"),
            succeeds=False,
        )
        assert fault in refused(output)
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_in_an_export(nemos: dict[str, Path], tmp_path: Path) -> None:
    run = ("export_hf_llama.py", f"source={nemos['tied']}", f"output={tmp_path / 'hf'}")
    output = run_example(LIMITED_RUN, SMALL_DISK_BYTES, *run, status=1)
    assert FULL.format(tmp_path / "hf") in no_cause(refused(output))
    assert not list(tmp_path.iterdir())
