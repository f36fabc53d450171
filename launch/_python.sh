# Sourced by the starters: the repository's own virtual environment, made and filled when needed.
# Usage: ensure_environment EXTRAS   ('' or 'test,report'); afterwards $VENV_PYTHON is its interpreter.

VENV_PYTHON=.venv/bin/python

ensure_environment() {
  local extras=$1 base=${PYTHON:-python3} stamp wanted
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "invideo_jax needs Python 3.11 or newer; '$base' is $("$base" --version 2>&1 || echo absent)." >&2
    echo "Install one and name it: PYTHON=/path/to/python3.11 bash $0" >&2
    exit 2
  fi
  if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then  # absent, or its making was interrupted
    echo "Making the virtual environment .venv ..."
    if ! "$base" -m venv --clear .venv; then
      echo "Python's venv module failed (on Debian or Ubuntu: apt install python3-venv)." >&2
      exit 2
    fi
  fi
  # The stamp remembers what was installed, so that a second start installs nothing.
  stamp=.venv/installed-${extras:-core}
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing invideo_jax${extras:+[$extras]} into .venv (a minute or two) ..."
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt --editable ".${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
  fi
}
