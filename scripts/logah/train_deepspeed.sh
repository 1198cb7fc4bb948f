#!/usr/bin/env bash
# Trains a hypernetwork with DeepSpeed's ZeRO; run it again to continue. parallel=zero1|zero2 (ZERO=2).
#   NPROC=2 bash scripts/logah/train_deepspeed.sh experiment=wikitext103_gpt2_small
#   ZERO=1 NPROC=2 bash scripts/logah/train_deepspeed.sh experiment=wikitext103_gpt2_small
# DeepSpeed is called as a library, so the processes are started by torchrun here too. Variables: scripts/lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
ZERO="${ZERO:-2}"
parse_arguments "$@"
plan=()
if ! has_override parallel; then plan=("parallel=zero${ZERO}"); fi
launch logah.train "${plan[@]}" "$@"
