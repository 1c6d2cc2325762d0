#!/usr/bin/env bash
# Latency, training and search cost on one GPU, at most ten minutes, without a network.
#
#   benchmarks/gpu.sh            all parts on the GPU; CSV files go to benchmarks/gpu/
#   benchmarks/gpu.sh --quick    every part, small, on the CPU: minutes; CSV files go to a temporary folder
#   benchmarks/gpu.sh --pack     on a machine with a package index: fetch what the GPU's machine may lack into .gpu-wheels
#
# The GPU's machine needs torch and torchvision; what else is missing there is installed from .gpu-wheels into
# .venv-gpu. Each part has its share of the time and writes its rows as they come, so that one that is cut short keeps
# what it has. PYTHON=python3.12 names another interpreter; for --pack, of the version that the GPU's machine has.
# OUTPUT=folder names another folder for the CSV files.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}") || exit 1
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
WHEELS=.gpu-wheels

pack() {
  # Everything but torch, what comes with it, and our own package, which runs from the checkout.
  "$PYTHON" -m pip install --quiet --dry-run --ignore-installed --report .gpu-report.json . || exit 1
  "$PYTHON" - > .gpu-packages.txt <<'PACKAGES'
import json, re
for item in json.load(open(".gpu-report.json"))["install"]:
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if not re.match(r"(torch|torchvision|triton|nats-zoo|cuda.*|nvidia-.*)$", name.lower()):
        print(f"{name}=={version}")
PACKAGES
  "$PYTHON" -m pip download --quiet --no-deps --dest "$WHEELS" --requirement .gpu-packages.txt || exit 1
  rm .gpu-report.json .gpu-packages.txt
  du -sh "$WHEELS"
}

run() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$(($2 * (quick ? 5 : 1))) started=$SECONDS # a CPU may be busy or slow
  shift 2
  echo "== $name, at most ${seconds} s"
  timeout --kill-after=10 "$seconds" "$PYTHON" "$@"
  case $? in
    0) echo "== $name: done in $((SECONDS - started)) s" ;;
    124 | 137) echo "== $name: cut short, its rows so far are kept"; cut=1 ;;
    *) echo "== $name: failed"; failed=1 ;;
  esac
}

quick=0 cut=0 failed=0
case ${1:-} in
  "") ;;
  --quick) quick=1 ;;
  --pack) pack; exit ;;
  *) echo "usage: benchmarks/gpu.sh [--quick | --pack]" >&2; exit 2 ;;
esac

if [ -d "$WHEELS" ]; then
  [ -d .venv-gpu ] || "$PYTHON" -m venv --system-site-packages .venv-gpu || exit 1
  PYTHON=$PWD/.venv-gpu/bin/python
  "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl || exit 1
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# From another folder: in this one Python would find half of the package.
imports() { (cd "$scratch" && "$PYTHON" -c "import nats_zoo.search, nats_zoo.detection"); }
if ! imports 2> /dev/null; then # laid out as the installed package is
  mkdir -p "$scratch/site/nats_zoo"
  ln -s "$PWD"/nats_zoo/* "$PWD/detection" "$PWD/search" "$PWD/recipes" "$scratch/site/nats_zoo"
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
  imports || exit 1
fi

if [ $quick = 1 ]; then
  output=${OUTPUT:-$scratch/csv} images=6 side=64
  latency=(--device cpu --model nats_resnet18 --size 64x64 --repeats 2 --warmup 1)
  batches=(1 2) compiled=(default) dtypes=(float32 tf32 bfloat16)
  detector=(--min-size 64 --max-size 96 --fpn-channels 16 --head-size 16 --roi-samples 16 --batch 2 --steps 1 --rounds 2)
  search=(--device cpu --model resnet18 --size 64x64 --fpn-channels 16 --head-size 16 --roi-samples 16 --groups 2 --repeats 2)
else
  "$PYTHON" -c "import torch; print(torch.cuda.get_device_name(), torch.__version__)" || exit 1
  output=${OUTPUT:-benchmarks/gpu} images=64 side=800
  latency=(--device cuda --model nats_resnet50 --size 800x1216 --repeats 20 --warmup 5)
  batches=(1 8 32) compiled=(uniform default ic16) dtypes=(float32 tf32 bfloat16)
  detector=(--backbone resnet50 --min-size 800 --max-size 1333 --batch 8 --steps 4 --rounds 6 --precision bf16
    --memory-format channels_last --workers 4)
  search=(--device cuda --model resnet50 --size 800x800 --batch 4 --precision bf16 --memory-format channels_last
    --repeats 5)
fi
mkdir -p "$output"

run "latency, eager and deployed" 170 benchmarks/latency.py "${latency[@]}" --genotype default uniform ic16 \
  --form eager deploy --dtype "${dtypes[@]}" --memory-format channels_last --batch "${batches[@]}" \
  --csv "$output/latency.csv"
run "latency, contiguous" 40 benchmarks/latency.py "${latency[@]}" --genotype default uniform --form eager \
  --dtype float32 bfloat16 --memory-format contiguous --batch 1 --csv "$output/latency_contiguous.csv"
run "latency, CUDA graphs" 180 benchmarks/latency.py "${latency[@]}" --genotype "${compiled[@]}" --form graphs \
  --network plain nats --dtype bfloat16 --memory-format channels_last --batch 1 \
  --csv "$output/latency_graphs.csv"
(cd "$scratch" && "$PYTHON" -c "
from nats_zoo.detection.data.drawn import draw_dataset
draw_dataset('data', train=$images, val=1, test=1, size=$side, distance=8)") || failed=1
run "training" 90 benchmarks/training.py --data "$scratch/data" --genotype default "${detector[@]}" \
  --csv "$output/training.csv"
run "search step" 90 benchmarks/search_cost.py "${search[@]}" --mode mixture sampled --kernels tied --no-memory \
  --csv "$output/search_cost.csv"

echo "== CSV files in $output"
for file in "$output"/*.csv; do echo "$(basename "$file"): $(($(wc -l < "$file") - 1)) rows"; done
[ $cut = 0 ] || echo "some parts were cut short"
exit $failed
