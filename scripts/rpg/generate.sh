#!/usr/bin/env bash
# Generates networks from a trained generator; NPROC=8 splits their tokens over 8 processes, with the same result.
#   bash scripts/rpg/generate.sh generator=runs/first num_generated=10 output=runs/first/generated test=true
#   NPROC=8 bash scripts/rpg/generate.sh generator=runs/large sampling.steps=100 precision=bf16 output=runs/large/generated
# Variables: scripts/lib.sh. Options: python -m rpg.generate --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch rpg.generate "$@"
