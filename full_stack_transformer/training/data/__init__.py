"""Batches for Lightning: of a corpus, or of labelled rows."""
