# The common part of train.sh and dump_array.sh, which source this file and call run_example.
#
# Three variables of the environment that you submit from:
#   NEMO_KD_HOST  bridge: the runs are those of Megatron-Bridge; unset: those of NeMo
#   IMAGE   the container (see Dockerfile) as pyxis names it. If it is unset, the jobs use the Python
#           of that environment and the examples of the checkout.
#   MOUNTS  more directories for the container, besides the one of submission, for instance
#           /data:/data,/scratch:/scratch

# run_example CHECKOUT SCRIPT ARGUMENTS: run an example under srun, with one process per GPU. A run
# that SIGTERM stopped ends with status 143; its job is queued again, and the script's exit status
# is that of the run.
run_example() {
  local examples=$1/examples script=$2 container=() status
  shift 2
  if [[ -n ${IMAGE-} ]]; then
    examples=/opt/nemo_kd/examples
    container=(
      "--container-image=$IMAGE"
      "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}"
      "--container-workdir=$PWD"
    )
  fi
  if [[ ${NEMO_KD_HOST-} == bridge ]]; then
    examples+=/bridge
    # Lightning finds the node of rank 0 by itself, Bridge does not.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR
  fi
  # One queue of kernels keeps the order in which Megatron starts collectives and products, which
  # lets them overlap under tensor parallelism. Expandable segments: batches differ in length, and
  # blocks of fixed sizes would leave memory in pieces.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # --wait: when a process fails, the others have a minute to end by themselves.
  srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" python "$examples/$script" "$@"
  status=$?
  if ((status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
