#!/usr/bin/env bash
# Compares AdamW and adam_mfac on QQP, MRPC and SST-2 with the same learning rates.
#
#     benchmarks/recipe.sh RESULTS MODEL DATA
#
# Repeat the command to resume after an interruption. Keeps results and deletes models.
set -euo pipefail
if [ $# -ne 3 ]; then
  echo "usage: benchmarks/recipe.sh RESULTS MODEL DATA" >&2
  exit 2
fi
results=$1 model=$2 data=$3
here=$(dirname "$0")
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

compare() {  # NAME SEEDS WORD_LR FLAGS...
  local name=$1 seeds=$2 words=$3
  shift 3
  "${PYTHON:-python}" "$here/../examples/run_seeds.py" --seeds "$seeds" \
    --optims "adamw={\"word_lr\": $words}" "adam_mfac={\"word_lr\": $words}" -- \
    --model_name_or_path "$model" --dataset_name "$data" --do_train --do_eval \
    --max_seq_length 128 --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 128 --logging_steps 100 --save_strategy no "$@" \
    --output_dir "$results/$name"
  find "$results/$name" -name model.safetensors -delete
}

compare qqp-1500 3 1e-3 --task_name qqp --learning_rate 5e-4 --max_steps 1500 \
  --eval_strategy steps --eval_steps 750
compare qqp-6000 2 1e-3 --task_name qqp --learning_rate 5e-4 --max_steps 6000 \
  --eval_strategy steps --eval_steps 1500
compare mrpc 3 1e-4 --task_name mrpc --learning_rate 1e-4 --num_train_epochs 5
compare sst2 3 1e-4 --task_name sst2 --learning_rate 1e-4 --max_steps 1500 \
  --eval_strategy steps --eval_steps 750
