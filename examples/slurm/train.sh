#!/usr/bin/env bash
# Trains a student on one node or several, and resumes after preemptions and time limits.
#   sbatch --nodes=8 examples/slurm/train.sh +experiment=nemotron4_340b_to_15b save_to=kd.nemo \
#     model.restore_from_path=student.nemo model.data.train_ds.file_names=[cache] \
#     model.data.validation_ds.file_names=[heldout-cache]
#SBATCH --job-name=nemo-kd-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one process per GPU
#SBATCH --gpus-per-node=8           # each process sees all of them, so do not use --gpus-per-task
#SBATCH --time=04:00:00
#SBATCH --requeue                   # after a preemption or the failure of a node
#SBATCH --signal=TERM@300           # the run saves a checkpoint five minutes before the time limit
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# sbatch runs a copy of this script outside the checkout, so the path of the script does not lead to
# common.sh. The job starts in the directory where sbatch was called: the checkout is expected there,
# or in nemo_kd below it. If it is elsewhere, set NEMO_KD_HOME to it before calling sbatch.
checkout=${NEMO_KD_HOME:-$PWD}
[[ -d $checkout/examples ]] || checkout=$PWD/nemo_kd
source "$checkout/examples/slurm/common.sh" || { echo "set NEMO_KD_HOME to the checkout" >&2; exit 1; }

# After a stop the queued job resumes from the last checkpoint (exp_manager.resume_if_exists).
run_example "$checkout" train_kd_sft.py "$@"
