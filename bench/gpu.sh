#!/usr/bin/env bash
# All that waits for a GPU, in one command on a fresh machine with Python 3.11 or later and torch 2.11 or later.
# Wheels that lie in ./.whl are installed beside what is there; nothing is downloaded. See bench/gpu.py.
#
#     bash bench/gpu.sh [--seconds 450] [--parts rates,make,exact,…] [--out FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G ".whl/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl ||
        echo "the wheels in .whl could not be installed; going on without" >&2
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader || echo "no nvidia-smi here"
"$python" -m bench.gpu "$@"
