#!/usr/bin/env bash
# Trains RADD as a SLURM job that saves itself before its time runs out and goes back into the queue.
#   NNODES=4 NPROC=8 bash scripts/radd/train_slurm.sh experiment=medium_k_dce_400k parallel=fsdp2     # submits itself
#   SBATCH_ARGS="--partition=gpu --time=1-00" NPROC=8 bash scripts/radd/train_slurm.sh experiment=small_t_dce_400k
#   bash scripts/radd/train_slurm.sh --check experiment=small_t_dce_400k                              # only checks
# The run folder must be on a disk that all nodes see. Variables: scripts/lib.sh.
#SBATCH --job-name=radd
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=radd-%j.log
set -euo pipefail

# sbatch runs a copy of this file, so the repository is where the job was submitted from (or QUINTET_ROOT).
lib="$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [[ -n "${SLURM_JOB_ID:-}" && ! -f "${lib}" ]]; then lib="${QUINTET_ROOT:-${SLURM_SUBMIT_DIR}}/scripts/lib.sh"; fi
if [[ ! -f "${lib}" ]]; then
  echo "train_slurm.sh: ${lib} does not exist; submit from the repository's root or set QUINTET_ROOT." >&2
  exit 2
fi
wanted_nodes="${NNODES:-${SLURM_NNODES:-1}}"
NNODES="${wanted_nodes}"
source "${lib}"
parse_arguments "$@"
module=radd.train

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  # shellcheck disable=SC2206 - SBATCH_ARGS holds several words on purpose
  command=(sbatch --nodes "${NNODES}" --ntasks-per-node "${NPROC}" --gpus-per-node "${NPROC}" ${SBATCH_ARGS:-}
    "${QUINTET_ROOT}/scripts/radd/train_slurm.sh" "${overrides[@]}")
  show_command "${command[@]}"
  validate "${module}" # a mistake shows here and not after hours in the queue
  if [[ "${check}" == true ]]; then exit 0; fi
  export QUINTET_ROOT NPROC NNODES PYTHON
  exec "${command[@]}"
fi

if [[ "${SLURM_NNODES:-1}" != "${wanted_nodes}" ]]; then
  say "NNODES=${wanted_nodes}, but SLURM gave ${SLURM_NNODES:-1}: submit with \`bash scripts/radd/train_slurm.sh\`, which" \
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
