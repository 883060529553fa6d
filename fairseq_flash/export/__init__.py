"""Trained models for transformers (Hugging Face), and back."""

from fairseq_flash.export.read import import_folder, load_folder
from fairseq_flash.export.write import export_checkpoint

__all__ = ["export_checkpoint", "import_folder", "load_folder"]
