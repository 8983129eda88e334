"""The job scripts, with a stand-in for srun: two processes on one node, as Slurm sets them up."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from runs import dump_arguments, scalars, train_arguments

from nemo_kd.cache import TopKCache
from nemo_kd.nemo.trainer import take_over_launcher

ROOT = Path(__file__).parent.parent
SCRIPTS = ("dump_array.sh", "train.sh")
# Notes its own options, and the processes that it starts: Slurm signals these, not the script.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$NOTES/srun"; shift; done
env > "$NOTES/environment"
export SLURM_NTASKS=$SLURM_NTASKS_PER_NODE SLURM_NNODES=1 SLURM_NODEID=0 tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" > "$NOTES/tasks"
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$NOTES/scontrol"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> "Cluster":
    return Cluster(tmp_path / "cluster")


class Cluster:
    """A node whose srun and scontrol are the stand-ins; they write into the directory `notes`."""

    def __init__(self, directory: Path) -> None:
        self.notes = directory
        (directory / "bin").mkdir(parents=True)
        self.install("srun", SRUN)
        self.install("scontrol", SCONTROL)

    def install(self, command: str, script: str) -> None:
        path = self.notes / "bin" / command
        path.write_text(script)
        path.chmod(0o755)

    def start(
        self,
        script: str,
        *arguments: str,
        job: int = 4321,
        submitted_in: Path = ROOT,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Run a copy of the script, as Slurm does, in the directory of submission."""
        spooled = self.notes / "slurm_script"
        shutil.copyfile(ROOT / "examples" / "slurm" / script, spooled)
        path = f"{self.notes / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {
            "SLURM_JOB_ID": str(job),
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NODELIST": "localhost",
        }
        return subprocess.Popen(
            ["bash", str(spooled), *arguments],
            cwd=submitted_in,
            env=os.environ
            | slurm
            | {"PATH": path, "NOTES": str(self.notes), "OMP_NUM_THREADS": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **more: Any) -> tuple[int, str]:
        """Exit status and output."""
        job = self.start(script, *arguments, **more)
        output, _ = job.communicate(timeout=240)
        return job.returncode, output

    def noted(self, command: str) -> list[str]:
        path = self.notes / command
        return path.read_text().splitlines() if path.exists() else []


def test_an_array_fills_one_cache(
    cluster: Cluster, cache: Path, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    """The first job is stopped by SIGTERM and asks to be queued again; a second does the rest.

    One of the teacher's two ranks has the signal, and both end.
    """
    path, teacher = tmp_path / "cache", tmp_path / "teacher"
    with tarfile.open(nemos["untied"]) as tar:  # unpacked once, not by every process anew
        tar.extractall(teacher, filter="data")
    arguments = dump_arguments(
        teacher,
        jsonl,
        path,
        "+experiment=smollm2_cpu_dump",
        "cache.samples_per_shard=1",
        "teacher.tensor_model_parallel_size=2",
    )
    first = cluster.start("dump_array.sh", *arguments, job=71)
    deadline = time.monotonic() + 200
    while not (path / "shard-00000").exists():
        assert first.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(int(cluster.noted("tasks")[0].split()[1]), signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert cluster.noted("scontrol") == ["requeue 71"]
    assert not list(path.glob(".tmp*")), "claims and open shards are gone"

    status, output = cluster.run("dump_array.sh", *arguments, job=72)
    assert status == 0, output
    assert "the cache is whole" in output
    noted = cluster.noted("environment")
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in noted
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in noted
    assert cluster.noted("scontrol") == ["requeue 71"]
    for sample, expected in zip(TopKCache.open(path), TopKCache.open(cache), strict=True):
        np.testing.assert_array_equal(sample.tokens, expected.tokens)
        assert (sample.topk_ids == expected.topk_ids).mean() > 0.99  # but for ties, at another TP


def test_training_on_two_processes(
    cluster: Cluster, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    student = tmp_path / "kd.nemo"
    status, output = cluster.run(
        "train.sh",
        *train_arguments(nemos["tied"], cache, cache, tmp_path / "logs"),
        "+experiment=smollm2_cpu",
        "model.tensor_model_parallel_size=2",
        f"save_to={student}",
    )
    assert status == 0, output
    assert student.exists()
    assert len(scalars(tmp_path / "logs")["kd_loss"]) == 4
    assert not cluster.noted("scontrol")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_only_a_stopped_job_is_queued_again(
    script: str, status: int, requeued: bool, cluster: Cluster
) -> None:
    cluster.install("python", f"#!/usr/bin/env bash\nexit {status}\n")
    assert cluster.run(script, "any.key=1") == (status, "")
    assert cluster.noted("scontrol") == ["requeue 4321"] * requeued


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_container_is_pyxis(script: str, cluster: Cluster) -> None:
    cluster.install("python", '#!/usr/bin/env bash\n[[ $SLURM_PROCID != 0 ]] || echo "$@"\n')
    _, output = cluster.run(script, "a.b=[c d]", IMAGE="kd.sqsh", MOUNTS="/data:/data")
    entry = {"dump_array.sh": "dump_teacher_topk.py", "train.sh": "train_kd_sft.py"}[script]
    assert output == f"/opt/nemo_kd/examples/{entry} a.b=[c d]\n"
    assert cluster.noted("srun")[2:] == [
        "--container-image=kd.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["checkout", "parent", "elsewhere", "unknown"])
def test_a_copied_script_finds_the_checkout(
    script: str, place: str, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.install("python", '#!/usr/bin/env bash\n[[ $SLURM_PROCID != 0 ]] || echo "$1"\n')
    parent, other = tmp_path / "parent", tmp_path / "other"
    parent.mkdir()
    other.mkdir()
    (parent / "nemo_kd").symlink_to(ROOT)
    submitted_in = {"checkout": ROOT, "parent": parent}.get(place, other)
    more = {"NEMO_KD_HOME": str(ROOT)} if place == "elsewhere" else {}
    status, output = cluster.run(script, submitted_in=submitted_in, **more)
    if place == "unknown":
        assert status == 1
        assert output.endswith("set NEMO_KD_HOME to the checkout\n")
    else:
        assert status == 0
        assert Path(output.strip()).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_is_asked_for_one_process_a_gpu(script: str) -> None:
    text = (ROOT / "examples" / "slurm" / script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@"), "to the processes, not to the script"
    assert "requeue" in options


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (8, 3)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, (4, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "interactive"}, (8, 3)),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_NNODES": "2",
                "TORCHELASTIC_RUN_ID": "1",
                "LOCAL_WORLD_SIZE": "4",
                "GROUP_WORLD_SIZE": "2",
            },
            (4, 2),
        ),
    ],
    ids=["neither", "srun", "a shell in an allocation", "torchrun within srun"],
)
def test_the_trainer_has_the_launchers_numbers(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = OmegaConf.create({"trainer": {"devices": 8, "num_nodes": 3}})
    take_over_launcher(config)
    assert (config.trainer.devices, config.trainer.num_nodes) == expected


def test_the_other_host(cluster: Cluster) -> None:
    """NEMO_KD_HOST=bridge calls the scripts of Megatron-Bridge, which ask for rank 0's node."""
    cluster.install("scontrol", "#!/usr/bin/env bash\necho node7\necho node8\n")
    cluster.install("python", '#!/usr/bin/env bash\necho "called $MASTER_ADDR $*"\n')
    status, output = cluster.run("train.sh", "+experiment=x", NEMO_KD_HOST="bridge")
    assert status == 0, output
    called = "called node7 " + str(ROOT / "examples" / "bridge" / "train_kd_sft.py")
    assert output.count(f"{called} +experiment=x") == 2
    _, output = cluster.run("train.sh", "+experiment=x")
    assert str(ROOT / "examples" / "train_kd_sft.py") in output
