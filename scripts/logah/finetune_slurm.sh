#!/usr/bin/env bash
# Trains from predictions and other starts as a SLURM job that saves itself before its time runs out and goes back
# into the queue.
#   NPROC=4 bash scripts/logah/finetune_slurm.sh recipe=vit_cifar data.root=DIR     # submits itself
#   SBATCH_ARGS="--partition=gpu --time=1-00" NPROC=4 bash scripts/logah/finetune_slurm.sh recipe=gpt2
#   bash scripts/logah/finetune_slurm.sh --check recipe=vit_cifar                        # only checks
# The run folder must be on a disk that all nodes see. Variables: scripts/lib.sh.
#SBATCH --job-name=logah-finetune
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=logah-finetune-%j.log
set -euo pipefail

# sbatch runs a copy of this file, so the repository is where the job was submitted from (or QUINTET_ROOT).
lib="$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
if [[ -n "${SLURM_JOB_ID:-}" && ! -f "${lib}" ]]; then lib="${QUINTET_ROOT:-${SLURM_SUBMIT_DIR}}/scripts/lib.sh"; fi
if [[ ! -f "${lib}" ]]; then
  echo "finetune_slurm.sh: ${lib} does not exist; submit from the repository's root or set QUINTET_ROOT." >&2
  exit 2
fi
source "${lib}"
launch_slurm logah.finetune scripts/logah/finetune_slurm.sh "$@"
