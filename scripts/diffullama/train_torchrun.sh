#!/usr/bin/env bash
# Adapts or finetunes a model on all GPUs of one machine, or of several; run it again to continue.
#   NPROC=8 bash scripts/diffullama/train_torchrun.sh experiment=gpt2_full_ddm_small parallel=ddp
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash scripts/diffullama/train_torchrun.sh experiment=gpt2_full_ddm
#     ... and the same on the other machine with NODE_RANK=1 (run folder on a shared disk)
#   bash scripts/diffullama/train_torchrun.sh --check experiment=parent_minutes     # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m diffullama.train --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch diffullama.train "$@"
