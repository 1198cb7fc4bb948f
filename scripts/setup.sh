#!/usr/bin/env bash
# Creates .venv (or uses the environment that is active) and installs requirements.txt; nothing happens if it is there.
# Meant to be sourced: it leaves PYTHON set.    PYTHON_BASE=python3.12 picks another interpreter for a new environment.
set -euo pipefail

QUINTET_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON_BASE="${PYTHON_BASE:-python3.11}"

if [[ -n "${VIRTUAL_ENV:-}" && -x "${VIRTUAL_ENV}/bin/python" ]]; then
  environment="${VIRTUAL_ENV}"
  echo "set-up: using the active environment ${environment}"
else
  environment="${QUINTET_ROOT}/.venv"
  if [[ ! -x "${environment}/bin/python" ]]; then
    command -v "${PYTHON_BASE}" >/dev/null || PYTHON_BASE=python3
    "${PYTHON_BASE}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "set-up: Python 3.11 or newer is needed; ${PYTHON_BASE} is $("${PYTHON_BASE}" --version 2>&1). Set PYTHON_BASE." >&2
      exit 2
    }
    echo "set-up: creating ${environment}"
    "${PYTHON_BASE}" -m venv "${environment}"
  fi
fi
PYTHON="${environment}/bin/python"

# The stamp is written after a complete install only, so an interrupted one is repeated.
stamp="${environment}/.quintet-requirements.sha256"
wanted="$("${PYTHON}" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "${QUINTET_ROOT}/requirements.txt")"
if [[ ! -f "${stamp}" || "$(cat "${stamp}")" != "${wanted}" ]]; then
  echo "set-up: installing requirements.txt (about three minutes on a fresh machine)"
  DS_BUILD_OPS=0 "${PYTHON}" -m pip install --quiet --disable-pip-version-check -r "${QUINTET_ROOT}/requirements.txt"
  printf '%s\n' "${wanted}" >"${stamp}"
else
  echo "set-up: requirements.txt is installed"
fi
export PYTHON QUINTET_ROOT
