"""HOW to compute: pure functions of a Problem; no arrays, no backends."""
