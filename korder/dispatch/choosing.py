"""Runs the methods that choose, `Split` and `Auto`: rank the plans by time, run the best, certify, fall back.

Every part is an ordinary call of the door that the arrays came through, so that gradients flow as they do there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from korder.dispatch.arrays import Given, namespace_of_kind, on_host
from korder.dispatch.rates import part_seconds, predicted_seconds
from korder.dispatch.registry import Registry
from korder.dispatch.request import as_given, certificate_as_given
from korder.dispatch.run import Request, accuracy_hint
from korder.dispatch.select import Rejection, select
from korder.errors import AccuracyError, AccuracyWarning, UnsupportedProblemError
from korder.methods import merging, outliers
from korder.methods.exact_certificates import certify_exact
from korder.methods.expectations import expected_shifts
from korder.methods.tolerances import ToleranceCheck, meets_tolerance, missing_rows
from korder.planning.candidates import candidate_plans
from korder.planning.choices import exact_parts
from korder.planning.exact import exact_plan
from korder.planning.plan import Plan, SplitPlan
from korder.problem import Problem
from korder.result import ROW_FIELDS, Provenance, Result
from korder.spec import Auto, Exact, Full, Polynomial, Split
from korder.spi.operands import KernelOutput, Operands

Array = Any
Attend = Callable[..., Result]
"""`attend_result` of the door that a call came through."""
SHOWN = 5
"""Candidates that the notes of a plan name; the provenance names all."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with who would run its parts and how long that is expected to take."""

    plan: Plan
    backends: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.plan.name}: {self.seconds:.3g} s"

    def seconds_after(self, tried: SplitPlan) -> float:
        """Return how long a split is expected to take after another: where their keys agree, those are done."""
        split, parts = self.plan.split, tuple(zip(self.plan.parts, self.backends, strict=True))
        assert split is not None
        if split.threshold == tried.threshold:
            parts = (parts[0], *parts[1 + sum(map(bool, split.keys)) :])
        return sum(part_seconds(part, backend) for part, backend in parts)


def run_choice(registry: Registry, attend_result: Attend, given: Given, request: Request) -> Result:
    """Return the result of a request whose method chooses, in the layout that the operands were given in.

    Raises:
        UnsupportedProblemError: Nothing can run any of the plans.
        AccuracyError: The choice misses the tolerance and the method says to raise.
    """
    candidates, rejected = ranked(registry, request.problem, request.array_kind, request.backend)
    call = Choice(attend_result, request, tuple(candidates), tuple(rejected))
    best, method = candidates[0], request.problem.spec.method
    notes: tuple[str, ...] = ()
    try:
        result = call.run(best)
    except AccuracyError as error:
        exact = next((candidate for candidate in candidates if candidate.plan.method == "exact"), None)
        if exact is None or not (isinstance(method, Auto) or method.on_exceed == "exact"):  # type: ignore[union-attr]
            raise
        notes = (f"{best.plan.name}: {error.message} next exact",)
        result = call.run(exact)
    return _as_given(given, call.described(result, notes))


def ranked(
    registry: Registry, problem: Problem, array_kind: str, requested: str = "auto"
) -> tuple[list[Candidate], list[Rejection]]:
    """Return the plans that something here can run, the fastest first, and who was turned down for the first.

    Raises:
        UnsupportedProblemError: Nothing can run any of them.
    """
    found: list[tuple[Candidate, list[Rejection]]] = []
    refusal: UnsupportedProblemError | None = None
    for plan in candidate_plans(problem):
        try:
            selections = [
                select(registry, (part,), array_kind=array_kind, requested=requested) for part in plan.parts or (plan,)
            ]
        except UnsupportedProblemError as error:
            refusal = error
            continue
        backends = tuple(selection.backend.name for selection in selections)
        rejected = [rejection for selection in selections for rejection in selection.rejected]
        found.append((Candidate(plan, backends, predicted_seconds(plan, backends)), rejected))
    if not found:
        assert refusal is not None
        raise refusal
    found.sort(key=lambda pair: pair[0].seconds)
    return [candidate for candidate, _ in found], list(dict.fromkeys(found[0][1]))


@dataclass(frozen=True, slots=True)
class Choice:
    """One call and the candidates for it, any of which it runs."""

    attend_result: Attend
    request: Request
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]

    def run(self, candidate: Candidate) -> Result:
        """Run a candidate; its arrays are in the kernel layout.

        Raises:
            AccuracyError: The tolerance is missed, and the method does not warn.
        """
        if candidate.plan.split is None:
            return self._attend(self.request.operands, Exact())
        return self._checked(self._split(candidate))

    def described(self, result: Result, notes: tuple[str, ...]) -> Result:
        """Return a result whose provenance says what there was to choose from."""
        known = result.provenance
        assert known is not None
        listed = tuple(map(str, self.candidates))
        shown = [f"predicted {text}" for text in listed[:SHOWN]]
        plan = replace(known.plan, notes=(*known.plan.notes, *shown))
        rejected = tuple(dict.fromkeys((*self.rejected, *known.rejected)))
        return replace(result, provenance=Provenance(known.backend, plan, rejected, (*notes, *known.replanned), listed))

    def _attend(self, operands: Operands, method: Exact | Polynomial, *, full: bool = False) -> Result:
        """Call the door on operands in the kernel layout, positions given by their offsets."""
        spec = self.request.problem.spec
        mask = Full() if full or isinstance(spec.mask, Full) else spec.mask.model_copy(update={"align": None})
        return self.attend_result(
            operands.query,
            operands.keys,
            operands.values,
            spec=spec.model_copy(update={"method": method, "mask": mask}),
            weight=operands.weight,
            biases=operands.biases,
            key_masks=tuple(map(self._given_mask, operands.key_masks)),
            query_offset=operands.query_offset,
            key_offsets=operands.key_offsets,
            backend=self.request.backend,
        )

    def _given_mask(self, mask: Array | None) -> Array | None:
        """(b, 1, m), which all key heads share, as a user gives it: (b, m)."""
        if mask is None or mask.shape[1] == self.request.problem.groups:
            return mask
        return namespace_of_kind(self.request.array_kind).reshape(mask, (mask.shape[0], mask.shape[2]))

    def _split(self, candidate: Candidate) -> Result:
        """Run the parts of a split, merge them by lse, and compute the rows that miss exactly.

        Where those would take longer than a split that goes further, that one is run first. This ends: each goes
        further than the one before, and all together must be expected to take less than the rows that are left.
        """
        host, (known,) = on_host(self.request.array_kind, _detached(self.request.operands))
        sizes = outliers.typical_sizes(host, self.request.problem, known)
        rest, notes, spent = None, [], 0.0
        while True:
            split = candidate.plan.split
            assert split is not None
            if rest is None or rest.threshold != split.threshold:
                rest = self._without_outliers(split, known, sizes)
            whole, missing = self._with_polynomial(rest, split)
            count = outliers.row_count(host, missing)
            further = self._further(candidate, count, spent)
            if further is None:
                break
            notes.append(f"{_kind_of(split)} leaves {count} rows a head; next {_kind_of(further.plan.split)}")
            spent += further.seconds_after(split)
            candidate = further
        if count:
            notes.append(f"{_kind_of(split)} leaves {count} rows a head, computed exactly")
            gathered = outliers.of_queries(rest.xp, self.request.problem, self.request.operands, missing, count)
            whole = _with_rows(rest.xp, whole, self._exact(gathered, full=True), missing)
        assert whole.provenance is not None
        return replace(whole, provenance=replace(whole.provenance, plan=candidate.plan, replanned=tuple(notes)))

    def _further(self, tried: Candidate, count: int, spent: float) -> Candidate | None:
        """Return the split to try next after one that left `count` rows, None to compute these exactly."""
        split = tried.plan.split
        assert split is not None
        if not count:
            return None
        options = [other for other in self.candidates if _goes_further(other.plan.split, split)]
        if not options:
            return None
        best = min(options, key=lambda option: option.seconds_after(split))
        return best if spent + best.seconds_after(split) < self._row_seconds(tried, count) else None

    def _row_seconds(self, tried: Candidate, count: int) -> float:
        """Return how long it is expected to take to compute some rows exactly; infinite where that does not fit."""
        exact = next((other for other in self.candidates if other.plan.method == "exact"), tried)
        try:
            (rows,) = exact_parts(self.request.problem, (), count)
            return part_seconds(exact_plan(rows), exact.backends[-1])
        except UnsupportedProblemError:
            return float("inf")

    def _without_outliers(self, split: SplitPlan, known: Operands, sizes: tuple[Array, ...]) -> _Rest:
        """Return what is left when outlying keys are set aside, with the results of the tuples that hold one."""
        request = self.request
        xp = namespace_of_kind(request.array_kind)
        if not any(split.keys):
            return _Rest(xp, split.threshold, request.problem, request.operands, known, sizes, ())
        host, _ = on_host(request.array_kind)
        found = outliers.outlying_keys(host, sizes, split.threshold)
        parts = tuple(
            self._exact(outliers.with_outlier(xp, request.problem, request.operands, found, t, count))
            for t, count in enumerate(split.keys)
            if count
        )
        masked = replace(request.problem, key_masks=(True,) * request.problem.order)
        operands, known = outliers.without_keys(xp, request.operands, found), outliers.without_keys(host, known, found)
        return _Rest(xp, split.threshold, masked, operands, known, sizes, parts)

    def _with_polynomial(self, rest: _Rest, split: SplitPlan) -> tuple[Result, Array]:
        """Return the whole with the rest by polynomial, and which rows miss the tolerance."""
        kind, tolerance = self.request.array_kind, self.request.problem.spec.tolerance
        assert tolerance is not None
        host, (known,) = on_host(kind, _detached(self.request.operands))
        degrees = tuple(range(2, split.degree + 1, 2))
        shift = expected_shifts(host, rest.problem, rest.known, rest.sizes, degrees)[-1]
        hopeless = host.logical_not(shift <= outliers.HOPELESS * tolerance)
        operands = outliers.without_queries(rest.xp, rest.operands, hopeless)
        method = Polynomial(degree=split.degree, prune=split.prune or None)
        whole = self._merged([self._attend(operands, method), *rest.parts])
        (certificate,) = on_host(kind, whole.certificate)[1]
        return whole, host.logical_or(hopeless, missing_rows(host, certificate, known, tolerance))

    def _merged(self, parts: list[Result]) -> Result:
        """Return parts over disjoint sets of tuples as one; the certificate has no graph."""
        if len(parts) == 1:
            return parts[0]
        xp = namespace_of_kind(self.request.array_kind)
        output, lse = merging.merge_outputs(xp, [part.output for part in parts], [part.lse for part in parts])
        plain = [_detached(part) for part in parts]
        certificate = merging.merge_certificates(xp, plain, lse.detach() if hasattr(lse, "detach") else lse)
        return Result(output, lse, certificate, parts[0].provenance)

    def _exact(self, operands: Operands, *, full: bool = False) -> Result:
        """Run a part exactly and certify its rounding."""
        result = self._attend(operands, Exact(), full=full)
        assert result.provenance is not None
        problem = result.provenance.plan.problem
        host, (known, output) = on_host(
            self.request.array_kind, _detached(operands), _detached(KernelOutput(result.output, result.lse))
        )
        return replace(result, certificate=certify_exact(host, problem, known, output))

    def _checked(self, whole: Result) -> Result:
        """Return the result; raise, or warn, where its certificate misses the tolerance."""
        method, problem = self.request.problem.spec.method, self.request.problem
        assert isinstance(method, Split | Auto)
        assert method.tolerance is not None
        host, (operands, certificate) = on_host(
            self.request.array_kind, _detached(self.request.operands), whole.certificate
        )
        check = meets_tolerance(host, certificate, operands, method.tolerance)
        if check.met:
            return whole
        error = _missed(problem, method.tolerance, check)
        if isinstance(method, Split) and method.on_exceed == "warn":
            warnings.warn(str(error), AccuracyWarning, stacklevel=5)
            return whole
        raise error


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left to the polynomial method, and what has been computed of the tuples that are not."""

    xp: Any
    threshold: float
    problem: Problem
    operands: Operands
    known: Operands
    """The operands without a graph, on the host."""
    sizes: tuple[Array, ...]
    """Typical sizes of the keys, on the host."""
    parts: tuple[Result, ...]
    """Of the tuples that hold an outlying key."""


def _goes_further(split: SplitPlan | None, tried: SplitPlan) -> bool:
    """Whether a split leaves fewer rows than one that was tried: more keys aside, a higher degree, less left out."""
    if split is None:
        return False
    own, other = ((-x.threshold, x.degree, -x.prune) for x in (split, tried))
    return own != other and all(a >= b for a, b in zip(own, other, strict=True))


def _kind_of(split: SplitPlan | None) -> str:
    """Return what is said of a split in the notes of a result."""
    assert split is not None
    pruned = " pruned" if split.prune else ""
    return f"degree {split.degree}{pruned} without {' + '.join(map(str, split.keys))} keys"


def _missed(problem: Problem, tolerance: float, check: ToleranceCheck) -> AccuracyError:
    return AccuracyError(
        f"polynomial and exact parts together miss tolerance {tolerance:g}.",
        expected=f"approximation and rounding within {tolerance:g} of the value range",
        got=str(check),
        hint=accuracy_hint(problem, check),
    )


def _with_rows(xp: Any, whole: Result, rows: Result, found: Array) -> Result:
    """Return a result with the found rows taken from another one."""
    known, other = whole.certificate, rows.certificate
    assert known is not None
    assert other is not None
    joined = {name: outliers.spread_rows(xp, getattr(other, name), found, getattr(known, name)) for name in ROW_FIELDS}
    return replace(
        whole,
        output=outliers.spread_rows(xp, rows.output, found, whole.output),
        lse=outliers.spread_rows(xp, rows.lse, found, whole.lse),
        certificate=replace(known, kind="merged", **joined),
    )


def _detached(record: Any) -> Any:
    """Return a record whose tensors have no graph: what is measured of them is a constant."""

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        return x.detach() if hasattr(x, "detach") else x

    return replace(record, **{field.name: plain(getattr(record, field.name)) for field in fields(record)})


def _as_given(given: Given, result: Result) -> Result:
    """Return a result in the leading axes of the query."""
    certificate = result.certificate
    if certificate is not None:
        certificate = certificate_as_given(given, certificate)
    return Result(as_given(given, result.output), as_given(given, result.lse), certificate, result.provenance)
