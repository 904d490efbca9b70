"""The array operations on running states, tokens first, that a backend may override."""

from __future__ import annotations

from typing import Any

Array = Any
Tokens = tuple[Array, Array]
"""A run of features (rho, c), and the weighted values [w v, w] (c, e') that go with them."""


class RunningArrays:
    """Running sums over tokens of features times weighted values; `xp` is the namespace."""

    xp: Any

    def running_terms(self, tokens: Tokens) -> Array:
        """Return features times weighted values: (c, rho, e')."""
        features, weighted = tokens
        return self.xp.permute_dims(features, (1, 0))[:, :, None] * weighted[:, None, :]

    def running_state(self, tokens: Tokens, carry: Array) -> Array:
        """Return carry (rho, e') + the sums of terms up to each token: (c, rho, e')."""
        return self.running_sums(self.running_terms(tokens), carry)[0]

    def running_sums(self, terms: Array, carry: Array) -> tuple[Array, Array]:
        """Return carry (rho, e') + the sums of terms (c, rho, e') up to each token, and the sum of all, no carry."""
        sums = self.xp.cumulative_sum(terms, axis=0)
        return carry[None, :, :] + sums, sums[-1, ...]

    def reverse_running(self, terms: Array, carry: Array) -> tuple[Array, Array]:
        """Return carry (rho, e') + the sums of terms (c, rho, e') from each token on, and the sum of all, no carry."""
        xp = self.xp
        sums = xp.flip(xp.cumulative_sum(xp.flip(terms, axis=0), axis=0), axis=0)
        return carry[None, :, :] + sums, sums[0, ...]

    def sliding_state(self, arriving: Tokens, leaving: Tokens, carry: Array) -> Array:
        """Return carry + the sums of arriving terms up to each token and of leaving terms from it on: (c, rho, e')."""
        return (
            self.reverse_running(self.running_terms(leaving), carry)[0]
            + self.running_sums(self.running_terms(arriving), self.xp.zeros_like(carry))[0]
        )

    def chained_terms(self, tokens: Tokens, before: Array, carry: Array) -> Array:
        """Return terms times the states (c, rho, e') of the token before each, for the first one times the carry."""
        shifted = self.xp.concat([carry[None, :, :], before[:-1, ...]], axis=0)
        return self.running_terms(tokens) * shifted

    def running_read(self, features: Array, states: Array) -> Array:
        """Return the sum over rho of features (rho, c) times states (c, rho, e'): (c, e') float64."""
        rows = self.xp.permute_dims(features, (1, 0))[:, None, :]
        return self.xp.astype(self.xp.matmul(rows, states)[:, 0, :], self.xp.float64)

    def running_dot(self, states: Array, weighted: Array) -> Array:
        """Return the inner products over channels of states (c, rho, e') and weighted (c, e'): (rho, c)."""
        return self.xp.permute_dims(self.xp.matmul(states, weighted[:, :, None])[:, :, 0], (1, 0))
