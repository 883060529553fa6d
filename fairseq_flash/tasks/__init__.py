"""What fairseq's own tasks lack for models with a state of constant size; knows fairseq as models do."""
