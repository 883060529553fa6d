#!/usr/bin/env bash
# Lints, checks types and tests in one command: scripts/test.sh [--all] [pytest's own arguments]
# --all adds the tests marked "long": an hour instead of a quarter of one, on two cores.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

selection=(-m "not long")
if [[ "${1:-}" == --all ]]; then
    selection=()
    shift
fi
make_environment "$root" test
cd -- "$root"
"$python" -m ruff check
"$python" -m ruff format --check --quiet
"$python" -m mypy

# One thread a process: the processes share the cores, and threads would only get in each other's way.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
exec "$python" -m pytest -n "$cores" ${selection[@]+"${selection[@]}"} "$@" </dev/null
