#!/usr/bin/env bash
# Trains a model with DeepSpeed's ZeRO; run it again to continue. parallel=zero1|zero2|zero3 (ZERO=2).
#   NPROC=8 bash scripts/mup_dit/train_deepspeed.sh experiment=dit_xl_2_mup
#   ZERO=3 NPROC=8 bash scripts/mup_dit/train_deepspeed.sh experiment=dit_xl_2_mup
# DeepSpeed is called as a library, so the processes are started by torchrun here too. Variables: scripts/lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ZERO="${ZERO:-2}"
parse_arguments "$@"
plan=()
if ! has_override parallel; then plan=("parallel=zero${ZERO}"); fi
launch mup_dit.train "${plan[@]}" "$@"
