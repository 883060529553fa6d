"""FLASH (gated attention units with mixed chunk attention) as a fairseq plug-in."""
