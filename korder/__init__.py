"""korder: order-k generalized attention, exact or certified near-linear, on any backend."""
