"""What fairseq needs on this Python, numpy and torch, and the places where it trusts a checkpoint too much.

``versions``
    names and defaults that have changed since;
``checkpoints``
    why no checkpoint runs code or takes the memory, with ``dry_run``, which looks at its file;
``room``
    a small checkpoint builds no huge model;
``hub``
    archives and addresses that ``from_pretrained`` opens;
``saving``
    one training a folder, and no cut file in it;
``training``
    where it begins, goes on and ends;
``ending``
    how it ends when a scheduler asks for it;
``update``
    weights of 16 bits are copied all at once, and only devices that are there are seeded;
``ahead``
    a GPU does not wait for the host between two updates;
``data``
    rows that fairseq would drop, garble or refuse;
``choices``
    names of tasks and criterions that are unknown, or go with another model;
``losses``
    what criterions log;
``values``
    values of options that cannot be, by the tables of ``allowed``;
``generation``
    options that fail for some models or batches;
``messages``
    what a user reads.

Everything was tried with ve-fairseq 0.12.3, torch 2.13, numpy 2.4, hydra 1.3 and omegaconf 2.3 on Python
3.11. Each healing names its reason and the versions that need it, does nothing where it is not needed, may
run twice, and holds for every model of the process, ours or not.

Two things happen before ``--user-dir`` is read and so cannot be healed from here: the line "Please install
tensorboardX" (hence tensorboardX is a dependency of this package) and warnings about fairseq's own syntax.
"""

from fairseq_flash._compat import (
    ahead,
    checkpoints,
    choices,
    data,
    ending,
    generation,
    hub,
    losses,
    messages,
    saving,
    training,
    update,
    values,
    versions,
)

__all__ = ["prepare_host"]


def prepare_host() -> None:
    """Makes fairseq run on current numpy and torch, and keeps it from running code out of a checkpoint.

    Idempotent; works before or after fairseq's own modules are imported. Call it before a model is
    registered.
    """
    # Messages first: the others import the modules whose noise is to be hidden.
    first = (messages, versions, checkpoints, hub, saving, training, update, ahead, ending, data)
    for kind in (*first, losses, generation, choices, values):
        kind.prepare()
