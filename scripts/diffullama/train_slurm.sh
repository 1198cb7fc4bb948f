#!/usr/bin/env bash
# Trains or adapts a model as a SLURM job that saves itself before its time runs out and goes back into the queue.
#   NNODES=4 NPROC=8 bash scripts/diffullama/train_slurm.sh experiment=llama2_7b_ddm     # submits itself
#   SBATCH_ARGS="--partition=gpu --time=1-00" NPROC=8 bash scripts/diffullama/train_slurm.sh experiment=gpt2_full_ddm
#   bash scripts/diffullama/train_slurm.sh --check experiment=gpt2_full_ddm                              # only checks
# The run folder must be on a disk that all nodes see. Variables: scripts/lib.sh.
#SBATCH --job-name=diffullama
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=diffullama-%j.log
set -euo pipefail

# sbatch runs a copy of this file, so the repository is where the job was submitted from (or QUINTET_ROOT).
lib="$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [[ -n "${SLURM_JOB_ID:-}" && ! -f "${lib}" ]]; then lib="${QUINTET_ROOT:-${SLURM_SUBMIT_DIR}}/scripts/lib.sh"; fi
if [[ ! -f "${lib}" ]]; then
  echo "train_slurm.sh: ${lib} does not exist; submit from the repository's root or set QUINTET_ROOT." >&2
  exit 2
fi
source "${lib}"
launch_slurm diffullama.train scripts/diffullama/train_slurm.sh "$@"
