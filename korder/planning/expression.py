"""Einsum subscripts for any order: folding outer keys into the query, and gating.

Letters: b batch, g key heads, h query heads of one key head, i queries, jkmnop the modes, uvwxyz the columns of each
key, l a column that query and keys share, a columns of the query where they do not, e columns of the values.
"""

from __future__ import annotations

MODES = "jkmnop"
COLUMNS = "uvwxyz"


def fold_subscripts(order: int, contracted: int, *, full_weight: bool = False) -> str:
    """Return the subscripts that fold every key but the contracted one into the query.

    With a full weight X the query is T = Q X, one axis of columns per mode, and folding contracts all but one of them.

    Example:
        >>> fold_subscripts(3, 2)
        'bghil,bgjl,bgkl->bghijkl'
        >>> fold_subscripts(2, 0, full_weight=True)
        'bghiuv,bgkv->bghiku'
    """
    outer = outer_modes(order, contracted)
    query = f"bghi{COLUMNS[:order]}" if full_weight else "bghil"
    keys = [f"bg{MODES[t]}{_column(t, full_weight)}" for t in outer]
    result = "bghi" + "".join(MODES[t] for t in outer) + _column(contracted, full_weight)
    return f"{','.join([query, *keys])}->{result}"


def gate_subscripts(order: int, contracted: int) -> str:
    """Return the subscripts of the products of the outer values.

    Example:
        >>> gate_subscripts(3, 2)
        'bgje,bgke->bgjke'
    """
    modes = [MODES[t] for t in outer_modes(order, contracted)]
    return f"{','.join(f'bg{m}e' for m in modes)}->bg{''.join(modes)}e"


def outer_modes(order: int, contracted: int) -> tuple[int, ...]:
    """Return every mode but the contracted one, ascending."""
    return tuple(t for t in range(order) if t != contracted)


def _column(mode: int, full_weight: bool) -> str:
    return COLUMNS[mode] if full_weight else "l"
