#!/usr/bin/env bash
# Runs the teacher as an array of jobs that fill one cache. Each job claims one missing shard after
# another until the cache is whole. So jobs may start late or be lost, and the others do their work.
#   sbatch --array=0-15 examples/slurm/dump_array.sh +experiment=llama3_70b_to_8b_dump \
#     teacher.restore_from_path=teacher.nemo data.file_names=[train.jsonl] cache.path=cache
#SBATCH --job-name=nemo-kd-dump
#SBATCH --array=0-7                 # eight jobs; each runs at least one replica of the teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one process per GPU
#SBATCH --gpus-per-node=8           # each process sees all of them, so do not use --gpus-per-task
#SBATCH --time=04:00:00
#SBATCH --requeue                   # after a preemption or the failure of a node
#SBATCH --signal=TERM@120           # the run is told to stop two minutes before the time limit
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

# sbatch runs a copy of this script outside the checkout, so the path of the script does not lead to
# common.sh. The job starts in the directory where sbatch was called: the checkout is expected there,
# or in nemo_kd below it. If it is elsewhere, set NEMO_KD_HOME to it before calling sbatch.
checkout=${NEMO_KD_HOME:-$PWD}
[[ -d $checkout/examples ]] || checkout=$PWD/nemo_kd
source "$checkout/examples/slurm/common.sh" || { echo "set NEMO_KD_HOME to the checkout" >&2; exit 1; }

# After a stop the finished shards stay, and the queued job fills the missing ones.
run_example "$checkout" dump_teacher_topk.py "$@"
