#!/usr/bin/env bash
# What one GPU can show, by priority, for as long as there is time; goes on where it was stopped.
#
#   experiments/gpu.sh --minutes M --bring DIR --out DIR [--scale gpu|smoke]
#
# --bring: a folder of at most 60 MB with cifar10.tar.xz and tiny_imagenet32.tar.xz (folders of
#          images, NAME/SPLIT/CLASS/IMAGE) and the wheels that are missing here, such as
#          ml-collections and jaxtyping; nothing else is read, and no network is used
# --out:   gets the unpacked data, the runs, logs, experiments/ (records, to be added to the folder
#          of that name here) and records.tar.gz (records, logs, and the runs without checkpoints)
#
# Ends with 1 if a step failed for another reason than lack of time. Plain JAX, Flax, Optax and Orbax
# are enough: no TensorFlow, no CLU; steps that need more are left out where it is missing.
set -uo pipefail
shopt -s nullglob

die() { echo "error: $*" >&2; exit 1; }

minutes=9 bring= out= scale=gpu
while [ $# -gt 0 ]; do
  case $1 in
    --minutes | --bring | --out | --scale) [ $# -gt 1 ] || die "$1 needs a value" ;;
    *) die "unknown option $1; the first lines of $0 tell them" ;;
  esac
  declare "${1#--}=$2"
  shift 2
done
[ -n "$out" ] || die "--out DIR is needed, for data, runs and records"
[[ $scale =~ ^(gpu|smoke)$ ]] || die "--scale is gpu or smoke, not $scale"
[[ $minutes =~ ^[0-9]+$ ]] || die "--minutes is a whole number, not $minutes"
end=$((SECONDS + minutes * 60)) failed=0 longest=100000  # seconds of a step
mkdir -p "$out"/{data,site,done,logs,runs,experiments} || exit 1
out=$(realpath "$out")
if [ -n "$bring" ]; then
  bring=$(realpath -e "$bring") || exit 1
  size=$(du -sb "$bring" | cut -f1)
  [ "$size" -le 60000000 ] || die "--bring is $((size / 1000000)) MB; at most 60 MB travel"
fi
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$out/site:$PWD" JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compiled}"

# unpack ARCHIVE: beside data/ first, so that what was interrupted leaves nothing half
unpack() {
  local name; name=$(basename "$1" .tar.xz)
  [ -d "$out/data/$name" ] && return
  rm -rf "$out/unpacking" && mkdir "$out/unpacking"
  if tar xJf "$1" -C "$out/unpacking" && mv "$out/unpacking/$name" "$out/data/"; then
    rm -rf "$out/unpacking"
  else
    echo "-- $(basename "$1"): not unpacked" && failed=1
  fi
}

# one NAME COMMAND...: the command, unless it is done or the time is over; TERM makes a run save
one() {
  local name=$1 left=$((end - SECONDS)) code; shift
  [ -e "$out/done/$name" ] && return
  [ $left -gt 30 ] || { echo "-- $name: no time left"; return; }
  [ $left -lt $longest ] || left=$longest
  echo "-- $name (at most $left s)"
  timeout -s TERM -k 30 $left "$@" >"$out/logs/$name.log" 2>&1
  code=$?
  case $code in
    0) touch "$out/done/$name" ;;
    124 | 137) echo "   not finished in $left s" ;;
    *) failed=1; echo "   failed (exit $code): $(tail -n 1 "$out/logs/$name.log" | cut -c1-150)" ;;
  esac
}

# experiment LABEL NAME OPTIONS...: adds to the records of the experiment that are here
experiment() {
  local label=$1 name=$2 records="$out/experiments/$2"; shift 2
  mkdir -p "$records"
  [ -e "$records/results.json" ] || cp "experiments/$name/results.json" "$records/" 2>/dev/null
  one "$label" python -m "experiments.$name.run" --scale "$scale" --data "$out/data" \
    --scratch "$out/runs" --out "$records" "$@"
}

# have MODULE LABEL: whether it is installed
have() {
  python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))" && return
  echo "-- $2: left out, $1 is not here"
  return 1
}

if [ -n "$bring" ]; then
  for archive in "$bring"/*.tar.xz; do unpack "$archive"; done
  wheels=("$bring"/*.whl)
  [ ${#wheels[@]} = 0 ] ||
    one wheels python -m pip install -q --no-index --no-deps --target "$out/site" "${wheels[@]}"
fi

speeds="$out/experiments/benchmarks/$scale"
mkdir -p "$speeds"
tests="tests/losses tests/test_steps.py" first=cifar10 second=tiny_imagenet32 seeds=3
speed="--batch 1024 --steps 20 --compile" loss= cache= augment= compile=--compile
memory="--config cifar10_resnet18 --batch 1024"
if [ "$scale" = smoke ]; then
  tests=tests/losses/test_masks.py first=digits second=digits seeds=1
  speed="--batch 4 --steps 1" loss="--sizes 64 --turns 1 --side 64" compile=
  cache="--batch 4 --parts 2 --width 0.0625 --turns 1" memory="--config digits --batch 64"
  augment="--sizes 32 --policies crop_flip --width 0.0625 --turns 1"
fi
# without this project's options for pytest: they need beartype, and no warning of any JAX
have pytest tests && longest=180 one tests env -u PYTEST_ADDOPTS JAX_PLATFORMS= \
  XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -q -p no:cacheprovider \
  -o addopts=--import-mode=importlib -o filterwarnings=default -m "not slow" $tests
experiment cifar10 classification --seeds 1 --only "$first: SupCon" "$first: cross-entropy"
experiment tiny_imagenet32 classification --seeds 1 --only "$second: SupCon" "$second: cross-entropy"
if have torch speed; then
  for dtype in bfloat16 float32; do
    one "speed-$dtype" python -m experiments.benchmarks.train_step $speed --dtype $dtype \
      --out "$speeds/train_step-$dtype.json"
  done
fi
one loss python experiments/benchmarks/accelerator.py $loss --out "$speeds"
experiment learning_rate learning_rate --seeds 1
experiment cifar10-seeds classification --seeds $seeds --only "$first: SupCon" "$first: cross-entropy"
have torch pytorch && one pytorch python -m experiments.pytorch.train --scale "$scale" \
  --data "$out/data" --scratch "$out/runs-pytorch" --out "$out/experiments/pytorch" $compile
one gradient_cache python experiments/benchmarks/gradient_cache.py $cache --out "$speeds"
one memory python experiments/scaling/memory.py $memory  # its record is the log's last line
experiment corruptions corruptions --seeds $seeds
have sklearn augment && one augment python experiments/benchmarks/augment.py $augment --out "$speeds"

cd "$out" || exit 1
find experiments logs runs -name checkpoints -prune -o -type f \( -path "experiments/*" -o -path "logs/*" \
  -o -name results.json -o -name metrics.jsonl -o -name config.json \) -print 2>/dev/null \
  | tar czf records.tar.gz -T - || failed=1
echo "records: $out/records.tar.gz, $(du -h records.tar.gz | cut -f1)"
exit $failed
