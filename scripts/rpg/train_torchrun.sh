#!/usr/bin/env bash
# Trains a generator on all GPUs of one machine, or of several; run it again to continue.
#   NPROC=4 bash scripts/rpg/train_torchrun.sh experiment=main_vitbase_16384 data.checkpoints=DIR
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=4 bash scripts/rpg/train_torchrun.sh experiment=generalization data.checkpoints=DIR
#     ... and the same on the other machine with NODE_RANK=1 (run folder on a shared disk)
#   bash scripts/rpg/train_torchrun.sh --check experiment=digits_minutes     # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m rpg.train --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch rpg.train "$@"
