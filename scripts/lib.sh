# Shared by the launchers: `source` it, then call `launch MODULE [key=value ...]`. Variables, with their defaults:
#   NPROC        processes on this machine (its GPUs, or 1)
#   NNODES       machines (1); with more, run the same command on each with its own NODE_RANK
#   NODE_RANK    number of this machine, from 0 (0)
#   MASTER_ADDR  name of machine 0 (localhost);  MASTER_PORT (29500)
#   RUN_DIR      run folder, the same as run_dir=... (empty: the configuration's)
#   PYTHON       interpreter (the active environment's, else .venv's)
# --check prints the command and composes its configuration instead of running it.
# Exit codes: the entry point's; 85 when a signal stopped the run after a checkpoint (RUN_DIR/REQUEUE exists).

QUINTET_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="${QUINTET_ROOT}${PYTHONPATH:+:${PYTHONPATH}}" # entry points work from any directory
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$(command -v python3 || true)"
  for environment in "${VIRTUAL_ENV:-}" "${QUINTET_ROOT}/.venv"; do
    if [[ -n "${environment}" && -x "${environment}/bin/python" ]]; then
      PYTHON="${environment}/bin/python"
      break
    fi
  done
fi
asked_nodes="${NNODES:-}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-29500}"
RUN_DIR="${RUN_DIR:-}"
if [[ -z "${NPROC:-}" ]]; then
  NPROC="$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)"
  [[ "${NPROC}" -gt 0 ]] || NPROC=1
fi
EXIT_REQUEUE=85

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# Splits "$@" into check=true|false and the array `overrides`, with RUN_DIR added.
parse_arguments() {
  check=false
  overrides=()
  local argument
  for argument in "$@"; do
    case "${argument}" in
      --check) check=true ;;
      *) overrides+=("${argument}") ;;
    esac
  done
  for name in NPROC NNODES NODE_RANK; do
    if [[ ! "${!name}" =~ ^[0-9]+$ || ("${name}" != NODE_RANK && "${!name}" -lt 1) ]]; then
      say "${name}=${!name} must be a whole number$([[ ${name} == NODE_RANK ]] || echo ' of at least 1')."
      exit 2
    fi
  done
  if [[ -n "${RUN_DIR}" ]]; then overrides+=("run_dir=${RUN_DIR}"); fi
}

# Whether the overrides choose `key=...` already.
has_override() {
  local argument
  for argument in "${overrides[@]}"; do
    [[ "${argument}" != "$1="* ]] || return 0
  done
  return 1
}

# The command as it can be pasted, on stderr.
show_command() {
  local quoted
  printf -v quoted ' %q' "$@"
  say "running:${quoted}"
}

# Composes the configuration of MODULE with the overrides; prints nothing but errors.
validate() { "${PYTHON}" -m "$1" "${overrides[@]}" --cfg job >/dev/null; }

# The run folder that MODULE will use; empty if it has none.
resolve_run_dir() { "${PYTHON}" -m "$1" "${overrides[@]}" --cfg job --resolve | sed -n 's/^run_dir: *//p' | tr -d "'\""; }

# wants_requeue RUN_DIR BEGAN: whether a run that began then (seconds) was stopped by a signal after a checkpoint.
# A file from an earlier stop does not count: the run may have failed before it could remove it.
wants_requeue() {
  [[ -n "$1" && -f "$1/REQUEUE" ]] && (("$(stat -c %Y "$1/REQUEUE")" >= "$2"))
}

# launch MODULE [key=value ...] [--check]
launch() {
  local module="$1"
  shift
  parse_arguments "$@"
  local command=("${PYTHON}" -m "${module}" "${overrides[@]}")
  if [[ "${NPROC}" -gt 1 || "${NNODES}" -gt 1 ]]; then
    local where=(--standalone)
    if [[ "${NNODES}" -gt 1 ]]; then
      where=(--node_rank "${NODE_RANK}" --master_addr "${MASTER_ADDR}" --master_port "${MASTER_PORT}")
    fi
    command=("${PYTHON}" -m torch.distributed.run --nnodes "${NNODES}" --nproc_per_node "${NPROC}" "${where[@]}"
      -m "${module}" "${overrides[@]}")
  fi
  show_command "${command[@]}"
  if [[ "${check}" == true ]]; then
    validate "${module}"
    return
  fi
  local began folder
  began="$(date +%s)"
  run_and_forward_signals TERM "${command[@]}"
  # torchrun turns every exit code into 1: the file tells a run that saved itself from one that failed
  if [[ "${status}" -ne 0 && "${status}" -ne 2 && "${status}" -ne "${EXIT_REQUEUE}" ]]; then
    folder="$(resolve_run_dir "${module}")"
    if wants_requeue "${folder}" "${began}"; then
      say "stopped after a checkpoint; the same command continues (${folder}/REQUEUE)"
      status="${EXIT_REQUEUE}"
    fi
  fi
  return "${status}"
}

# run_and_forward_signals SIGNAL COMMAND...: sets `status` and `signalled`. TERM and USR1 reach the command as SIGNAL.
run_and_forward_signals() {
  local forwarded="$1" woken code
  shift
  signalled=false
  status=0
  "$@" &
  child=$!
  trap 'signalled=true; woken=true; kill -s "'"${forwarded}"'" "${child}" 2>/dev/null || true' TERM USR1
  # bash leaves `wait` when a trap runs; the command is still saving then
  while true; do
    woken=false
    code=0
    wait "${child}" || code=$?
    if [[ "${code}" -ne 127 ]]; then status="${code}"; fi
    if [[ "${woken}" == false ]]; then break; fi
  done
  trap - TERM USR1
}

# launch_slurm MODULE SCRIPT [key=value ...] [--check]: submits SCRIPT (from the repository's root), or, inside the job,
# runs MODULE on its nodes and puts a job that a signal stopped back into the queue. Call it once, last.
launch_slurm() {
  local module="$1" script="$2"
  shift 2
  NNODES="${asked_nodes:-${SLURM_NNODES:-1}}"
  local wanted_nodes="${NNODES}" command hosts ranks run_dir began
  parse_arguments "$@"

  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    # shellcheck disable=SC2206 - SBATCH_ARGS holds several words on purpose
    command=(sbatch --nodes "${NNODES}" --ntasks-per-node "${NPROC}" --gpus-per-node "${NPROC}" ${SBATCH_ARGS:-}
      "${QUINTET_ROOT}/${script}" "${overrides[@]}")
    show_command "${command[@]}"
    validate "${module}" # a mistake shows here and not after hours in the queue
    if [[ "${check}" == true ]]; then exit 0; fi
    export QUINTET_ROOT NPROC NNODES PYTHON
    exec "${command[@]}"
  fi

  if [[ "${SLURM_NNODES:-1}" != "${wanted_nodes}" ]]; then
    say "NNODES=${wanted_nodes}, but SLURM gave ${SLURM_NNODES:-1}: submit with \`bash ${script}\`, which" \
      "passes --nodes, or add --nodes=${wanted_nodes} to sbatch."
    exit 2
  fi
  hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST}")"
  MASTER_ADDR="${hosts%%$'\n'*}"
  MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
  export MASTER_ADDR MASTER_PORT

  # One task per process, without torchrun between: the signal then reaches the trainer, and so does its exit code here.
  ranks='export RANK="${SLURM_PROCID}" WORLD_SIZE="${SLURM_NTASKS}" LOCAL_RANK="${SLURM_LOCALID}"; exec "$@"'
  command=(srun --nodes "${NNODES}" --ntasks-per-node "${NPROC}" --kill-on-bad-exit=1
    bash -c "${ranks}" rank "${PYTHON}" -m "${module}" "${overrides[@]}")
  show_command "${command[@]}"
  if [[ "${check}" == true ]]; then
    validate "${module}"
    exit 0
  fi
  run_dir="$(resolve_run_dir "${module}")"
  began="$(date +%s)"
  run_and_forward_signals USR1 "${command[@]}"
  if wants_requeue "${run_dir}" "${began}" || [[ "${signalled}" == true && "${status}" -ne 0 ]]; then
    # a signal without the file came before the first step: there is nothing to lose in starting again
    say "stopped by a signal; going back into the queue as job ${SLURM_JOB_ID}"
    scontrol requeue "${SLURM_JOB_ID}"
    exit 0
  fi
  exit "${status}"
}
