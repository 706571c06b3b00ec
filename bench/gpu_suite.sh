#!/usr/bin/env bash
# Everything that needs a GPU, part by part: the tests marked gpu, then every bench.
#   bench/gpu_suite.sh                        all parts; results in bench/results/gpu
#   bench/gpu_suite.sh --list                 the parts, a line each
#   bench/gpu_suite.sh --part rollout-2b-b1   one of them (may be given again and again)
#   bench/gpu_suite.sh --minutes 8            each part ends after so long, with what it has (8)
#   bench/gpu_suite.sh --smoke                everything at its smallest, on a CPU too: does it all run?
#   OUT=/somewhere PYTHON=python3 MODEL=/weights/of/2b bench/gpu_suite.sh      (MODEL: for the time to the first update)
# Four files, three added to after every part: machine.json, results.jsonl (one line a part: status, seconds, the bench's
# document), log.txt; at the end goals.md, every goal beside what was measured and what is forecast (bench/goals.py). A part that lacks a package is skipped with a line; one that fails is named at the end and makes
# the exit status 1; the others still run. Needs bash, timeout and Python with torch; git only to name the commit.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out="${OUT:-bench/results/gpu}"
python="${PYTHON:-$(command -v python3 || command -v python)}"
minutes=8
smoke=""
list=""
wanted=()
while [ $# -gt 0 ]; do
    case "$1" in
    --part) wanted+=("${2:?--part needs a name}"); shift 2 ;;
    --minutes) minutes="${2:?--minutes needs a number}"; shift 2 ;;
    --smoke) smoke=1; shift ;;
    --list) list=1; shift ;;
    *) echo "gpu_suite.sh: unknown word $1; see the first lines of this file" >&2; exit 2 ;;
    esac
done
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
known=()
failed=()
skipped=()

chosen() {
    known+=("$1")
    [ "${#wanted[@]}" -eq 0 ] && return 0
    local name
    for name in "${wanted[@]}"; do [ "$name" = "$1" ] && return 0; done
    return 1
}

# part NAME "PACKAGES" COMMAND...: runs it, if it is wanted and its packages are there
part() {
    local name="$1" needs="$2" start=$SECONDS status="done"
    shift 2
    chosen "$name" || return 0
    if [ -n "$list" ]; then
        echo "$name: $*"
        return 0
    fi
    local package
    for package in $needs; do
        if ! "$python" -c "import $package" 2>/dev/null; then
            echo "== $name: skipped, $package is not installed"
            skipped+=("$name")
            return 0
        fi
    done
    echo "== $name: $*"
    timeout --kill-after=20 "$((minutes * 60))" "$@" >"$out/part.log" 2>&1
    local code=$?
    [ $code -eq 124 ] && status="out of time"
    [ $code -ne 0 ] && [ $code -ne 124 ] && status="failed ($code)"
    if [ $code -ne 0 ]; then
        failed+=("$name")
        tail -n 15 "$out/part.log" | sed 's/^/   /'
    fi
    echo "   $status after $((SECONDS - start)) s"
    { echo "==== $name: $*"; cat "$out/part.log"; } >>"$out/log.txt"
    "$python" - "$name" "$status" "$((SECONDS - start))" "$out" <<'PY'
import json, pathlib, sys
name, status, seconds, out = sys.argv[1:]
lines = pathlib.Path(out, "part.log").read_text(errors="replace").splitlines()
try:
    document = json.loads(lines[-1])
except (IndexError, ValueError):
    document = None
line = {"part": name, "status": status, "seconds": int(seconds), "document": document, "end": lines[-3:]}
with pathlib.Path(out, "results.jsonl").open("a") as file:
    file.write(json.dumps(line) + "\n")
PY
    rm -f "$out/part.log"
}

if [ -z "$list" ]; then
    mkdir -p "$out"
    "$python" - >"$out/machine.json" <<'PY'
import json, sys
sys.path.insert(0, "bench")
import _measure, torch
print(json.dumps(_measure.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
PY
fi

all="pydantic transformers peft"
bench() { part "$1" "$2" "$python" "${@:3}"; }
if [ -n "$smoke" ]; then
    bench tests "$all pytest" -m pytest -q -m gpu --collect-only
    bench launches "$all" bench/launches.py --smoke
    bench forecast_check "$all" bench/forecast_check.py --smoke
    bench rollout "$all" bench/rollout.py --smoke
    bench profile "$all" bench/profile_step.py --smoke
    bench start "$all" bench/start.py --smoke
    bench kernels "" bench/kernels.py --smoke
    bench tune "" bench/tune.py --smoke
    bench memory "$all bitsandbytes" bench/memory.py --smoke
    bench train_step "$all" bench/train_step.py --smoke
else
    two="bench/rollout.py --model qwen3-vl-2b"
    bench tests "$all pytest" -m pytest -q -m gpu
    bench profile-2b "$all" bench/profile_step.py
    bench profile-2b-group "$all" bench/profile_step.py --preset robust --batch 8
    bench rollout-2b-b1 "$all" $two --batch 1 --engine graphed fast unshared naive+ naive --repeats 3 --times-only
    bench rollout-2b-b32 "$all" $two --batch 32 --engine graphed fast unshared naive+ --repeats 2 --times-only
    bench rollout-2b-group "$all" $two --batch 8 --preset robust --engine graphed fast naive+ --repeats 2 --times-only
    bench floors-2b "$all" $two --batch 1 32 --engine graphed --repeats 1
    bench rollout-nano "$all" bench/rollout.py --batch 1 16 64
    bench start "$all" bench/start.py --model "${MODEL:-nano}"
    for op in ghost token_logprob linear_logprob resize sample decode_attention raised_norm; do
        bench "kernels-$op" "" bench/kernels.py --op $op
    done
    for model in 2b:none 2b:int8 2b:nf4 4b:nf4 8b:nf4 32b:nf4; do
        bench "memory-${model/:/-}" "$all bitsandbytes" bench/memory.py --device cuda --model "qwen3-vl-$model"
    done
    bench tune triton bench/tune.py
    bench train_step-2b "$all" bench/train_step.py --model qwen3-vl-2b --update-model qwen3-vl-2b --update-size 640x480 --dtype bfloat16 --batch 1 32
    bench launches "$all" bench/launches.py
    bench forecast_check "$all" bench/forecast_check.py
fi

for name in ${wanted[@]+"${wanted[@]}"}; do
    case " ${known[*]} " in
    *" $name "*) ;;
    *) echo "gpu_suite.sh: no part is called $name; --list names them" >&2; exit 2 ;;
    esac
done
[ -n "$list" ] && exit 0
"$python" bench/goals.py --gpu "$out" | sed '$d' | tee "$out/goals.md"
[ "${#skipped[@]}" -gt 0 ] && echo "skipped: ${skipped[*]}"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts done; see $out"
