# Sourced by search_dints.sh and train_dints.sh: starts a stage on the devices of one node or of several, with
# launch/torchrun.py, which is torchrun but for its exit codes.
#
# Environment (all optional; what else is set, as GLOO_SOCKET_IFNAME or NCCL_DEBUG, reaches the processes unchanged):
#   NUM_GPUS_PER_NODE  processes on this node: its GPUs (of CUDA_VISIBLE_DEVICES, if that is set), or 1 where it has none,
#                      and 1 for slices of GPUs (MIG)
#   NUM_NODES          nodes of the run (1); the others are for more than one:
#   NODE_RANK          number of this node, from 0 (0)
#   MASTER_ADDR        address of node 0 (127.0.0.1)
#   MASTER_PORT        a free port there (29500)
#   NODE_ADDR          this node's own address, where the others cannot find it by its name
#   MAX_RESTARTS       how often the processes are started again, from the last save, after one of them failed, also of
#                      bad input (0; under dints.sbatch 3)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT
#                      seconds that a run may take to end after a signal, before it is killed (20; torch 2.11: always 30)
#   PYTHON             interpreter: the active environment's, else that of .venv beside the scripts, else python3
# shellcheck shell=bash

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

choose_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    echo "$PYTHON"
  elif [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -f "$here/.venv/bin/python" && -x "$here/.venv/bin/python" ]]; then
    echo "$here/.venv/bin/python"
  elif command -v python >/dev/null; then
    echo python
  else
    echo python3
  fi
}

# Of MIG slices CUDA shows a process the first, and no whole GPU beside it; NCCL does not join slices of a GPU.
count_gpus() {
  local visible listed
  if ! command -v nvidia-smi >/dev/null || [[ "${CUDA_VISIBLE_DEVICES-}" == -1 ]]; then
    echo 0
    return
  fi
  listed="${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null || true)}"
  if [[ "$listed" == *MIG-* ]]; then
    if [[ "$listed" == *MIG-*MIG-* ]]; then
      echo "MIG: one process is started, on the first slice; give another run another with CUDA_VISIBLE_DEVICES" >&2
    fi
    echo 1
  elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    echo "${#visible[@]}"
  else
    grep -c '^GPU ' <<<"$listed" || true  # grep prints the 0, and fails
  fi
}

# require_data TASK DATA_ROOT: leave with the command that fetches the data if it is not there.
require_data() {
  [[ -f "$2/dataset.json" ]] && return
  echo "error: $2/dataset.json does not exist. Fetch the data first:" >&2
  if [[ "$1" == Task00_Phantom ]]; then
    printf '    PYTHONPATH=%q %q -m dints.data.phantom --root %q\n' "$here" "$(choose_python)" "$2" >&2
  else
    printf '    %q %q --msd_task %q --root %q\n' \
      "$(choose_python)" "$here/download_msd_datasets.py" "$1" "$(dirname "$2")" >&2
  fi
  exit 1
}

# require_numbers: leave where a variable that is one of these is no number. (Bash's arithmetic would run what is in it.)
require_numbers() {
  local name
  for name in NUM_GPUS_PER_NODE NUM_NODES NODE_RANK MAX_RESTARTS MASTER_PORT OMP_NUM_THREADS; do
    if [[ -n "${!name:-}" && ! "${!name}" =~ ^(0|[1-9][0-9]*)$ || "$name=${!name:-1}" =~ ^NUM_.*=0$ ]]; then
      printf 'error: %s is %q: give a whole number\n' "$name" "${!name}" >&2
      exit 1
    fi
  done
}

# launch SCRIPT [ARGUMENT ...]: print the command, then become it.
launch() {
  require_numbers
  local script="$1" gpus processes nodes="${NUM_NODES:-1}"
  shift
  gpus="$(count_gpus)"
  processes="${NUM_GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
  # -P: what is in launch/ shadows no other module.
  local command=("$(choose_python)" -P "$here/launch/torchrun.py" "--nproc_per_node=$processes")
  command+=("--max_restarts=${MAX_RESTARTS:-0}")
  if ((nodes == 1)); then
    command+=(--standalone --local_addr=127.0.0.1)
  else
    local address="${MASTER_ADDR:-127.0.0.1}"
    command+=(
      "--nnodes=$nodes" --rdzv_backend=c10d "--rdzv_endpoint=$address:${MASTER_PORT:-29500}"
      "--rdzv_id=${SLURM_JOB_ID:-dints}" "--rdzv_conf=is_host=$((${NODE_RANK:-0} == 0 ? 1 : 0)),join_timeout=300"
    )
    local own="${NODE_ADDR:-}"
    if [[ "$address" == 127.* ]]; then own="$address"; fi
    if [[ -n "$own" ]]; then command+=("--local_addr=$own"); fi
  fi
  local cores
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  # torchrun would give each process one core.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
  # With the store of the first start, every second restart of gloo fails.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
  # No C++ stack traces of nodes that do not answer.
  export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-20}"
  command+=("$here/$script" "$@")
  printf '%q ' "${command[@]}"
  echo
  exec "${command[@]}"
}
