#!/usr/bin/env bash
# Makes .venv with everything that building, testing and the demo need, and installs effllm into it,
# editable. Whatever the machine lacks is named in one line. Called by the Makefile.
#   PYTHON  the interpreter to use; else the first on PATH that is new enough
#   TORCH   a torch version other than the pinned one, such as 2.11.0
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "effllm: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python >= 3.11 is needed: install python3.11 or newer, or name one: make PYTHON=/path/to/python"
}

check_machine() {
  "$1" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$1 has no venv module: install it, on Debian and Ubuntu: apt install python3-venv"
  "$1" -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' \
    2>/dev/null ||
    fail "$1 has no headers (Python.h): install them, on Debian and Ubuntu: apt install python3-dev"
  echo '#include <span>' | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    fail "no C++20 compiler (${CXX:-c++}): install one, on Debian and Ubuntu: apt install g++"
}

python=$(find_python)
check_machine "$python"
[ -x .venv/bin/python ] || "$python" -m venv .venv

sed "s/^torch==.*/torch==${TORCH:-$(sed -n 's/^torch==//p' .ci/constraints.txt)}/" \
  .ci/constraints.txt > .venv/constraints.txt
install() {
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c .venv/constraints.txt "$@"
}

echo "effllm: installing torch and other dependencies into .venv (minutes, the first time)"
# The build tools first: without isolation, pip builds effllm against what is in the environment.
install torch setuptools wheel cmake ninja pybind11
install --no-build-isolation -e '.[hf,formats,plot,dev]'
