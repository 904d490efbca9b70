"""Incremental decoding: a state of the keys so far, extended token by token, and queries that read it."""
