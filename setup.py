"""What setup.cfg cannot say.

A wheel carries the folder scripts/ too, as the package fairseq_flash_commands: beside fairseq_flash, as
scripts/ lies in a clone, so that commands find the plug-in in the same way. A package index has none of the
files that the README links to, so its description shows neither pictures nor links to them.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

rooms = [f"fairseq_flash_commands.{room}" for room in find_packages("scripts")]
readme = (Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8")
without_pictures = re.sub(r"^!\[.*\n", "", readme, flags=re.MULTILINE)
setup(
    packages=[*find_packages(include=["fairseq_flash*"]), "fairseq_flash_commands", *rooms],
    package_dir={"fairseq_flash_commands": "scripts"},
    long_description=re.sub(r"\[([^]]*)\]\((?!https://)[^)]*\)", r"\1", without_pictures),
    long_description_content_type="text/markdown",
)
