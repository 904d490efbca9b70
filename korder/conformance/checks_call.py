"""C1, second half: how a kernel behaves as a function: results, purity, memory, threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.checks_gradient import differentiable, upstream
from korder.conformance.claims import Claims, everything, inside_masks, shifted
from korder.conformance.limits import MEMORY_RATIO, agree, as_dtype, require, same_bits
from korder.conformance.records import Check, UnverifiedError
from korder.conformance.subject import Found, Subject, named_gradients
from korder.spi import NEEDS, KernelOutput, Operands

Array = Any
THREADS = 8
CALLS = 2
SWITCH_SECONDS = 1e-5
SLACK = 64.0
"""Repeated results may be summed in another order, on other hardware by other threads; in relation limits."""


def accepts(subject: Subject, case: Case) -> None:
    """A claimed problem is not refused; `plan` raises if it is."""
    subject.plan(case)


def returns_results(subject: Subject, case: Case) -> None:
    """Shapes, dtypes, and what is kept."""
    rows = case.query.shape[:3]
    kernel = subject.kernel(case)
    for save in (False, True):
        found = subject.forward(case, kernel=kernel, save=save)
        shapes = {"output": (*rows, case.values[0].shape[3]), "lse": rows}
        wanted = {"output": (case.dtype,), "lse": ("float32", "float64")}
        polynomial = case.plan().polynomial
        if polynomial is not None:
            shapes |= {"normaliser": rows, "magnitude": rows, "moments": (*rows, polynomial.degree + 1)}
            wanted |= dict.fromkeys(("normaliser", "magnitude", "moments"), ("float32", "float64"))
        for name, shape in shapes.items():
            array = getattr(found, name)
            require(array is not None, f"{name} is missing.", expected=str(shape), got="None")
            require(array.shape == shape, f"{name} has the wrong shape.", expected=str(shape), got=str(array.shape))
            dtype = found.dtypes[name]
            require(
                dtype in wanted[name], f"{name} has the wrong dtype.", expected=" or ".join(wanted[name]), got=dtype
            )
        kept = found.raw.residuals
        require(save or kept is None, "nothing is kept unless asked.", expected="residuals None", got=repr(type(kept)))


def leaves_inputs(subject: Subject, case: Case) -> None:
    """Operands, upstream gradients and saved results are as before, bit for bit."""
    kernel, operands = subject.kernel(case), subject.operands(case)
    with np.errstate(all="ignore"):
        raw = kernel.forward(operands, save=True)
        _unchanged(subject, case, operands)
        if not differentiable(subject.claims, case.spec.method.kind):
            return
        found, pair = subject.read(raw), upstream(case)
        grads = subject.upstream(case, found, *pair)
        kernel.backward(operands, raw, grads, needs=NEEDS)
    _unchanged(subject, case, operands)
    same_bits("the gradient of output", subject.arrays.numpy(grads.output), pair[0])
    same_bits("the gradient of lse", subject.arrays.numpy(grads.lse), pair[1])
    same_bits("the saved output", subject.arrays.numpy(raw.output), found.output)
    same_bits("the saved lse", subject.arrays.numpy(raw.lse), found.lse)


def _unchanged(subject: Subject, case: Case, operands: Operands) -> None:
    before = case.arrays()
    for name, array in _named_operands(operands).items():
        same_bits(name, subject.arrays.numpy(array), before[name])


def _named_operands(operands: Operands) -> dict[str, Array]:
    named = {"query": operands.query}
    for name in ("keys", "values", "biases", "key_masks"):
        named |= {f"{name}[{t}]": x for t, x in enumerate(getattr(operands, name)) if x is not None}
    weight = operands.weight
    named |= {f"weight[{t}]": x for t, x in enumerate(weight)} if isinstance(weight, tuple) else {"weight": weight}
    return {name: x for name, x in named.items() if x is not None}


def owns_results(subject: Subject, case: Case) -> None:
    """No result lies in the memory of an operand, nor a gradient in that of another or of an upstream gradient."""
    kernel, operands = subject.kernel(case), subject.operands(case)
    inputs = _named_operands(operands)
    with np.errstate(all="ignore"):
        raw = kernel.forward(operands, save=True)
        results = _named_results(raw)
        _apart(subject, results, inputs)
        if not differentiable(subject.claims, case.spec.method.kind):
            return
        grads = subject.upstream(case, subject.read(raw), *upstream(case))
        found = named_gradients(kernel.backward(operands, raw, grads, needs=NEEDS))
    given = {"the gradient of output": grads.output, "the gradient of lse": grads.lse}
    _apart(subject, {f"the gradient of {name}": x for name, x in found.items()}, inputs | results | given)


def _named_results(raw: KernelOutput) -> dict[str, Array]:
    names = ("output", "lse", "normaliser", "moments", "magnitude")
    return {name: getattr(raw, name) for name in names if getattr(raw, name) is not None}


def _apart(subject: Subject, results: dict[str, Array], inputs: dict[str, Array]) -> None:
    for name, result in results.items():
        for other, given in inputs.items():
            require(
                not subject.arrays.shares_memory(result, given),
                f"{name} lies in the memory of {other}.",
                expected="memory of its own",
                got="shared memory",
            )


def repeats(subject: Subject, case: Case) -> None:
    """The same call gives the same result, whatever was called in between, saved or not."""
    kernel = subject.kernel(case)
    first = subject.forward(case, kernel=kernel)
    other = _other_numbers(case, 1)
    subject.forward(other, kernel=kernel, save=True)
    if differentiable(subject.claims, case.spec.method.kind):
        subject.backward(other, *upstream(other))
    for save in (False, True):
        _equal(case, subject.forward(case, kernel=kernel, save=save), first)


def _other_numbers(case: Case, shift: int) -> Case:
    """Return a case with the same shapes, and so the same plan, but other numbers."""
    turned = as_dtype(np.roll(case.query, shift, axis=2) * (1.0 - 0.125 * (shift % 4)), case.dtype)
    values = tuple(np.roll(value, shift, axis=3) for value in case.values)
    return replace(case, query=turned, values=values)


def _equal(case: Case, found: Found, wanted: Found) -> None:
    agree("output", found.output, wanted.output, dtype=case.dtype, slack=SLACK)
    agree("lse", found.lse, wanted.lse, dtype=case.good_to(wanted.dtypes["lse"]), slack=SLACK)


def serves_threads(subject: Subject, case: Case) -> None:
    """One kernel called from eight threads gives each its own result."""
    kernel = subject.kernel(case)
    cases = [_other_numbers(case, thread) for thread in range(THREADS)]
    wanted = [subject.forward(each, kernel=kernel) for each in cases]
    operands = [subject.operands(each) for each in cases]
    results: list[list[KernelOutput]] = [[] for _ in cases]
    failures: list[BaseException] = []
    together = threading.Barrier(THREADS)

    def call(thread: int) -> None:
        try:
            together.wait()
            for _ in range(CALLS):
                with np.errstate(all="ignore"):
                    results[thread].append(kernel.forward(operands[thread], save=False))
        except BaseException as error:
            failures.append(error)

    with _eager_switching():
        threads = [threading.Thread(target=call, args=(thread,)) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    for own, expected in zip(results, wanted, strict=True):
        for raw in own:
            _equal(case, subject.read(raw), expected)


@contextmanager
def _eager_switching() -> Iterator[None]:
    """Let Python change threads often, so that shared state shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def keeps_to_workspace(subject: Subject, case: Case) -> None:
    """A forward holds at most a fifth more than `workspace_bytes` beyond its inputs and outputs."""
    kernel, operands = subject.kernel(case), subject.operands(case)
    declared = getattr(kernel, "workspace_bytes", None)
    if declared is None:
        raise UnverifiedError("the kernel declares no workspace_bytes")
    require(isinstance(declared, int) and declared >= 0, "workspace_bytes counts bytes.", expected="an int, 0 or more",
            got=repr(declared))  # fmt: skip
    with np.errstate(all="ignore"):

        def call() -> list[Array]:
            return list(_named_results(kernel.forward(operands, save=False)).values())

        measured = subject.arrays.peak_bytes(call)
    require(
        measured <= MEMORY_RATIO * declared,
        "a forward takes more memory than the kernel declares.",
        expected=f"at most {MEMORY_RATIO:g} x workspace_bytes = {MEMORY_RATIO * declared:.0f}",
        got=f"{measured} bytes, {measured / max(declared, 1):.2f} x",
    )


def _claimed(claims: Claims) -> Iterable[Case]:
    """Yield one problem for each mask and order that is claimed of a method, plain and with all that is claimed."""
    for method in claims.methods():
        for mask in claims.masks(method):
            for order in claims.orders():
                yield claims.case("claimed", order, method=method, mask=mask)
                if order < 4:
                    yield claims.case("all claimed", order, method=method, mask=mask, **everything(claims, method))


def _results(claims: Claims) -> Iterable[Case]:
    for method in claims.methods():
        for dtype in claims.dtypes:
            for order in claims.orders(1, 2, 3) if claims.accumulates(dtype) else ():
                yield claims.case("result", order, method=method, mask=inside_masks(claims, method)[0], dtype=dtype)


def _calls(claims: Claims) -> Iterable[Case]:
    for method in claims.methods():
        for mask in inside_masks(claims, method):
            for order in claims.orders(1, 2, 3) if method == "exact" or claims.full else claims.orders(2):
                yield claims.case("call", order, method=method, mask=mask, **everything(claims, method))
        for dtype in claims.dtypes[1:]:
            for order in claims.orders(2) if claims.accumulates(dtype) else ():
                yield claims.case("call", order, method=method, mask=inside_masks(claims, method)[0], dtype=dtype)


def _small(claims: Claims) -> Iterable[Case]:
    """Yield problems so small that a result could be an operand itself."""
    yield from _calls(claims)
    for method in claims.methods():
        for order in claims.orders(1, 2):
            sizes: dict[str, Any] = {"queries": 1, "lengths": (1, 1), "heads": 2, "groups": 2, "batch": 1}
            yield claims.case("one of each", order, method=method, mask=inside_masks(claims, method)[0], **sizes)


def _busy(claims: Claims) -> Iterable[Case]:
    for method in claims.methods():
        for order in claims.orders(2):
            for mask in inside_masks(claims, method):
                sizes: dict[str, Any] = {"batch": 1, "heads": 2, "queries": 7, "small_blocks": True}
                yield claims.case("threads", order, method=method, mask=mask, **sizes)


def _large(claims: Claims) -> Iterable[Case]:
    for method in claims.methods():
        width = 16 if method == "exact" else 8
        sizes: dict[str, Any] = {"batch": 1, "heads": 2, "query_width": width, "value_width": 16}
        for mask in inside_masks(claims, method):
            for order, lengths in ((1, (1031,)), (2, (257, 131)), (3, (61, 31, 13))):
                queries = 1021 if order == 1 else 61
                for known in claims.orders(order):
                    offsets = shifted(mask, query_offset=999)
                    yield claims.case("memory", known, method=method, mask=mask, queries=queries, lengths=lengths,
                                      **sizes, **offsets)  # fmt: skip


CHECKS = (
    Check("C1.7", "contract.accepts", "What is claimed is not refused, one by one and together.", accepts, _claimed,
          static=True),
    Check("C1.8", "contract.result", "Results have the contract's shapes and dtypes; nothing is kept unless asked.",
          returns_results, _results, level="core"),
    Check("C1.9", "contract.inputs", "Operands, upstream gradients and saved results are never changed.", leaves_inputs,
          _calls),
    Check("C1.10", "contract.alias", "No result lies in the memory of an operand.", owns_results, _small),
    Check("C1.11", "contract.repeat", "A call gives what it gave before, whatever ran in between.", repeats, _calls),
    Check("C1.12", "contract.threads", "One kernel serves eight threads at once.", serves_threads, _busy),
    Check("C1.13", "contract.workspace", "Memory stays within a fifth above the declared workspace_bytes.",
          keeps_to_workspace, _large),
)  # fmt: skip
