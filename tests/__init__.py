"""The tests of korder."""
