"""Each method written once over any Array API namespace: the readable truth, and a new backend's free start."""
