#!/usr/bin/env bash
# Scores images; NPROC=8 shares them between 8 processes, with the same result.
#   bash scripts/mup_dit/evaluate.sh samples=runs/digits/samples reference=digits split=train features=digits
#   NPROC=8 bash scripts/mup_dit/evaluate.sh samples=runs/xl/samples reference=VIRTUAL_imagenet256_labeled.npz
# Variables: scripts/lib.sh. Options: python -m mup_dit.evaluate --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch mup_dit.evaluate "$@"
