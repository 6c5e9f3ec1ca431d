#!/usr/bin/env bash
# Installs the wheel in dist/ into a fresh environment and makes one picture with it: tools/check_wheel.sh PYTHON
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
wheel=$(ls "$root"/dist/nova_video-*.whl)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" # so that nothing is imported from the checkout
unset PYTHONPATH

"$python" -m venv environment
environment/bin/python -m pip install --disable-pip-version-check --quiet --constraint "$root/constraints.txt" "$wheel[demo]"
environment/bin/python -c 'import nova_video, nova_worlds; print(nova_video.__version__, nova_video.__file__)'
environment/bin/python -c 'import nova_video; [getattr(nova_video, name) for name in ("NovaPipeline", "GenerateRequest", "InputError")]'
environment/bin/nova --version | tee version.txt
grep --quiet 'commit [0-9a-f]\{7,\}' version.txt || { echo "nova --version does not tell the commit" >&2; exit 1; }
HF_HUB_OFFLINE=1 environment/bin/nova generate "a red apple on a white background" --num-frames 1 --seed 0 -o apple.png
environment/bin/nova info apple.png
