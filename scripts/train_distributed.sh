#!/usr/bin/env bash
# Starts fairseq-train in several processes on GPUs (nccl) or CPUs (gloo); --help explains.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: [NPROC=N] scripts/train_distributed.sh [--nproc N] FAIRSEQ_TRAIN_ARGUMENTS...

Starts fairseq-train in N processes of this machine and exits 0 only if they trained.

  --nproc N       processes on this machine; default $NPROC, else the number of GPUs
  --cpu           (fairseq's own argument) trains on CPUs although there are GPUs

Every other argument goes to fairseq-train, except those named --distributed-*, which this script sets.
A batch of N processes is that of one process with --update-freq N.

TIMEOUT=N: seconds that a process waits for others before all end with an error; by default torch's own, 600 on
GPUs and 1800 on CPUs.

Several machines: run the same command on each with NNODES, NODE_RANK (0 on the first), MASTER_ADDR (a name or
address of the first) and MASTER_PORT (default 29500) set.

  NPROC=2 scripts/train_distributed.sh DATA --user-dir fairseq_flash --task language_modeling --arch flash_lm ...
TEXT
}

fail() {
    echo "train_distributed.sh: $*" >&2
    exit 2
}

nproc="${NPROC:-}"
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --nproc) nproc="${2:-}"; shift 2 || fail "--nproc needs a number of processes" ;;
    --nproc=*) nproc="${1#--nproc=}"; shift ;;
esac
[ $# -gt 0 ] || { usage >&2; fail "no arguments for fairseq-train"; }

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python=python
elif [ -x "$here/../.venv/bin/python" ]; then
    python="$here/../.venv/bin/python"
else
    python=python3
fi
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "fairseq_flash"))))' ||
    fail "$python has no torch or no fairseq_flash: activate the environment where they are installed"

if [ -z "$nproc" ]; then
    nproc="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [ "$nproc" -gt 0 ] || fail "there is no GPU: give the number of CPU processes with --nproc or NPROC"
fi
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc is '$nproc'; allowed are whole numbers from 1"

if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone) # its own port, free at the moment it starts
else
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs NODE_RANK and MASTER_ADDR"
    [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES'; allowed are whole numbers from 1"
    [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
        fail "NODE_RANK is '$NODE_RANK'; allowed are 0 to $((NNODES - 1)), another on each machine"
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "${MASTER_PORT:-29500}")
fi

if [ -n "${TIMEOUT:-}" ]; then
    [[ "$TIMEOUT" =~ ^[1-9][0-9]*$ ]] || fail "TIMEOUT is '$TIMEOUT'; allowed are whole numbers from 1, of seconds"
    where+=(--rdzv-conf "timeout=$TIMEOUT")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's own default, without its warning
# exec: signals reach torchrun itself, which ends its processes.
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" "$here/runs/worker.py" "$@"
