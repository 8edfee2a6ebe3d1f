#!/bin/sh
# Makes the CPU environment: a virtual environment with every pinned package, and medray in editable form.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}" "${TORCH_INDEX:=https://download.pytorch.org/whl/cpu}"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
  || { echo "medray needs Python 3.11 or 3.12; run: make PYTHON=python3.12 ..." >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip --disable-pip-version-check"
# The +cpu build exists only where CPU wheels are offered: the configured places first, else PyTorch's CPU index.
$PIP install --quiet --no-deps "torch==2.13.0+cpu" 2>/dev/null \
  || $PIP install --quiet --no-deps --index-url "$TORCH_INDEX" "torch==2.13.0+cpu" "torchvision==0.28.0+cpu"
$PIP install --quiet --no-deps -r requirements/cpu.txt
$PIP install --quiet --no-deps --no-build-isolation -e .
