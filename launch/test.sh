#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them.
# Usage: bash launch/test.sh [--torch] [--slow] [pytest arguments]
#   --torch  installs PyTorch and transformers too (large), so that the parity tests run and are not skipped
#   --slow   runs the wide and slow tests as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_python.sh

extras=test,tensorboard
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --torch) extras=test,tensorboard,torch ;;
    --slow) arguments+=(-m "slow or not slow") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
ensure_environment "$extras"
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
# One process for each core: most of the time is compilation, which takes one.
exec "$VENV_PYTHON" -m pytest -n logical --maxprocesses=4 --dist=loadfile ${arguments[@]+"${arguments[@]}"}
