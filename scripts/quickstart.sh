#!/usr/bin/env bash
# The main job in one command: environment, data, training, evaluation, a sample. See --help.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
for word in "$@"; do
    case $word in
    --) break ;;
    -h | --help)
        # What the command is, before anything is installed: any Python reads it.
        for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:-}/bin/python" "$root/.venv/bin/python" python3 python; do
            if "$candidate" "$root/scripts/quickstart.py" --help 2>/dev/null; then exit; fi
        done
        ;;
    esac
done
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
make_environment "$root" ""
exec "$python" "$root/scripts/quickstart.py" "$@"
