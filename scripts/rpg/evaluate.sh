#!/usr/bin/env bash
# Evaluates generated networks: accuracy, novelty, baselines, ensembles, copies; tables, figures and a page.
#   bash scripts/rpg/evaluate.sh originals=checkpoints generated=runs/first/generated tester.kind=python \
#       tester.target=my_module:MyTester
#   bash scripts/rpg/evaluate.sh originals=checkpoints generator=runs/first num_generated=20
# Variables: scripts/lib.sh. Options: python -m rpg.evaluate --help
set -euo pipefail
NPROC=1 # one process: networks are tested one after another, on the tester's device
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch rpg.evaluate "$@"
