#!/usr/bin/env bash
# Everything that only a card can show, in one command: tests, kernel and pipeline benchmarks, ledger, compile report.
#
#     bash examples/gpu_check.sh [FOLDER]        results go to FOLDER (default: gpu-results)
#
# Needs a CUDA device. Makes its own .venv unless one is there. A part that fails does not stop the others; the exit
# code says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
mkdir -p "$out"

[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -c "import ddim_fast, diffusers, pytest_benchmark" 2>/dev/null || .venv/bin/pip install -q -e '.[test]'
python=.venv/bin/python
$python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || {
    echo "no CUDA device: nothing to check here" >&2
    exit 2
}

failed=()
part() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@" >"$out/$name.log" 2>&1; then
        tail -n 3 "$out/$name.log"
    else
        failed+=("$name")
        tail -n 30 "$out/$name.log"
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv" 2>&1
part info $python -m ddim_fast.cli info ddim-fast/digits
part gpu-tests $python -m pytest -m gpu tests --junitxml "$out/gpu-tests.xml"
part all-tests $python -m pytest -m "not gpu" tests --junitxml "$out/all-tests.xml"
part bench-kernels $python -m pytest benchmarks/bench_kernels.py --benchmark-json "$out/bench-kernels.json"
part bench-pipeline $python -m pytest benchmarks/bench_pipeline.py --benchmark-json "$out/bench-pipeline.json"
for dtype in float16 bfloat16 float32; do
    part "bench-digits-$dtype" $python -m ddim_fast.cli bench ddim-fast/digits --engines plain,fused,graph \
        --peers diffusers,compile --batch 1,8,64 --dtype "$dtype" --json "$out/bench-digits-$dtype.json"
done
for model in cifar10 lsun; do
    part "ledger-$model" $python benchmarks/ledger.py --model "$model" --batch 8 --dtype float16 --peer diffusers \
        --json "$out/ledger-$model.json"
done
part compile-report $python benchmarks/compile_report.py --json "$out/compile-report.json"
part generate $python -m ddim_fast.cli generate ddim-fast/digits --seeds 0-4095 --out "$out/samples" --format npz

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (logs in $out/)" >&2
    exit 1
fi
echo "all passed; results in $out/"
