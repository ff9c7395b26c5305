#!/usr/bin/env bash
# Runs all GPU measurements in one command of 8 minutes; needs no network.
#
#     benchmarks/gpu.sh RESULTS MODEL DATA [REFERENCE]
#
# RESULTS receives logs and tables (JSON Lines), MODEL is a checkpoint of BERT-tiny's
# shape, DATA a directory with qqp/train-*.parquet, REFERENCE a clone of the authors'
# code, which needs torch. The most important measurements come first. Each has a time
# limit in seconds and writes its results as it goes. NAME.log marks a finished
# measurement, which is skipped in the next call; NAME.unfinished.log an unfinished one.
# SMALL=1 runs everything in tiny shapes, also on a CPU.
set -uo pipefail
if [ $# -lt 3 ]; then
  echo "usage: benchmarks/gpu.sh RESULTS MODEL DATA [REFERENCE]" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
results=$(realpath "$1") model=$(realpath "$2") data=$(realpath "$3")
reference=${4:+$(realpath "$4")}
small=${SMALL:-}
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mfac_jax
export PYTHONPATH=$PWD:$PWD/examples:$cache/kernels${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# Several programs share the GPU.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
total=480
unfinished=()

measure() {
  local name=$1 limit=$(($2 < total - SECONDS ? $2 : total - SECONDS))
  shift 2
  if [ -e "$results/$name.log" ]; then
    echo "$name: done before."
    return
  fi
  if [ "$limit" -lt 5 ]; then
    unfinished+=("$name")
    return
  fi
  printf '\n## %s (%s s so far)\n\n' "$name" "$SECONDS"
  if timeout --kill-after 5 "$limit" "$@" 2>&1 | tee "$results/$name.unfinished.log"; then
    mv "$results/$name.unfinished.log" "$results/$name.log"
  else
    unfinished+=("$name")
  fi
}

# Runs in the background: tokenizes QQP and builds the authors' kernels, adapted to the
# names in newer versions of torch.
prepare() {
  local script='import sys, padded_lengths
padded_lengths.make_run(*sys.argv[1:], ["--max_steps", "1"])'
  PYTHONPATH=$PWD/benchmarks:$PYTHONPATH JAX_PLATFORMS=cpu \
    "$python" -c "$script" "$model" "$data"
  if [ -n "$reference" ] && command -v nvcc >/dev/null; then
    rm -rf "$cache/kernels" && cp -r "$reference" "$cache/kernels" || return
    cd "$cache/kernels" || return
    sed -i -E 's/(tmp|giHig)\.type\(\)/\1.scalar_type()/; s/\.data<scalar_t>/.data_ptr<scalar_t>/g' \
      hinv_cuda_kernel.cu
    TORCH_CUDA_ARCH_LIST=9.0 timeout 150 "$python" setup_cuda.py build_ext --inplace
  fi
}

"$python" - "$small" <<'EOF' || exit 1
import sys, jax
if jax.default_backend() != "gpu" and not sys.argv[1]:
    sys.exit(f"error: jax {jax.__version__} sees no GPU; install jax[cuda13].")
print(jax.devices()[0].device_kind, "jax", jax.__version__)
EOF
mkdir -p "$cache"
prepare >"$results/prepare.log" 2>&1 &
preparing=$!
trap 'kill $preparing 2>/dev/null' EXIT

large=("dense, BERT-tiny, 1024" "row-sparse bfloat16, BERT-tiny, 1024"
  "row-sparse, BERT-tiny, 1024" "dense bfloat16, BERT-tiny, 1024" "int8, BERT-tiny, 1024"
  "top-k 1 %, BERT-tiny, 1024")
tests=(tests/test_full_size.py tests/test_reference.py tests/test_solve.py
  tests/test_dense_window.py tests/test_windows.py tests/test_groups.py)
of_tests=(-n 12 -m "slow or not slow") step=() of_solve=() kernels=() turns=(--turns 5)
if [ -n "$small" ]; then
  of_tests=(-k "single or partial") tests=(tests/test_reference.py)
  step=(--small --repeats 2) of_solve=(--num_grads 8) kernels=(--longest 3)
  turns=(--turns 1 --steps_per_turn 2)
fi
mfac=('MFAC={"num_grads": 1024, "damp": 1e-6}' 'MFAC={"num_grads": 256, "damp": 1e-6}'
  'MFAC={"num_grads": 1024, "damp": 1e-6, "window": "row_sparse_bf16"}')
[ -z "$small" ] || mfac=('MFAC={"num_grads": 4}')
qqp=(--model_name_or_path "$model" --dataset_name "$data" "${turns[@]}")

# A new warning in another version of JAX must not fail the numerical tests.
measure tests 120 "$python" -m pytest "${tests[@]}" "${of_tests[@]}" -v -W default
measure step_time 120 "$python" benchmarks/step_time.py "${step[@]}" \
  --cases "${large[@]}" --output "$results/step_time.jsonl"
wait "$preparing"
if [ -n "$reference" ]; then
  measure published_code 60 "$python" benchmarks/published_code.py "${step[@]}" \
    --reference "$reference" --output "$results/published_code.jsonl"
fi
measure train_throughput 100 "$python" benchmarks/train_throughput.py "${qqp[@]}" \
  --padding short --optims "${mfac[@]}" --output "$results/train_throughput.jsonl"
if "$python" -c "import torch" 2>/dev/null; then
  measure pytorch_step 60 "$python" benchmarks/pytorch_step.py "${qqp[@]}" \
    --output "$results/pytorch_step.jsonl"
else
  echo "Skipping pytorch_step: torch is not installed."
fi
if [ -n "$reference" ]; then
  measure crosscheck 40 "$python" examples/crosscheck_pytorch.py --reference "$reference"
fi
# A profile of the updates compiled above.
measure traces 60 "$python" benchmarks/step_time.py "${step[@]}" --repeats 2 \
  --cases "${large[@]}" --traces "$results/traces"
measure kernels 20 "$python" benchmarks/kernels.py "${kernels[@]}" "$results"/traces/*.pb
measure solve_time 30 "$python" benchmarks/solve_time.py "${of_solve[@]}" \
  --output "$results/solve_time.jsonl"
echo
echo "Finished after $SECONDS s; the results are in $1."
if [ ${#unfinished[@]} -gt 0 ]; then
  echo "not finished: ${unfinished[*]}" >&2
  exit 1
fi
