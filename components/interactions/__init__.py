"""Logged interactions: the data contract, importers, vocabulary, splits and batches."""
