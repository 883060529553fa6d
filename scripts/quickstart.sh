#!/usr/bin/env bash
# The main job in one command: environment, data, training, evaluation, a sample. See --help.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
make_environment "$root" ""
exec "$python" "$root/scripts/quickstart.py" "$@"
