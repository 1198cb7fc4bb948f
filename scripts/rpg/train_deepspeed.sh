#!/usr/bin/env bash
# Trains a generator with DeepSpeed's ZeRO; run it again to continue. parallel=zero1|zero2|zero3 (ZERO=2).
#   NPROC=8 bash scripts/rpg/train_deepspeed.sh experiment=main_vitbase_16384 optim=adamw data.checkpoints=DIR
#   ZERO=3 NPROC=8 bash scripts/rpg/train_deepspeed.sh experiment=main_vitbase_16384 optim=adamw data.checkpoints=DIR
# DeepSpeed is called as a library, so the processes are started by torchrun here too. Variables: scripts/lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ZERO="${ZERO:-2}"
parse_arguments "$@"
plan=()
if ! has_override parallel; then plan=("parallel=zero${ZERO}"); fi
launch rpg.train "${plan[@]}" "$@"
