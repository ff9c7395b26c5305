#!/usr/bin/env bash
# Runs the published experiment on QQP, one optimizer and one seed at a time.
#
#     benchmarks/qqp.sh RESULTS MODEL DATA EPOCHS SEEDS [SECONDS]
#
# Runs what is missing in RESULTS and stops after SECONDS. Repeat the command to resume
# with the interrupted run. Keeps results and deletes models.
set -uo pipefail
if [ $# -lt 5 ]; then
  echo "usage: benchmarks/qqp.sh RESULTS MODEL DATA EPOCHS SEEDS [SECONDS]" >&2
  exit 2
fi
results=$1 model=$2 data=$3 epochs=$4 seeds=$5 seconds=${6:-540}
here=$(dirname "$0")
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# SIGKILL, because after SIGTERM a run saves its window of gigabytes.
timeout --signal KILL "$seconds" "${PYTHON:-python}" "$here/../examples/run_seeds.py" \
  --seeds "$seeds" --optims 'MFAC={"num_grads": 1024, "damp": 1e-6}' adamw -- \
  --model_name_or_path "$model" --dataset_name "$data" --task_name qqp \
  --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32 \
  --per_device_eval_batch_size 128 --learning_rate 1e-4 --num_train_epochs "$epochs" \
  --eval_strategy epoch --save_strategy no --output_dir "$results"
status=$?
find "$results" -name model.safetensors -delete
exit $status
