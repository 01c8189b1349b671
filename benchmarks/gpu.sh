#!/usr/bin/env bash
# What this project does on one GPU, in parts of at most nine minutes, for whoever gets a GPU for ten minutes at a time.
#
#   benchmarks/gpu.sh [--wheels=DIR] [--results=DIR] [--tiny] [PART ...]
#
# Without parts: all, the ones first that tell most. A part that has its result already is measured again and takes
# its place. Results are merged into DIR/GPU-NAME.json (default benchmarks/results), and DIR/GPU-NAME.md shows them.
# --wheels: a folder that `make wheels` filled, for a machine without network; without it pip brings what is missing.
# --tiny: small networks, on whatever devices there are: a rehearsal.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
results="$here/results" wheels="" tiny="" parts=()
for argument in "$@"; do
    case "$argument" in
        --wheels=*) wheels="${argument#*=}" ;;
        --results=*) results="${argument#*=}" ;;
        --tiny) tiny="--tiny" ;;
        -*) echo "gpu.sh: unknown flag $argument" >&2; exit 2 ;;
        *) parts+=("$argument") ;;
    esac
done
((${#parts[@]})) || parts=(numerics base64 sr256 deepfloyd t5 smoke quickstart flags)
python="${PYTHON:-python3}"
mkdir -p "$results"
missing="$("$python" "$here/gpu/missing.py")"
if [ -n "$missing" ]; then
    echo "installing $missing"
    # shellcheck disable=SC2086  # one argument a package
    if [ -n "$wheels" ]; then
        "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 1
    else
        "$python" -m pip install --quiet $missing || exit 1
    fi
fi
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
failed=0
for part in "${parts[@]}"; do
    echo "== $part"
    if ! timeout --kill-after=10 540 "$python" "$here/gpu/measure.py" "$part" --results="$results" $tiny; then
        echo "gpu.sh: $part was not finished; what it had measured is kept" >&2
        failed=1
    fi
done
exit "$failed"
