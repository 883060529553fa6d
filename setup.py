"""What setup.cfg cannot say: a wheel carries the folder scripts/ too, as the package fairseq_flash_commands.

It lies beside fairseq_flash, as scripts/ does in a clone, so that commands find the plug-in in the same way.
"""

from setuptools import find_packages, setup

rooms = [f"fairseq_flash_commands.{room}" for room in find_packages("scripts")]
setup(
    packages=[*find_packages(include=["fairseq_flash*"]), "fairseq_flash_commands", *rooms],
    package_dir={"fairseq_flash_commands": "scripts"},
)
