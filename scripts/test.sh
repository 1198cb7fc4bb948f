#!/usr/bin/env bash
# Sets up the environment, lints, and runs the whole test suite in parallel.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh tests/radd -k loss   any pytest arguments
#   WORKERS=8 bash scripts/test.sh            number of test processes (default: one a core)
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "${QUINTET_ROOT}"

echo "test: ruff"
"${PYTHON}" -m ruff check .
"${PYTHON}" -m ruff format --check --quiet .

# One thread a process: several test processes share the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS="${WORKERS:-$("${PYTHON}" -c 'import os; print(len(os.sched_getaffinity(0)))')}"
echo "test: pytest with ${WORKERS} processes"
exec "${PYTHON}" -m pytest -n "${WORKERS}" --dist worksteal "$@"
