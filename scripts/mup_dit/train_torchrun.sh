#!/usr/bin/env bash
# Trains a model on all GPUs of one machine, or of several; run it again to continue.
#   NPROC=8 bash scripts/mup_dit/train_torchrun.sh experiment=dit_w288 parallel=ddp
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash scripts/mup_dit/train_torchrun.sh experiment=dit_xl_2_mup
#     ... and the same on the other machine with NODE_RANK=1 (run folder on a shared disk)
#   bash scripts/mup_dit/train_torchrun.sh --check experiment=digits_minutes     # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m mup_dit.train --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch mup_dit.train "$@"
