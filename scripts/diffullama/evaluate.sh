#!/usr/bin/env bash
# Scores a model; items are shared out among processes, the result does not depend on how many.
#   NPROC=4 bash scripts/diffullama/evaluate.sh model_path=diffusionfamily/diffugpt-s 'tasks=[hellaswag,piqa]'
# Variables: scripts/lib.sh. Options: python -m diffullama.evaluate --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch diffullama.evaluate "$@"
