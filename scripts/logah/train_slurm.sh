#!/usr/bin/env bash
# Trains a hypernetwork as a SLURM job that saves itself before its time runs out and goes back into the queue.
#   NPROC=4 bash scripts/logah/train_slurm.sh experiment=cifar100_small     # submits itself
#   SBATCH_ARGS="--partition=gpu --time=1-00" NPROC=2 bash scripts/logah/train_slurm.sh experiment=wikitext103_gpt2_tiny
#   bash scripts/logah/train_slurm.sh --check experiment=cifar100_tiny                         # only checks
# The run folder must be on a disk that all nodes see. Variables: scripts/lib.sh.
#SBATCH --job-name=logah
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logah-%j.log
set -euo pipefail

# sbatch runs a copy of this file, so the repository is where the job was submitted from (or QUINTET_ROOT).
lib="$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [[ -n "${SLURM_JOB_ID:-}" && ! -f "${lib}" ]]; then lib="${QUINTET_ROOT:-${SLURM_SUBMIT_DIR}}/scripts/lib.sh"; fi
if [[ ! -f "${lib}" ]]; then
  echo "train_slurm.sh: ${lib} does not exist; submit from the repository's root or set QUINTET_ROOT." >&2
  exit 2
fi
source "${lib}"
launch_slurm logah.train scripts/logah/train_slurm.sh "$@"
