"""Makes fairseq's checkpoints whole again after a kill.

fairseq writes a new checkpoint aside and renames it, which a kill cannot harm; but ``checkpoint_best.pt`` and
``checkpoint_last.pt`` are then plain copies, which a kill can cut short, and training would not resume. The
plug-in makes these copies atomic too; what was written without it is mended here.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path

__all__ = ["is_whole", "mend_checkpoints"]


def is_whole(path: Path) -> bool:
    """Whether the file is a complete checkpoint: an archive whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def mend_checkpoints(folder: Path) -> None:
    """Replaces a cut ``best``, or a cut or missing ``last``, by the newest complete checkpoint.

    Where none is complete, the cut ones are deleted, so that training starts anew.

    Args:
        folder: fairseq's ``--save-dir``; may be missing. No training may be running in it.
    """
    numbered = (path for path in folder.glob("checkpoint_*_*.pt") if re.search(r"_\d+_\d+\.pt$", path.name))
    newest_first = sorted(numbered, key=lambda path: int(path.stem.rpartition("_")[2]), reverse=True)
    others = [folder / "checkpoint_last.pt", folder / "checkpoint_best.pt"]
    source = next((path for path in [*newest_first, *others] if is_whole(path)), None)
    for path in others:
        # "best" may be missing for a reason; "last" only if a kill came before the first copy
        missing = path.name == "checkpoint_last.pt" and not path.exists() and source
        if missing or (path.exists() and not is_whole(path)):
            print(f"{path.name} was lost to a kill; taking {source.name if source else 'none'} instead")
            _replace(path, source)


def _replace(path: Path, source: Path | None) -> None:
    if source is None:
        path.unlink()
        return
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(source, copy)
    os.replace(copy, path)
