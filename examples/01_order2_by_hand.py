"""Order-2 attention written out with loops, then by `korder.attend`: the same numbers."""

import math

import numpy as np

import korder

generator = np.random.default_rng(0)
n, m1, m2, d, e = 5, 4, 3, 2, 3
query = generator.standard_normal((n, d))
keys = generator.standard_normal((m1, d)), generator.standard_normal((m2, d))
values = generator.standard_normal((m1, e)), generator.standard_normal((m2, e))

output = np.zeros((n, e))
for i in range(n):
    total = 0.0
    for j1 in range(m1):
        for j2 in range(m2):
            # A query is scored against a pair of keys: the three vectors multiplied entry by entry, and summed.
            score = sum(query[i, c] * keys[0][j1, c] * keys[1][j2, c] for c in range(d)) / math.sqrt(d)
            weight = math.exp(score)
            total += weight
            # The pair carries the product of its two values.
            output[i] += weight * values[0][j1] * values[1][j2]
    output[i] /= total

by_korder = korder.attend(query, keys, values)
difference = np.abs(output - by_korder).max()
print(f"{n} queries, {m1} x {m2} pairs of keys; largest difference {difference:.1e}")
assert difference < 1e-12
