#!/usr/bin/env bash
# All that is to be measured on a GPU, in one command and without a network.
#
#     benchmarks/gpu.sh RESULTS MODEL DATA [REFERENCE]
#
# RESULTS is where the JSON goes, MODEL a checkpoint of BERT-tiny's shape, DATA a
# directory with qqp/train-*.parquet, REFERENCE a clone of the authors' code, which
# needs torch. A program that fails is named at the end; the others run all the same.
set -uo pipefail
if [ $# -lt 3 ]; then
  echo "usage: benchmarks/gpu.sh RESULTS MODEL DATA [REFERENCE]" >&2
  exit 2
fi
results=$1 model=$2 data=$3 reference=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$here/..:$here/../examples" HF_HUB_OFFLINE=1
# Each program takes what it needs, so that the peaks are its own.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$results" || exit 1
failed=()

measure() {
  local name=$1
  shift
  printf '\n## %s\n\n' "$name"
  "$python" "$here/$name.py" --output "$results/$(date +%F)-gpu-${name//_/-}.json" "$@" ||
    failed+=("$name")
}

"$python" - <<'EOF' || exit 1
import sys, jax
if jax.default_backend() != "gpu":
    sys.exit(f"error: jax {jax.__version__} sees no GPU; install jax[cuda13].")
print(jax.devices()[0].device_kind, "jax", jax.__version__)
EOF
windows=("dense, BERT-tiny, 1024" "int8, BERT-tiny" "row-sparse, BERT-tiny, 1024"
  "row-sparse bfloat16, BERT-tiny, 1024" "top-k 1 %, BERT-tiny, 1024")
measure step_time --cases "${windows[@]}"
measure memory --cases adamw "${windows[@]}"
measure solve_time
measure train_throughput --turns 20 --model_name_or_path "$model" --dataset_name "$data"
if [ -n "$reference" ]; then
  measure published_code --reference "$reference"
  printf '\n## crosscheck_pytorch\n\n'
  "$python" "$here/../examples/crosscheck_pytorch.py" --reference "$reference" ||
    failed+=(crosscheck_pytorch)
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
