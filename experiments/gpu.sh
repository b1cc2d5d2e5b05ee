#!/usr/bin/env bash
# What one GPU can show, in parts of at most ten minutes each:
#
#   experiments/gpu.sh PART DATA OUT
#
# PART: tests | loss | augment | speed | supcon | cross_entropy | all
# DATA: CIFAR-10 as a folder, DATA/{train,test}/CLASS/IMAGE
# OUT:  gets the records and runs; what is kept of them goes to experiments/
set -euo pipefail
cd "$(dirname "$0")/.."
part=$1 data=$2 out=$3
mkdir -p "$out"

run_tests() {  # the losses and the step, where the arithmetic is the card's
  JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
    python -m pytest -q -p no:cacheprovider tests/losses tests/test_steps.py -m "not slow"
}
run_loss() { python experiments/benchmarks/accelerator.py && cp experiments/benchmarks/*.{json,md} "$out"; }
run_augment() { python experiments/benchmarks/augment.py --out "$out"; }
run_speed() {
  for dtype in float32 bfloat16; do
    python experiments/benchmarks/train_step.py --batch 1024 --steps 20 --dtype $dtype \
      --out "$out/train_step-$dtype.json"
  done
}
train() {  # the 100-epoch recipe (cross-entropy: 200 epochs, as many passes), whole
  python -m supcon_jax.train --config "configs/cifar10_resnet18.py:$1" --workdir "$out/cifar10-$1" \
    --config.data.source=folder --config.data.dir="$data" --config.model.dtype=bfloat16
}

case $part in
  tests | loss | augment | speed) "run_$part" ;;
  supcon | cross_entropy) train "$part" ;;
  all) for each in tests loss augment speed supcon cross_entropy; do "$0" $each "$data" "$out"; done ;;
  *) echo "PART must be tests, loss, augment, speed, supcon, cross_entropy or all; got $part" >&2; exit 1 ;;
esac
