"""The registered models: the only layer, with tasks, that knows fairseq."""
