#!/usr/bin/env bash
# Every test marked `gpu`, on a machine with one: bash tests/gpu.sh [pytest's arguments]
#
# Nearly all of the time is Triton's and Inductor's compiling, so the tests share the GPU in several
# processes where pytest-xdist is there. Those marked `alone` hold more of its memory than they could
# share; they follow one by one. Printed: failures in short, the slowest tests and pytest's closing
# lines; everything is in artifacts/tests-gpu-*.log. What `bash bench/carry.sh xdist bnb` has put
# under .carry/ is used. PYTHON=, WORKERS=, SECONDS_AT_MOST= (of both parts together; what has not run
# by then is left out and the status is not 0) change what the names say.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
cores="$(nproc)"
WORKERS="${WORKERS:-$((cores * 3 / 4 > 12 ? 12 : cores * 3 / 4 < 1 ? 1 : cores * 3 / 4))}"
SECONDS_AT_MOST="${SECONDS_AT_MOST:-560}"
started="$(date +%s)"
path="src"
for folder in xdist bnb; do
  [ -d ".carry/$folder" ] && path="$path:.carry/$folder"
done
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
mkdir -p artifacts
rm -f artifacts/tests-gpu-*.log

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

options=(-q --tb=short -rfE --durations 15 -p no:cacheprovider)
has pytest_timeout && options+=(--timeout 300)
spread=()
if [ "$WORKERS" -gt 1 ] && has xdist; then
  spread=(-n "$WORKERS" --dist worksteal)
fi

status=0
part() {  # NAME MARKS ARGUMENT...
  local name="$1" marks="$2" log="artifacts/tests-gpu-$1.log" code=0
  shift 2
  local left=$((SECONDS_AT_MOST - $(date +%s) + started))
  if [ "$left" -lt 10 ]; then
    echo "$name: no time left"
    status=1
    return
  fi
  # an interrupt has pytest close its report with what it has
  timeout --signal INT --kill-after 20 "$left" \
    "$PYTHON" -m pytest "${options[@]}" -m "$marks" "$@" >"$log" 2>&1 || code=$?
  [ "$code" -eq 5 ] && code=0 # no test selected
  [ "$code" -eq 0 ] || status=1
  echo "== $name: status $code"
  grep -E '^(E  |_{5,} )' "$log" | cut -c1-160 | head -60
  sed -n '/slowest .*durations/,$p' "$log" | cut -c1-200 | tail -60
}

part together "gpu and not alone" ${spread[@]+"${spread[@]}"} "$@"
part alone "gpu and alone" "$@"
closing="$(grep -hE '(passed|failed|error|skipped|no tests ran).* in [0-9.]+s' \
  artifacts/tests-gpu-{together,alone}.log | tr -d '=' | sed 's/^ *//; s/ *$//' | paste -sd ';')"
echo "gpu tests: $closing"
echo "$(($(date +%s) - started)) s of wall time, ${spread[1]:-1} at a time"
exit "$status"
