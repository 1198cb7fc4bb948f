#!/usr/bin/env bash
# Trains a network from a prediction with DeepSpeed's ZeRO; again: continues. parallel=zero1|zero2|zero3 (ZERO=2).
#   NPROC=6 bash scripts/logah/finetune_deepspeed.sh recipe=gpt2 'inits=[prediction:predictions/gpt2-large]'
#   ZERO=3 NPROC=8 bash scripts/logah/finetune_deepspeed.sh recipe=llama 'inits=[prediction:predictions/llama-large]'
# DeepSpeed is called as a library, so the processes are started by torchrun here too. Variables: scripts/lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ZERO="${ZERO:-2}"
parse_arguments "$@"
plan=()
if ! has_override parallel; then plan=("parallel=zero${ZERO}"); fi
launch logah.finetune "${plan[@]}" "$@"
