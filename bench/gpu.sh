#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes: bench/gpu.sh OUTDIR
#
# The gpu tests, the forms of attention, and one full-size step of each recipe and stage, eager and compiled. Needs
# torch; what another missing package (or the GPU) prevents is skipped, and said. Without network. PYTHON=... picks the
# interpreter. Ends with 1 if a part failed. Results: OUTDIR/attention.json, OUTDIR/steps_CONFIG.json, a log of each part,
# and summary.txt.
set -u -o pipefail
OUT=${1:?usage: bench/gpu.sh OUTDIR}
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/summary.txt
FAILED=0
DEADLINE=$((SECONDS + ${GPU_SH_SECONDS:-520}))
: > "$SUMMARY"

say() { echo "$*" | tee -a "$SUMMARY"; }

# run NAME LIMIT COMMAND...: LIMIT in seconds, less where less is left; the log goes to OUTDIR/NAME.txt
run() {
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) code
    shift 2
    if [ "$left" -lt 20 ]; then
        say "skipped $name: only $left s are left"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.txt" 2>&1
    code=$?
    if [ "$code" -eq 0 ]; then
        say "done $name"
    else
        FAILED=1
        say "FAILED $name (exit code $code; 124 and 137: over its $limit s): $(tail -n 1 "$OUT/$name.txt")"
    fi
}

# missing MODULE...: prints the first that cannot be imported, with the reason
missing() {
    "$PYTHON" - "$@" <<'PY'
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name} ({type(error).__name__}: {error})".splitlines()[0])
        break
PY
}

say "$(uname -m), $("$PYTHON" --version 2>&1)"
if why=$(missing torch) && [ -n "$why" ]; then
    say "skipped everything: $why"
    exit 0
fi
say "torch $("$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device")')"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "skipped gpu tests, attention, steps: no CUDA device"
    exit 0
fi

why=$(missing pytest scipy segment_anything transformers timm trainer.stages)
if [ -n "$why" ]; then
    say "skipped gpu tests: $why"
else
    # Side by side where pytest-xdist is there: they took 100 s on 8 processes, several times that one by one.
    at_once=$([ -z "$(missing xdist)" ] && echo "-n 8")
    # shellcheck disable=SC2086
    run tests 200 "$PYTHON" -m pytest -v $at_once -m gpu tests
fi

why=$(missing trainer.stages trainer.parallel.engine)
if [ -n "$why" ]; then
    say "skipped steps: $why"
else
    # A step of stage 1 takes 32 images; of stage 2 one. The 11 rounds are recomputed as their config says.
    for config in sam_vith_paper sam_vith mae_vith_paper mae_vith; do
        run "steps_$config" 120 "$PYTHON" -m bench.step "launch/configs/$config.yaml" --compile --steps 3 \
            --out "$OUT/steps_$config.json"
        grep "^|" "$OUT/steps_$config.txt" >> "$SUMMARY" 2>/dev/null
    done
fi

run attention 90 "$PYTHON" -m bench.attention --dtype bfloat16 --case vit_h_window --case vit_h_global \
    --case decoder_image_to_token_1024px --case decoder_token_to_image_1024px --out "$OUT/attention.json"

exit $FAILED
