"""The polynomial state: k r (e + 1) sums for each key head, whatever the number of keys, and certified readings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

from array_api_compat import device

from korder.decoding.degrees import fixed_method
from korder.decoding.state import DecodeState, changed_spec
from korder.decoding.tokens import TokenLayout, Tokens
from korder.dispatch.prepare import Prepared, prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.run import Outcome
from korder.errors import AccuracyError, AccuracyWarning
from korder.methods.certificates import certificate_of
from korder.methods.state_evidence import evidence_of_state, is_finite, value_references
from korder.methods.states import ModeState, State
from korder.methods.tolerances import ToleranceCheck, check_parts
from korder.planning.polynomial import CHUNKS
from korder.problem import ITEM_BYTES, Problem
from korder.result import Certificate, Provenance
from korder.spec import AttentionSpec, Full, Polynomial

Array = Any
_ARRAYS = tuple(field.name for field in fields(ModeState) if field.name not in ("length", "joins"))


@dataclass(frozen=True, eq=False)
class PolynomialState(DecodeState):
    """Sums over keys in float64. One plan serves every token, because nothing in it depends on the number of keys."""

    spec: AttentionSpec
    layout: TokenLayout
    method: Polynomial
    """The method with its degree and interval fixed, and no tolerance: what the plan is made of."""
    modes: State

    @classmethod
    def empty(
        cls, spec: AttentionSpec, layout: TokenLayout, tokens: Tokens, query_bound: float | None
    ) -> PolynomialState:
        """Return the state of no keys.

        Raises:
            UnsupportedProblemError, SpecError, AccuracyError: As `fixed_method`.
        """
        made = cls(spec, layout, fixed_method(spec, layout, tokens, query_bound), ())
        return replace(made, modes=made.prepared.kernel.states().empty(device(tokens.keys[0])))  # type: ignore[attr-defined]

    @cached_property
    def problem(self) -> Problem:
        """The problem whose plan serves every token: a block of tokens of every mode, summed in float64."""
        layout, order = self.layout, self.spec.order
        policy = self.spec.policy.model_copy(update={"precision": "float64"})
        return Problem(
            spec=changed_spec(self.spec, mask=Full(), method=self.method, policy=policy),
            batch=layout.batch,
            heads=layout.groups,
            groups=layout.groups,
            queries=1,
            lengths=(CHUNKS[0],) * order,
            query_width=layout.width,
            key_widths=(layout.width,) * order,
            value_width=layout.value_width,
            dtype=layout.dtype,
            device=layout.device,
            biases=(None,) * order,
            key_masks=(True,) * order,
        )

    @cached_property
    def prepared(self) -> Prepared:
        """The plan and its kernel, from the cache of the registry but for the first state of its kind."""
        return prepare(default_registry(), self.problem, self.layout.kind, state=True)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each mode, masked ones counted."""
        return tuple(mode.length for mode in self.modes)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and statistics."""
        arrays = [getattr(mode, name) for mode in self.modes for name in _ARRAYS]
        return ITEM_BYTES["float64"] * sum(int(prod(array.shape)) for array in arrays)

    def extended(self, tokens: Tokens) -> PolynomialState:
        """Return the state with more tokens."""
        states = self.prepared.kernel.states()  # type: ignore[attr-defined]
        modes = states.extend(self.modes, tokens.keys, tokens.values, tokens.key_masks)
        return self._with_modes(modes)

    def _with_modes(self, modes: State) -> PolynomialState:
        changed = replace(self, modes=modes)
        # what depends on the spec alone goes along, so that a token plans nothing
        vars(changed).update(problem=self.problem, prepared=self.prepared)
        return changed

    def answer(self, query: Array, *, certify: bool) -> Outcome:
        """Return what queries (b, h, n, d) read, certified if that is asked for or a tolerance is to be kept.

        Raises:
            AccuracyError: The certificate misses the tolerance, or the polynomial sums to no positive number.
        """
        selection, kernel = self.prepared.selection, self.prepared.kernel
        states, tolerance = kernel.states(), self._wanted.tolerance  # type: ignore[attr-defined]
        output = states.read(self.modes, query)
        provenance = Provenance(selection.backend.name, selection.plan, selection.rejected)
        if tolerance is None and not certify:
            return Outcome(output, None, provenance, self.prepared)
        xp = self.layout.namespace
        evidence = evidence_of_state(xp, selection.plan, self.modes, query, output)
        unit = kernel.rounding_unit  # type: ignore[attr-defined]
        certificate = certificate_of(xp, selection.plan, evidence, output, unit)
        if tolerance is not None:
            self._require(self._check(query, certificate, tolerance))
        return Outcome(output, certificate, provenance, self.prepared)

    @property
    def _wanted(self) -> Polynomial:
        method = self.spec.polynomial
        assert method is not None
        return method

    def _check(self, query: Array, certificate: Certificate, tolerance: float) -> ToleranceCheck:
        xp = self.layout.namespace
        finite = bool(xp.all(xp.isfinite(query))) and is_finite(xp, self.problem, self.modes)
        references = value_references(xp, self.problem, self.modes, query.shape[1])
        return check_parts(xp, certificate, references, finite, tolerance)

    def _require(self, check: ToleranceCheck) -> None:
        """Raise or warn where a tolerance is missed; the keys are gone, so no other plan can take its place."""
        if check.met:
            return
        missed = f"the polynomial of degree {self.method.degree} misses the tolerance {self._wanted.tolerance:g}"
        if self._wanted.on_exceed == "warn":
            warnings.warn(f"{missed}: {check}", AccuracyWarning, stacklevel=5)
            return
        raise AccuracyError(
            f"{missed} at these queries.",
            expected=f"approximation and rounding within {self._wanted.tolerance:g} of the value range",
            got=str(check),
            hint="prefill with a higher degree or a larger tolerance, or with method Exact().",
        )

    def contents(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the arrays of every mode, and what they were made with."""
        arrays = {f"{name}_{t}": getattr(mode, name) for t, mode in enumerate(self.modes) for name in _ARRAYS}
        counts = {"lengths": list(self.lengths), "joins": [mode.joins for mode in self.modes]}
        return arrays, {"method": self.method.model_dump(mode="json"), **counts}

    @classmethod
    def restored(
        cls, spec: AttentionSpec, layout: TokenLayout, arrays: Mapping[str, Array], values: Mapping[str, Any]
    ) -> PolynomialState:
        """Return the state that `contents` described."""
        made = cls(spec, layout, Polynomial.model_validate(values["method"]), ())
        modes = tuple(
            ModeState(
                **{name: arrays[f"{name}_{t}"] for name in _ARRAYS},
                length=int(values["lengths"][t]),
                joins=int(values["joins"][t]),
            )
            for t in range(spec.order)
        )
        return replace(made, modes=modes)

    @classmethod
    def described(
        cls, spec: AttentionSpec, layout: TokenLayout, values: Mapping[str, Any]
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of every array of `contents`."""
        made = cls(spec, layout, Polynomial.model_validate(values["method"]), ())
        shapes = made.prepared.kernel.states().shapes()  # type: ignore[attr-defined]
        return {f"{name}_{t}": (shapes[name], "float64") for t in range(spec.order) for name in _ARRAYS}
