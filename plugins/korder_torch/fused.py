"""The exact method through PyTorch's fused attention for the CPU: Khatri-Rao keys and values, a tile of them at a time.

The fused kernel returns output and lse, by which tiles join; its backward takes those of the whole, so tiles are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from korder.spi import Layout, Problem, folded_blocks

FORWARD_KEYS, BACKWARD_KEYS = 2**14, 2**11
"""Tuples of keys in a tile. The backward reads its gradients again, so it wants them nearer to the core."""
CAUSAL_KEYS = 48 * 48
"""The same under a causal mask, where a tile is a cube and the rows that it is cut for are computed whole."""
LONGEST_CAUSAL = 256
SCRATCH_PER_THREAD = 2**20
"""Bytes that the fused kernel takes for each thread, an upper bound."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FusedTiling:
    """Keys of each mode in a tile, and key heads that are computed at a time."""

    sizes: tuple[int, ...]
    heads: int

    @property
    def keys(self) -> int:
        """Tuples of keys in a tile of one head."""
        return prod(self.sizes)

    @classmethod
    def of(cls, problem: Problem, keys: int) -> FusedTiling:
        """Return the tiling with about `keys` tuples of keys in a tile; of order 1 without a mask, all of them."""
        if problem.spec.mask.kind == "causal":
            side = min(max(int(CAUSAL_KEYS ** (1.0 / problem.order) + 1e-9), 1), LONGEST_CAUSAL)
            sizes = tuple(min(side, m) for m in problem.lengths)
        elif problem.order == 1:
            sizes = problem.lengths
        else:
            sizes = folded_blocks(list(problem.lengths), keys)
        heads = max(keys // prod(sizes), 1)
        return cls(sizes, min(heads, problem.batch * problem.groups))


class FusedAttention:
    """Forward and backward of problems that the fused kernel takes.

    Cost:      as the generic kernel; m1 .. mk (d + e) products more, for each head, forward and backward.
    Numerics:  float32; where a product of keys or values overflows the result is not finite, though that of other
               kernels may be.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.forward_tiling = FusedTiling.of(problem, FORWARD_KEYS)
        self.backward_tiling = FusedTiling.of(problem, BACKWARD_KEYS)

    @classmethod
    def for_problem(cls, problem: Problem) -> FusedAttention | None:
        """Return the way of a problem, None where the fused kernel or the memory limit does not allow it."""
        plain = (
            problem.device == "cpu"
            and problem.accumulation == "float32"
            and problem.spec.mask.kind in ("full", "causal")
            and not any(problem.biases)
            and not any(problem.key_masks)
            and problem.weight != "full"
            and problem.score_width == problem.value_width > 0
            and 0 not in (problem.batch, problem.heads, problem.queries, *problem.lengths)
        )
        if not plain:
            return None
        made = cls(problem)
        return made if made.workspace_bytes <= int(problem.spec.policy.memory_limit) else None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of a forward beyond inputs and outputs."""
        problem, tiling = self.problem, self.forward_tiling
        share = problem.heads // problem.groups
        rows = share * problem.queries
        shared = 0 if problem.order == 1 else 2 * tiling.heads * tiling.keys * problem.value_width
        joined = tiling.heads * rows * (2 * problem.value_width + 4)
        cut = 2 * tiling.keys * share * max(tiling.sizes) if problem.spec.mask.kind == "causal" else 0
        laid_out = problem.batch * problem.heads * problem.queries * problem.value_width
        return 4 * (shared + joined + cut + laid_out) + SCRATCH_PER_THREAD * int(torch.get_num_threads())

    def forward(self, layout: Layout, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return output (b, g, c, n, e) and lse (b, g, c, n); `offsets`: of queries, then of each mode's keys."""
        query, keys, values = _by_key_head(layout)
        output = torch.zeros_like(query)
        lse = query.new_full(query.shape[:-1], -inf)
        memory = self._memory(query, self.forward_tiling)
        for heads in _blocks(query.shape[0], self.forward_tiling.heads):
            for ranges in self._tiles(self.forward_tiling):
                parts = [_parts(x, heads, ranges) for x in (keys, values)]
                key, value = map(_khatri_rao, parts, memory)
                for rows, mask in self._rows(ranges, offsets):
                    at = (slice(*heads), slice(None), slice(*rows))
                    found, its_lse = _ops().forward(_flat(query[at]), key[:, None], value[:, None], **mask)
                    its_lse = its_lse.view(lse[at].shape)
                    share = torch.sigmoid(its_lse - lse[at])[..., None]
                    output[at] = torch.lerp(output[at], found.view(output[at].shape), share)
                    lse[at] = torch.logaddexp(lse[at], its_lse)
        shape = layout.query.shape
        return output.view(shape), lse.view(shape[:-1])

    def backward(
        self, layout: Layout, offsets: tuple[int, ...], output: Tensor, lse: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the gradients of the laid-out query, keys and values, given that of the output."""
        query, keys, values = _by_key_head(layout)
        output, cotangent = (x.reshape(query.shape) for x in (output, cotangent))
        lse = torch.where(lse == -inf, inf, lse).reshape(query.shape[:-1])  # weights of 0 where nothing is live
        gradients = [torch.zeros_like(x) for x in (query, *keys, *values)]
        order, memory = self.problem.order, self._memory(query, self.backward_tiling)
        for heads in _blocks(query.shape[0], self.backward_tiling.heads):
            for ranges in self._tiles(self.backward_tiling):
                parts = [_parts(x, heads, ranges) for x in (keys, values)]
                key, value = (x[:, None] for x in map(_khatri_rao, parts, memory))
                sums: list[Any] = [0.0, 0.0]
                for rows, mask in self._rows(ranges, offsets):
                    at = (slice(*heads), slice(None), slice(*rows))
                    given = [_flat(x[at]) for x in (cotangent, query, output)]
                    of_query, *others = _ops().backward(
                        *given[:2], key, value, given[2], _flat(lse[at][..., None])[..., 0], 0.0, False, **mask
                    )
                    gradients[0][at] += of_query.view(query[at].shape)
                    sums = [total + other for total, other in zip(sums, others, strict=True)]
                if torch.is_tensor(sums[0]):
                    for first, total, shared in zip((1, 1 + order), sums, parts, strict=True):
                        for t, part in enumerate(_adjoint(total[:, 0], shared)):
                            gradients[first + t][slice(*heads), slice(*ranges[t])] += part
        shaped = [
            x.view(like.shape) for x, like in zip(gradients, (layout.query, *layout.keys, *layout.values), strict=True)
        ]
        return shaped[0], shaped[1 : order + 1], shaped[order + 1 :]

    def _memory(self, like: Tensor, tiling: FusedTiling) -> list[Tensor]:
        """Return memory for the keys and the values of a tile: fresh pages for every tile would cost a part of it."""
        count = 0 if self.problem.order == 1 else tiling.heads * tiling.keys * like.shape[-1]
        return [like.new_empty(count) for _ in range(2)]

    def _tiles(self, tiling: FusedTiling) -> Iterator[tuple[Range, ...]]:
        return product(*(_blocks(m, size) for m, size in zip(self.problem.lengths, tiling.sizes, strict=True)))

    def _rows(self, ranges: tuple[Range, ...], offsets: tuple[int, ...]) -> Iterator[tuple[Range, dict[str, Any]]]:
        """Yield the rows that see all of a tile, and those that see a part of it, with the kernel's options."""
        rows, options = self.problem.queries, {"scale": 1.0}
        if self.problem.spec.mask.kind == "full":
            yield (0, rows), options
            return
        spans = [(start + shift, stop + shift) for (start, stop), shift in zip(ranges, offsets[1:], strict=True)]
        first = min(max(max(start for start, _ in spans) - offsets[0], 0), rows)
        whole = min(max(max(stop for _, stop in spans) - 1 - offsets[0], first), rows)
        if whole < rows:
            yield (whole, rows), options
        if first < whole:
            # of keys that all of these rows see, only their number matters, so that most tiles have the same masks
            start = first + offsets[0]
            seen = tuple((low - high, 0) if high <= start + 1 else (low - start, high - start) for low, high in spans)
            share = self.problem.heads // self.problem.groups
            yield (first, whole), options | {"attn_mask": _closed(whole - first, seen, share)}


@dataclass(frozen=True, slots=True)
class FusedOps:
    """PyTorch's private operations."""

    forward: Any
    backward: Any


def _ops() -> FusedOps:
    aten = torch.ops.aten
    return FusedOps(
        aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
    )


def is_faster() -> bool:
    """Return whether the fused kernel exists and beats our own products, which it does below AVX-512 (decision 009)."""
    exists = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    return exists and torch.backends.cpu.get_cpu_capability() != "AVX512"


@lru_cache(maxsize=8)
def _closed(rows: int, spans: tuple[Range, ...], share: int) -> Tensor:
    """Return 0 where a row at 0, 1, .. sees the keys of every mode at the positions of its span, else -inf."""
    live = torch.ones((rows, 1), dtype=torch.bool)
    for span in spans:
        live = (live[:, :, None] & (torch.arange(*span) <= torch.arange(rows)[:, None])[:, None, :]).flatten(1)
    return torch.where(live, 0.0, -inf).repeat(share, 1)[None, None]


def _by_key_head(layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Query (h, c, n, d), keys and values (h, m, d), where h = b g."""
    keys, values = ([x.flatten(0, 1) for x in arrays] for arrays in (layout.keys, layout.values))
    return layout.query.flatten(0, 1), keys, values


def _flat(rows: Tensor) -> Tensor:
    """(h, c, n, d) as (h, 1, c * n, d): the query heads of a key head are more rows of it."""
    return rows.reshape(rows.shape[0], 1, -1, rows.shape[-1])


def _parts(arrays: list[Tensor], heads: Range, ranges: tuple[Range, ...]) -> list[Tensor]:
    return [x[slice(*heads), slice(*span)] for x, span in zip(arrays, ranges, strict=True)]


def _khatri_rao(parts: list[Tensor], memory: Tensor | None = None) -> Tensor:
    """Return the products of one row of each part, (h, m1 .. mk, d), the last mode fastest; in `memory` if given."""
    if len(parts) == 1:
        return parts[0]
    left, right = _khatri_rao(parts[:-1])[:, :, None], parts[-1][:, None]
    if memory is None:
        return (left * right).flatten(1, 2)
    shape = (*left.shape[:2], *right.shape[2:])
    place = memory[: prod(shape)].view(shape)
    return torch.mul(left, right, out=place).flatten(1, 2)


def _adjoint(gradient: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the parts of a Khatri-Rao product."""
    found = []
    for t in range(len(parts) - 1, 0, -1):
        before, last = _khatri_rao(parts[:t]), parts[t]
        gradient = gradient.unflatten(1, (before.shape[1], last.shape[1]))
        found.append((gradient * before[:, :, None]).sum(dim=1))
        gradient = (gradient * last[:, None]).sum(dim=2)
    return [gradient, *reversed(found)]


def _blocks(length: int, size: int) -> list[Range]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]
