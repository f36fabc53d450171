#!/usr/bin/env bash
# From a fresh clone to a trained video encoder and its report, on any machine with Python 3.11+.
# Usage: bash launch/quickstart.sh [--config.KEY=VALUE ...]     (extra words go to the training command)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_python.sh

ensure_environment ""
"$VENV_PYTHON" -m invideo_jax.data.synthetic --output=data/synthetic
"$VENV_PYTHON" -m invideo_jax.tokenizer --data=synthetic:data/synthetic --output=data/captions.model --vocabulary=500
exec "$VENV_PYTHON" -m invideo_jax.train --config=configs/quickstart.py --workdir=workdir "$@"
