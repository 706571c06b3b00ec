#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked gpu, then every bench, documents and logs under one folder.
#   bench/gpu_suite.sh                    results in bench/results/gpu
#   OUT=/somewhere bench/gpu_suite.sh
#   bench/gpu_suite.sh --smoke            everything at its smallest, on a CPU too: does it all run?
# A part that fails is named at the end and makes the exit status 1; the others still run.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/results/gpu}"
python="${PYTHON:-python}"
smoke="${1:-}"
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
failed=()

# part NAME COMMAND...: the whole log in NAME.log, the last line (benches: one JSON document) in NAME.json
part() {
    local name="$1" start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - start)) s"
    else
        echo "   FAILED after $((SECONDS - start)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log" | sed 's/^/   /'
        failed+=("$name")
    fi
    if tail -n 1 "$out/$name.log" | "$python" -c 'import json, sys; json.loads(sys.stdin.readline())' 2>/dev/null; then
        tail -n 1 "$out/$name.log" >"$out/$name.json"
    fi
}

"$python" - >"$out/machine.json" <<'PY'
import json, sys
sys.path.insert(0, "bench")
import _measure, torch
print(json.dumps(_measure.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
PY
part build "$python" -m vise_kernels.build

if [ "$smoke" = "--smoke" ]; then
    part tests "$python" -m pytest -q -m gpu --collect-only
    part rollout "$python" bench/rollout.py --smoke
    [ -f bench/kernels.py ] && part kernels "$python" bench/kernels.py --smoke
    [ -f bench/memory.py ] && part memory "$python" bench/memory.py --smoke
    [ -f bench/train_step.py ] && part train_step "$python" bench/train_step.py --smoke
else
    part tests "$python" -m pytest -q -m gpu
    part rollout-2b-b1 "$python" bench/rollout.py --model qwen3-vl-2b --batch 1 --engine fast graphed unshared naive+ naive --plot "$out/rollout-2b-b1.png"
    part rollout-2b-b32 "$python" bench/rollout.py --model qwen3-vl-2b --batch 32 --engine fast graphed unshared naive+ --repeats 3 --plot "$out/rollout-2b-b32.png"
    part rollout-2b-group "$python" bench/rollout.py --model qwen3-vl-2b --batch 8 --preset robust --engine fast graphed naive+ --repeats 3
    part rollout-nano "$python" bench/rollout.py --batch 1 16 64
    [ -f bench/kernels.py ] && part kernels "$python" bench/kernels.py
    [ -f bench/memory.py ] && part memory "$python" bench/memory.py
    [ -f bench/train_step.py ] && part train_step "$python" bench/train_step.py
fi

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts done; see $out"
