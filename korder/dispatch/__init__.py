"""WHO runs a plan: loading of backends, selection with every rejection kept, cached kernels."""
