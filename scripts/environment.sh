# Sourced by quickstart.sh and test.sh: finds or makes the Python environment, and installs the package in it.
#
# An active virtualenv or conda environment is used as it is. Otherwise .venv in the repository is used, and made
# first if need be, with $PYTHON if that is set.

fail() {
    printf '%s\n' "$*" >&2
    exit 2
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

# Prints the interpreter to make .venv with.
find_interpreter() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found: install one, or name it, as in PYTHON=/path/to/python3.11 bash $0"
}

# Sets `python` to the environment's interpreter.
find_environment() {
    local root=$1 active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [[ -n "$active" && -z "${PYTHON:-}" ]]; then
        python=$active/bin/python
        is_supported "$python" || fail "the active environment $active has no Python 3.11 or 3.12:" \
            "leave it (deactivate), or set PYTHON to such an interpreter"
        return
    fi
    python=$root/.venv/bin/python
    if ! is_supported "$python"; then
        local interpreter
        interpreter=$(find_interpreter)
        printf 'making the environment %s with %s\n' "$root/.venv" "$interpreter"
        "$interpreter" -m venv --clear "$root/.venv" ||
            fail "could not make $root/.venv; on Debian and Ubuntu: apt install python3-venv"
    fi
}

# make_environment ROOT EXTRA: sets `python`; installs ROOT with that extra ("" for none) unless nothing has changed.
make_environment() {
    local root=$1 extra=$2 stamp state
    find_environment "$root"
    stamp=$("$python" -c 'import sys; print(sys.prefix)')/.fairseq_flash${extra:+-$extra}
    state=$(printf '%s\n' "$root" && cat "$root/setup.cfg" "$root/pyproject.toml" "$root/constraints.txt")
    if [[ -f "$stamp" && "$(<"$stamp")" == "$state" ]]; then
        return
    fi
    local constraints=(-c "$root/constraints.txt")
    if "$python" -c 'import torch' 2>/dev/null && [[ "$python" != "$root/.venv/bin/python" ]]; then
        # somebody's own environment: its torch is there for a reason, such as its GPU
        constraints=()
    fi
    printf 'installing fairseq_flash in %s (minutes, the first time)\n' "$("$python" -c 'import sys; print(sys.prefix)')"
    "$python" -m pip install --quiet --disable-pip-version-check \
        ${constraints[@]+"${constraints[@]}"} -e "$root${extra:+[$extra]}" ||
        fail "the installation failed; is there a network? What pip says stands above"
    printf '%s\n' "$state" >"$stamp"
}
