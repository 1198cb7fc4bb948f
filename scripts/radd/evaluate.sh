#!/usr/bin/env bash
# Zero-shot perplexity of a RADD model; sequences are shared out among processes, the result does not depend on how many.
#   NPROC=4 bash scripts/radd/evaluate.sh model_path=runs/first valid_dataset=embedded loss_type=k_DCE
# Variables: scripts/lib.sh. Options: python -m radd.evaluate --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch radd.evaluate "$@"
