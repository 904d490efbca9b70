"""C1, first half: what a backend says of itself, without any array: name, capabilities, availability, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import entry_points

from korder.conformance.cases import Case
from korder.conformance.claims import CORE_ORDERS, MASKS, Claims, uneven
from korder.conformance.limits import require
from korder.conformance.records import Check, RefusedError, UnverifiedError
from korder.conformance.subject import Subject
from korder.problem import FLOAT_DTYPES
from korder.spec import Polynomial
from korder.spec.attention import MAX_ORDER
from korder.spi import API_VERSION, ENTRY_POINT_GROUP, Availability, Backend, Capabilities, MethodSupport, Reason
from korder.spi.namespace import NamespaceBackend

FRAMEWORKS = ("torch", "jax", "jaxlib", "triton", "tensorflow", "cupy", "mlx", "numba", "matplotlib", "pandas", "scipy")
NOWHERE = "nowhere"
"""A device that no backend claims."""
IMPORT_SECONDS = 60.0
_WORDS = {
    "masks": frozenset(MASKS),
    "biases": frozenset({"key", "full"}),
    "weights": frozenset({"cp", "full"}),
    "closed_form": frozenset(MASKS),
    "pruned": frozenset(MASKS),
}


def named_rightly(subject: Subject, case: None) -> None:
    """Name, version, priority and array kinds are what the contract says."""
    backend = subject.backend
    require(
        isinstance(backend.name, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", backend.name) is not None
        and backend.name != "auto",
        "a backend's name is lower case, and not 'auto'.",
        expected="letters a-z, digits, - and _, a letter first",
        got=repr(backend.name),
    )  # fmt: skip
    require(
        backend.api_version == API_VERSION,
        "the backend speaks another version of the contract.",
        expected=f"api_version == {API_VERSION}",
        got=repr(backend.api_version),
    )
    require(type(backend.priority) is int, "priority is an integer.", expected="an int", got=repr(backend.priority))
    kinds = backend.array_kinds
    require(
        isinstance(kinds, frozenset) and bool(kinds) and all(isinstance(kind, str) for kind in kinds),
        "array_kinds names at least one kind of arrays.",
        expected='a frozenset of texts, such as {"numpy"}',
        got=repr(kinds),
    )


def states_facts(subject: Subject, case: None) -> None:
    """Capabilities are static, hashable and in the contract's words."""
    facts = subject.backend.capabilities()
    require(isinstance(facts, Capabilities), "capabilities() returns a Capabilities.", expected="one", got=repr(facts))
    require(
        facts == subject.backend.capabilities() and hash(facts) == hash(subject.backend.capabilities()),
        "capabilities() states static facts.",
        expected="equal, hashable answers on every call",
        got="two that differ",
    )
    known = {
        "orders": (facts.orders, frozenset(range(1, MAX_ORDER + 1))),
        "dtypes": (facts.dtypes, frozenset(FLOAT_DTYPES)),
        "accumulation": (facts.accumulation, frozenset({"float32", "float64"})),
        "methods": (frozenset(method.name for method in facts.methods), frozenset({"exact", "polynomial"})),
    }
    for method in facts.methods:
        known |= {f"{method.name} {name}": (getattr(method, name), words) for name, words in _WORDS.items()}
    for what, (claimed, words) in known.items():
        require(
            claimed <= words,
            f"capabilities() claims {what} that the contract does not know.",
            expected=f"of {sorted(words, key=str)}",
            got=f"{sorted(claimed - words, key=str)}",
        )
    names = [method.name for method in facts.methods]
    require(len(set(names)) == len(names), "one entry per method.", expected="different names", got=", ".join(names))
    require(bool(facts.devices), "capabilities() claims no device.", expected="at least one", got="none")


def claims_core(subject: Subject, case: None) -> None:
    """Orders 1, 2 and 3 with the full mask, exact, in some float whose sums are claimed too."""
    facts = subject.claims.facts
    missing = [order for order in CORE_ORDERS if order not in facts.orders]
    require(not missing, "core: orders 1, 2 and 3 are claimed.", expected="1, 2, 3", got=f"without {missing}")
    require(bool(subject.claims.dtypes), "core: a float dtype is claimed.", expected="at least one", got="none")
    exact = facts.method("exact")
    require(
        exact is not None and "full" in exact.masks,
        "core: the exact method is claimed with the full mask.",
        expected='MethodSupport("exact", masks={"full", ..})',
        got=repr(exact),
    )
    require(
        subject.claims.accumulates(subject.claims.widest),
        "core: sums of the widest dtype are claimed.",
        expected=f"accumulation for {subject.claims.widest} operands",
        got=", ".join(sorted(facts.accumulation)),
    )


def answers_availability(subject: Subject, case: None) -> None:
    """Availability is answered, and a no comes with its reason."""
    answer = subject.backend.availability()
    require(
        isinstance(answer, Availability), "availability() returns an Availability.", expected="one", got=repr(answer)
    )
    require(
        answer.available or bool(answer.reason),
        "a backend that cannot run says why.",
        expected="Availability.no(reason, remedy)",
        got="no reason",
    )


def loads_cheaply(subject: Subject, case: None) -> None:
    """The plugin's hook imports no framework, looked at in a process of its own."""
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if _brings(point.load, subject.backend)]
    if not points:
        raise UnverifiedError("the backend comes from no entry point, so there is no hook to look at")
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        f"point, = [p for p in entry_points(group={ENTRY_POINT_GROUP!r}) if p.value == {points[0].value!r}][:1]\n"
        "for backend in point.load().korder_backends(): backend.capabilities(), backend.availability()\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
    )
    require(run.returncode == 0, "the hook fails in a fresh process.", expected="status 0", got=run.stderr[-500:])
    loaded = sorted(set(FRAMEWORKS) & set(run.stdout.split()))
    require(not loaded, "the hook and the questions import a framework.", expected="none", got=", ".join(loaded))


def _brings(load: object, backend: Backend) -> bool:
    try:
        plugin = load()  # type: ignore[operator]
        return any(type(found) is type(backend) for found in plugin.korder_backends())
    except Exception:  # another plugin that is broken, or a class that holds the hook: not this one's module
        return False


def refuses(subject: Subject, case: Case) -> None:
    """A problem outside the claims is refused with reasons."""
    reasons = subject.backend.unsupported_reasons(case.plan())
    require(
        isinstance(reasons, tuple) and bool(reasons) and all(isinstance(reason, Reason) for reason in reasons),
        f"what is not claimed must be refused with reasons: {case.extra}.",
        expected="a tuple of korder.spi.Reason, not empty",
        got=repr(reasons),
    )
    raise RefusedError("; ".join(map(str, reasons)))


def _outside(claims: Claims) -> Iterable[Case]:
    """Yield problems that leave the claims in one thing each."""
    generic = NamespaceBackend().capabilities()
    known = Claims(replace(generic, dtypes=frozenset(FLOAT_DTYPES), devices=claims.facts.devices), claims.device)

    def outside(label: str, order: int = inside_order(claims), **options: object) -> Case:
        options.setdefault("dtype", claims.widest)
        options = {"heads": 4, "groups": 4} | options
        return replace(known.case(f"not {label}", order, **options), extra=label)  # type: ignore[arg-type]

    yield replace(outside("device nowhere"), device=NOWHERE)
    for order in range(1, MAX_ORDER + 1):
        if order not in claims.facts.orders:
            yield outside(f"order {order}", order)
    for dtype in FLOAT_DTYPES:
        if dtype not in claims.facts.dtypes:
            yield outside(f"dtype {dtype}", dtype=dtype)
        elif not claims.accumulates(dtype):
            yield outside(f"sums of {dtype}", dtype=dtype)
        for precision in ("float32", "float64"):
            if not claims.accumulates(dtype, precision):
                yield outside(f"{dtype} sums in {precision}", dtype=dtype, spec={"policy": {"precision": precision}})
    if not claims.facts.grouped_heads:
        yield outside("grouped heads", groups=2)
    for method in ("exact", "polynomial"):
        support = claims.method(method)
        if support is None:
            yield outside(f"method {method}", method=method)
        else:
            yield from _outside_method(outside, support)


def inside_order(claims: Claims) -> int:
    """Return an order that is claimed, 2 if it is."""
    orders = claims.orders(2, 1, 3) or claims.orders()
    return orders[0] if orders else 2


def _outside_method(outside: object, support: MethodSupport) -> Iterable[Case]:
    make, name = outside, support.name
    assert callable(make)
    inside = next((mask for mask in MASKS if mask in support.masks), "full")
    for mask in MASKS:
        if mask not in support.masks:
            yield make(f"{mask} mask", method=name, mask=mask)
    for kind in ("key", "full"):
        # the polynomial method itself takes no full bias, so no plan of it has one
        if kind not in support.biases and not (name == "polynomial" and kind == "full"):
            yield make(f"{kind} biases", method=name, mask=inside, biases=(kind,) * MAX_ORDER)
    for form in ("cp", "full"):
        if form not in support.weights:
            yield make(f"{form} weight", method=name, mask=inside, weight=form)
    if not support.key_masks:
        yield make("key masks", method=name, mask=inside, key_masks=True)
    for mask in MASKS if name == "polynomial" else ():
        if mask in support.masks and mask not in support.closed_form:
            closed = {"method": Polynomial(degree=2, gradient="closed_form")}
            yield make(f"{mask} closed form", method=name, mask=mask, spec=closed)
        if mask in support.masks and mask not in support.pruned:
            yield uneven(make(f"{mask} pruned", method=name, mask=mask))


CHECKS = (
    Check(
        "C1.1", "contract.name", "Name, api_version, priority and array_kinds are what the contract says.",
        named_rightly, level="core", static=True,
    ),
    Check(
        "C1.2", "contract.capabilities", "Capabilities are static, hashable and in the contract's words.", states_facts,
        level="core", static=True,
    ),
    Check(
        "C1.3", "contract.core", "Orders 1, 2 and 3, exact, with the full mask, in a float dtype, are claimed.",
        claims_core, level="core", static=True,
    ),
    Check(
        "C1.4", "contract.availability", "Availability is answered, and a no comes with a reason.",
        answers_availability, level="core", static=True,
    ),
    Check(
        "C1.5", "contract.import", "The plugin's hook, its claims and its availability import no framework.",
        loads_cheaply, level="core", static=True,
    ),
    Check(
        "C1.6", "contract.refuses", "What is not claimed is refused with reasons.", refuses, _outside, level="core",
        static=True,
    ),
)  # fmt: skip
