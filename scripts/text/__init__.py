"""Reads, splits, encodes and publishes text, for the commands that prepare data."""
