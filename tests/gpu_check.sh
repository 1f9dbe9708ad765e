#!/usr/bin/env bash
# Runs the GPU tests and benchmarks on a machine with a GPU, offline, with the op libraries built
# elsewhere: they serve every torch >= 2.11, only _host is per Python version and built here.
#
#   tests/gpu_check.sh OUT [STAGE...]       stages: build test memcheck racecheck bench demo
#                                           (default: build test bench)
#
#   BENCH="int4_gemm paged_attention"       ops to benchmark (default: all)
#   BENCH_K="M1 or M16"                     pytest -k expression over their case ids
#   TEST_K="paged"                          the same for the test and sanitizer stages
#   SANITIZE_M="gpu"                        pytest -m expression of the sanitizer stages
#   PYTHON=python3                          needs torch, cmake, ninja, pybind11, pytest, hypothesis,
#                                           pytest-benchmark; what it lacks may come in PYTHONPATH
#   EFFLLM_COMMIT=abc1234                   what result rows call the sources, without a git checkout
#
# OUT receives the log of each stage and one <op>-<card>.json of result rows per benchmarked op.
# Every stage runs even if one before it failed; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${1:?usage: tests/gpu_check.sh OUT [STAGE...]}
shift
[ $# -gt 0 ] || set -- build test bench
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# A GPU that is not usable must fail the run; without this its tests would skip.
export EFFLLM_REQUIRE_GPU=1

for library in libeffllm_cpu.so libeffllm_cuda.so build_info.json; do
  if [ ! -f "python/effllm/lib/$library" ]; then
    echo "gpu_check: python/effllm/lib/$library is missing: run 'make build EFFLLM_CUDA=on' first" >&2
    exit 2
  fi
done
missing=$("$PYTHON" - <<'PY'
from importlib.util import find_spec
names = {"torch": "torch", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark",
         "hypothesis": "hypothesis"}
print(" ".join(package for module, package in names.items() if find_spec(module) is None))
PY
) || exit 2
if [ -n "$missing" ]; then
  echo "gpu_check: $PYTHON lacks $missing: install them or put them on PYTHONPATH" >&2
  exit 2
fi

build() {
  local folder status
  folder=$(mktemp -d)
  cmake -S . -B "$folder" -G Ninja -DEFFLLM_ONLY_HOST=ON \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" &&
    cmake --build "$folder"
  status=$?
  rm -rf "$folder"
  return $status
}

gpu_tests() {  # $1: marker expression, the rest: a command to run pytest under
  local markers=$1
  shift
  "$@" "$PYTHON" -m pytest tests -m "$markers" -q -ra -p no:cacheprovider \
    ${TEST_K:+-k "$TEST_K"} --junitxml "$OUT/$stage.xml"
}

sanitize() {  # $1: a tool of compute-sanitizer
  # Without torch's caching allocator each tensor is its own allocation, so that a read past its end
  # is not hidden by a neighbour.
  # Only this library's kernels are watched: racecheck finds fault with those of cuBLAS.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 gpu_tests "${SANITIZE_M:-gpu and sanitizer}" \
    compute-sanitizer --tool "$1" --kernel-regex kns=effllm --error-exitcode 9 --print-limit 20
}

bench() {
  local files=() op
  for op in ${BENCH:-}; do files+=("bench/bench_$op.py"); done
  [ ${#files[@]} -gt 0 ] || files=(bench)
  "$PYTHON" -m pytest "${files[@]}" -q -p no:cacheprovider --device cuda --rows "$OUT" \
    ${BENCH_K:+-k "$BENCH_K"}
}

"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "on",
torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
worst=0 summary=""
for stage in "$@"; do
  started=$SECONDS
  echo "== $stage"
  case $stage in
    build) build ;;
    test) gpu_tests gpu ;;
    memcheck | racecheck) sanitize "$stage" ;;
    bench) bench ;;
    demo) "$PYTHON" -m effllm demo ;;
    *) echo "gpu_check: no stage '$stage'" >&2 && false ;;
  esac 2>&1 | tee "$OUT/$stage.log"
  status=${PIPESTATUS[0]}
  summary+="$stage: exit $status, $((SECONDS - started)) s"$'\n'
  [ "$status" -le "$worst" ] || worst=$status
done
printf '== summary\n%s' "$summary" | tee "$OUT/summary.txt"
exit "$worst"
