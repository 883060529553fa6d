"""fairseq-train that kills itself at a given moment of its saving: killed.py MOMENT SAVE-DIR ARGUMENTS...

A moment is each update, each time that the process touches a file of its save folder, each time that half a
file is written or copied, and its end. MOMENT 0 kills nothing; the number of moments is printed at the end.
Under torchrun it is a process of scripts/train_distributed.sh, of which the first has moments.
"""

import atexit
import io
import os
import shutil
import signal
import sys

import torch

MOMENT, FOLDER, ARGUMENTS = int(sys.argv[1]), os.path.realpath(sys.argv[2]), sys.argv[3:]
EVENTS = ("open", "os.rename", "os.remove", "shutil.copyfile")
DISTRIBUTED = "RANK" in os.environ
FIRST = os.environ.get("RANK", "0") == "0"
seen = 0


def pass_moment() -> None:
    global seen
    seen += 1
    if seen == MOMENT and FIRST:
        os.kill(os.getpid(), signal.SIGKILL)


def touched(event: str, arguments: tuple) -> None:
    if event in EVENTS and any(isinstance(word, str) and word.startswith(FOLDER) for word in arguments):
        pass_moment()


def half_then_whole(write, read):
    def healed(source, target, *others, **options):
        data = read(source)
        file = open(target, "wb") if isinstance(target, str) else target  # noqa: SIM115
        file.write(data[: len(data) // 2])
        file.flush()
        pass_moment()
        file.seek(0)
        return write(source, target, *others, **options)

    return healed


def saved(obj: object) -> bytes:
    held = io.BytesIO()
    save(obj, held)
    return held.getvalue()


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


save = torch.save
torch.save = half_then_whole(save, saved)
shutil.copyfile = half_then_whole(shutil.copyfile, content)
sys.addaudithook(touched)
sys.argv = ["fairseq-train", *ARGUMENTS, "--save-dir", FOLDER]

from fairseq.trainer import Trainer  # noqa: E402
from fairseq_cli.train import cli_main  # noqa: E402

train_step = Trainer.train_step


def update(self, *arguments, **options):
    pass_moment()
    return train_step(self, *arguments, **options)


Trainer.train_step = update


@atexit.register
def end() -> None:
    pass_moment()
    print(f"moments: {seen}")


if DISTRIBUTED:
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "scripts"))
    from runs.worker import main

    main()
else:
    cli_main()
