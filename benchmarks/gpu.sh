#!/usr/bin/env bash
# Speed, memory and use of one GPU for every size and optimizer, beside nanoGPT (AdamW) and the released Sophia
# (Sophia-G): one JSON object a line.   bash benchmarks/gpu.sh DIR_OF_NANOGPT DIR_OF_SOPHIA > figures.jsonl
set -euo pipefail
nanogpt=$(realpath "$1") sophia=$(realpath "$2")
cd "$(dirname "$0")/.."
for size in "small 12" "medium 12" "large 6"; do
  set -- $size
  common="--micro_batch_size=$2 --batch_size=480 --rounds=5 --json"
  python -m benchmarks train "config/gpt2_$1_adamw.py" $common --peer "$nanogpt"
  python -m benchmarks train "config/gpt2_$1_lion.py" $common
  python -m benchmarks train "config/gpt2_$1_sophiag.py" $common --peer "$sophia"
  python -m benchmarks train "config/gpt2_$1_sophiah.py" $common
  python -m benchmarks profile "config/gpt2_$1_adamw.py" --micro_batch_size=$2 --json
done
