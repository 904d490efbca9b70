"""What a backend can do, as static facts. Every default refuses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from korder.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something cannot be run: the actual value against the supported set."""

    what: str
    got: str
    supported: str = ""

    def __str__(self) -> str:
        return f"{self.what}={self.got} (supported: {self.supported or 'none'})"


@dataclass(frozen=True, slots=True)
class MethodSupport:
    """What a backend can do with one method.

    Args:
        name: "exact" or "polynomial".
        masks: Kinds of mask.
        biases: Kinds of bias, of "key" and "full".
        weights: Forms of the Kronecker weight, of "cp" and "full".
        key_masks: Whether key masks are taken.
        backward: Whether the kernel has a backward.
        closed_form: Kinds of mask under which that of the polynomial method also knows the closed form of the gradient.
        state: Whether the kernel has `states()`, sums over keys that come one after another, for decoding.
        pruned: Kinds of mask under which that of the polynomial method takes plans that leave monomials out.
    """

    name: str
    masks: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    key_masks: bool = False
    backward: bool = False
    closed_form: frozenset[str] = frozenset()
    state: bool = False
    pruned: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Static facts of a backend.

    Args:
        orders: Orders it computes.
        dtypes: Names of operand dtypes.
        devices: Device types, "cpu", "cuda".
        methods: One entry for each method it has.
        grouped_heads: Whether fewer key/value heads than query heads are taken.
        accumulation: Dtypes it can sum in.
    """

    orders: frozenset[int] = frozenset()
    dtypes: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    methods: tuple[MethodSupport, ...] = ()
    grouped_heads: bool = False
    accumulation: frozenset[str] = frozenset({"float32"})

    def method(self, name: str) -> MethodSupport | None:
        """Return the support for a method, None if it has none."""
        return next((entry for entry in self.methods if entry.name == name), None)

    def refuse(self, plan: Plan) -> tuple[Reason, ...]:
        """Return every reason why `plan` is outside these capabilities; none means it is inside."""
        problem = plan.problem
        reasons = [
            _member("order", problem.order, self.orders),
            _member("dtype", problem.dtype, self.dtypes),
            _member("device", problem.device.split(":")[0], self.devices),
            _member("accumulation", problem.accumulation, self.accumulation),
        ]
        if problem.groups != problem.heads and not self.grouped_heads:
            reasons.append(
                Reason("heads", f"{problem.heads} over {problem.groups}", "as many key heads as query heads")
            )
        support = self.method(plan.method)
        if support is None:
            reasons.append(Reason("method", plan.method, ", ".join(sorted(m.name for m in self.methods))))
        else:
            reasons += _refuse_method(support, plan)
        return tuple(reason for reason in reasons if reason is not None)


def _refuse_method(support: MethodSupport, plan: Plan) -> list[Reason | None]:
    problem = plan.problem
    where = f" with method={plan.method}"
    reasons = [_member("mask", problem.spec.mask.kind, support.masks, where)]
    reasons += [
        _member(f"biases[{t}]", kind, support.biases, where)
        for t, kind in enumerate(problem.biases)
        if kind is not None
    ]
    if problem.weight != "none":
        reasons.append(_member("weight", problem.weight, support.weights, where))
    if any(problem.key_masks) and not support.key_masks:
        reasons.append(Reason("key_masks", "given", "none" + where))
    closed_form = plan.polynomial is not None and plan.polynomial.gradient == "closed_form"
    if closed_form and problem.spec.mask.kind not in support.closed_form:
        known = "".join(f"; closed_form with mask={mask}" for mask in sorted(support.closed_form))
        reasons.append(Reason("gradient", "closed_form", "consistent" + known))
    pruned = plan.polynomial is not None and plan.polynomial.pruning is not None
    if pruned and problem.spec.mask.kind not in support.pruned:
        known = "".join(f"; pruned ones with mask={mask}" for mask in sorted(support.pruned))
        reasons.append(Reason("features", "pruned", "all monomials" + known))
    return reasons


def _member(what: str, got: object, supported: Iterable[object], where: str = "") -> Reason | None:
    supported = frozenset(supported)
    if got in supported:
        return None
    ordered = sorted(supported, key=lambda item: (str(type(item)), item))
    return Reason(what, str(got), (", ".join(map(str, ordered)) or "none") + where)
