#!/usr/bin/env bash
# bash benchmarks/gpu/run.sh check|campaign, from the root of the repository; see README.md.
set -u
KIT=$(cd "$(dirname "$0")" && pwd)
T0=$(date +%s)
PROJECT=$(cd "$KIT/../.." && pwd)
OUT=${OUT:-$PROJECT/runs/gpu/out}
WORK=${WORK:-$PROJECT/runs/gpu/work}
PY=${PY:-python3}
export T0 PROJECT OUT WORK PY
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$OUT" "$WORK/logs"
SITE=$WORK/site
if [ -n "${WHEELS:-}" ] && [ ! -e "$SITE/.done" ]; then
    $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl \
        && touch "$SITE/.done" || { echo "wheels: not installed" | tee -a "$OUT/summary.md"; exit 1; }
fi
export PYTHONPATH="$SITE:$PROJECT:$PROJECT/benchmarks:$KIT"
cd "$PROJECT" || exit 1
exec "$PY" "$KIT/main.py" "$@"
