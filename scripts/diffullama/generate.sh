#!/usr/bin/env bash
# Generates or infills text; NPROC=8 shares the texts between 8 processes, with the same result.
#   bash scripts/diffullama/generate.sh model_path=diffusionfamily/diffugpt-s 'prompt="The weather"' num_samples=4
# Variables: scripts/lib.sh. Options: python -m diffullama.generate --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch diffullama.generate "$@"
