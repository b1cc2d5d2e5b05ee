#!/usr/bin/env bash
# What one GPU can show, by priority, for as long as there is time; goes on where it was stopped.
#
#   experiments/gpu.sh --minutes M --bring DIR --out DIR [--scale gpu|smoke]
#
# --bring: a folder with cifar10.tar.xz and tiny_imagenet32.tar.xz (folders of images, SPLIT/CLASS/
#          IMAGE) and the wheels that are missing here, such as ml-collections and jaxtyping; nothing
#          else is read, and no network is used
# --out:   gets the unpacked data, the runs, and records.tar.gz: the records without checkpoints
#
# Plain JAX, Flax, Optax and Orbax are enough: no TensorFlow, no CLU.
set -uo pipefail
cd "$(dirname "$0")/.."

minutes=9 bring= out= scale=gpu
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=$2 ;;
    --bring) bring=$2 ;;
    --out) out=$2 ;;
    --scale) scale=$2 ;;
    *) echo "error: unknown option $1; the first lines of $0 tell them" >&2; exit 1 ;;
  esac
  shift 2 || { echo "error: $1 needs a value" >&2; exit 1; }
done
[ -n "$out" ] || { echo "error: --out DIR is needed, for data, runs and records" >&2; exit 1; }
end=$((SECONDS + minutes * 60))
mkdir -p "$out"/{data,site,done,records}
export PYTHONPATH="$out/site:$PWD" JAX_COMPILATION_CACHE_DIR="$out/compiled"

if [ -n "$bring" ]; then
  for archive in "$bring"/*.tar.xz; do
    name=$(basename "$archive" .tar.xz)
    [ -e "$archive" ] && [ ! -d "$out/data/$name" ] && tar xJf "$archive" -C "$out/data"
  done
  if ls "$bring"/*.whl >/dev/null 2>&1 && [ ! -e "$out/done/wheels" ]; then
    python -m pip install -q --no-index --no-deps --target "$out/site" "$bring"/*.whl && touch "$out/done/wheels"
  fi
fi

# one NAME COMMAND...: the command, unless it is done or the time is over; TERM makes a run save
one() {
  local name=$1 left=$((end - SECONDS)); shift
  [ -e "$out/done/$name" ] && return
  [ $left -gt 30 ] || { echo "-- $name: no time left"; return; }
  echo "-- $name ($left s left)"
  if timeout -s TERM -k 30 $left "$@" >"$out/$name.log" 2>&1; then
    touch "$out/done/$name"
  else
    echo "   not finished (exit $?): $(tail -n 1 "$out/$name.log" | cut -c1-150)"
  fi
}

# experiment NAME LABEL OPTIONS...: its record goes to records/
experiment() {
  local name=$1 label=$2; shift 2
  one "$label" python -m "experiments.$name.run" --scale "$scale" --data "$out/data" \
    --scratch "$out/runs" --out "$out/records/$label" "$@"
}

one tests env JAX_PLATFORMS= XLA_PYTHON_CLIENT_PREALLOCATE=false \
  python -m pytest -q -p no:cacheprovider tests/losses tests/test_steps.py -m "not slow"
first=cifar10 second=tiny_imagenet32 compile=--compile
[ "$scale" = smoke ] && first=digits second=digits compile=
experiment classification cifar10 --seeds 1 --only "$first: SupCon" "$first: cross-entropy"
one pytorch python -m experiments.pytorch.train --scale "$scale" --data "$out/data" \
  --scratch "$out/runs-pytorch" --out "$out/records/pytorch" $compile
experiment classification tiny_imagenet32 --seeds 1 --only "$second: SupCon" "$second: cross-entropy"
if [ "$scale" = gpu ]; then
  for dtype in float32 bfloat16; do
    one "speed-$dtype" python -m experiments.benchmarks.train_step --batch 1024 --steps 20 \
      --compile --dtype $dtype --out "$out/records/train_step-$dtype.json"
  done
  one loss python experiments/benchmarks/accelerator.py --out "$out/records"
  one gradient_cache python experiments/benchmarks/gradient_cache.py --out "$out/records"
  one augment python experiments/benchmarks/augment.py --out "$out/records"
fi
experiment learning_rate learning_rate --seeds 1
experiment classification cifar10-seeds --seeds 3 --only "$first: SupCon" "$first: cross-entropy"
experiment corruptions corruptions --seeds 3

find "$out/runs" \( -name results.json -o -name metrics.jsonl -o -name config.json -o -name "*.png" \) \
  2>/dev/null | tar czf "$out/records.tar.gz" --exclude=checkpoints -T - "$out/records" "$out"/*.log
echo "records: $out/records.tar.gz, $(du -h "$out/records.tar.gz" | cut -f1)"
