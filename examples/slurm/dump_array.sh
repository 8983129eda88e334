#!/usr/bin/env bash
# The teacher run as an array of jobs that fill one cache. Each claims shard after shard until the
# cache is whole, so that none waits for another's share and any number may come late or be lost.
#   sbatch --array=0-15 examples/slurm/dump_array.sh +experiment=llama3_70b_to_8b_dump \
#     teacher.restore_from_path=teacher.nemo data.file_names=[train.jsonl] cache.path=cache
#SBATCH --job-name=nemo-kd-dump
#SBATCH --array=0-7                 # so many jobs, each of one replica of the teacher or more
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one process a GPU
#SBATCH --gpus-per-node=8           # all visible to each process: no --gpus-per-task
#SBATCH --time=04:00:00
#SBATCH --requeue                   # after a preemption or a node's failure
#SBATCH --signal=TERM@120           # two minutes before the time is over the run is told to end
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

# IMAGE: the container (Dockerfile), as pyxis names it; unset: the python at hand, in a checkout.
# MOUNTS: what it is to see besides the directory of submission: /data:/data,/scratch:/scratch
examples=examples container=()
if [[ -n ${IMAGE-} ]]; then
  examples=/opt/nemo_kd/examples
  container=(
    "--container-image=$IMAGE"
    "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}"
    "--container-workdir=$PWD"
  )
fi

# --wait: a process that fails leaves the others a minute to end as they should, and no longer.
srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" python "$examples/dump_teacher_topk.py" "$@"
status=$?
if ((status == 143)); then # stopped by SIGTERM: the finished shards stay, the rest is to be done
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
