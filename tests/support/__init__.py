"""What tests share: the oracle, its adapter, rows in pieces, and fairseq's tools on tiny text."""
