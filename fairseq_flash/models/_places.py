"""Where a model is loaded from: what ``from_pretrained`` is given, or which argument of it is nowhere."""

import os
from typing import Any

from fairseq import file_utils

__all__ = ["find_places"]


def find_places(
    registered: dict[str, Any], model_name_or_path: Any, checkpoint_file: Any, data_name_or_path: Any
) -> tuple[tuple[str, str, str], dict[str, Any]]:
    """Finds the files of a model; archives are unpacked.

    Args:
        registered: The class's ``hub_models()``: by name a path, or a dict of it as ``path``, of
            ``checkpoint_file`` and of options.
        model_name_or_path: Folder of the checkpoint, or a tar archive of it, or a registered name.
        checkpoint_file: Its name, or several between colons.
        data_name_or_path: Folder of the data, or an archive; relative to the checkpoint's if it begins with
            a dot.

    Returns:
        The folder of the checkpoint, its name, and the folder of the data; and registered options.

    Raises:
        ValueError: an argument is no path.
        FileNotFoundError: there is nothing of that name.
    """
    model, data = (
        registered.get(name, name) if isinstance(name, str) else name
        for name in (model_name_or_path, data_name_or_path)
    )
    options = dict(model) if isinstance(model, dict) else {"path": model}
    checkpoint_file = options.pop("checkpoint_file", checkpoint_file)
    folder = _found("model_name_or_path", options.pop("path"))
    names = _text("checkpoint_file", checkpoint_file, f"the name of a file in {folder}")
    for name in names.split(os.pathsep):
        if not os.path.isfile(os.path.join(folder, name)):
            known = sorted(known for known in os.listdir(folder) if known.endswith(".pt"))
            raise FileNotFoundError(
                f"checkpoint_file={names!r}: there is no {name!r} in {folder}; allowed: "
                f"{', '.join(known[:9]) or 'a folder with a checkpoint'}"
            )
    return (folder, names, _found("data_name_or_path", data, folder)), options


def _text(argument: str, value: Any, allowed: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{argument}={value!r} is not allowed; allowed: {allowed}")
    return os.fspath(value)


def _found(argument: str, value: Any, folder: str = "") -> str:
    allowed = "a folder, a tar archive or its address"
    path = _text(argument, value, allowed)
    if folder and path.startswith("."):
        path = os.path.abspath(os.path.join(folder, path))
    try:
        return file_utils.load_archive_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}={value!r} does not exist; allowed: {allowed}") from None
