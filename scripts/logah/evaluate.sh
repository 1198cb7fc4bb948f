#!/usr/bin/env bash
# Scores predicted networks: top-1 and top-5, or perplexity; statistics of their parameters. A suite is shared out.
#   bash scripts/logah/evaluate.sh checkpoint=runs/logah targets=[vit_b_cifar] data=cifar100
#   NPROC=4 bash scripts/logah/evaluate.sh checkpoint=ghn3tm8.pt suite=torchvision data=imagenet data.root=DIR
# Variables: scripts/lib.sh. Options: python -m logah.evaluate --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch logah.evaluate "$@"
