#!/usr/bin/env bash
# Tests scripts/slurm/ on a real Slurm, which scripts/slurm/one_machine.sh makes in a temporary folder and takes down.
# Needs root; Debian's slurm-wlm and munge (apt-get install -y slurm-wlm munge); and .venv, which `make test` makes, or
# another Python in PYTHON. Unlike in `make test`, nothing is skipped where Slurm is missing.
# Usage: scripts/check_slurm.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export NEMO_IMAGE_TESTS_NEED_SLURM=1
exec "${PYTHON:-.venv/bin/python}" -m pytest tests/slurm "$@"
