#!/usr/bin/env bash
# Trains a student on one node or several, and goes on after preemptions and time limits.
#   sbatch --nodes=8 examples/slurm/train.sh +experiment=nemotron4_340b_to_15b save_to=kd.nemo \
#     model.restore_from_path=student.nemo model.data.train_ds.file_names=[cache] \
#     model.data.validation_ds.file_names=[heldout-cache]
#SBATCH --job-name=nemo-kd-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one process a GPU
#SBATCH --gpus-per-node=8           # all visible to each process: no --gpus-per-task
#SBATCH --time=04:00:00
#SBATCH --requeue                   # after a preemption or a node's failure
#SBATCH --signal=TERM@300           # five minutes before the time is over it saves a checkpoint
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

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
srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" python "$examples/train_kd_sft.py" "$@"
status=$?
if ((status == 143)); then # stopped by SIGTERM: exp_manager.resume_if_exists goes on from there
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
