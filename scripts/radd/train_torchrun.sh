#!/usr/bin/env bash
# Trains RADD on all GPUs of one machine, or of several; run it again to continue.
#   NPROC=8 bash scripts/radd/train_torchrun.sh experiment=small_t_dce_400k parallel=ddp
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash scripts/radd/train_torchrun.sh experiment=medium_t_dce_400k
#     ... and the same on the other machine with NODE_RANK=1 (run folder on a shared disk)
#   bash scripts/radd/train_torchrun.sh --check experiment=text_minutes     # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m radd.train --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch radd.train "$@"
