"""What the backend claims follows the JAX it runs in, and asking it imports no jax."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from reference import random_case

import korder
from korder.errors import UnsupportedProblemError
from korder_jax.backend import JaxBackend


def test_it_claims_the_devices_that_xla_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert JaxBackend().capabilities().devices == {"cpu"}
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu")])
    assert JaxBackend().capabilities().devices == {"cpu", "tpu"}


def test_float64_is_refused_by_the_name_of_its_switch() -> None:
    plan = random_case(2).plan()
    assert not JaxBackend().unsupported_reasons(plan)
    with jax.enable_x64(False):
        (reason,) = JaxBackend().unsupported_reasons(plan)
    assert (reason.what, reason.got) == ("dtype", "float64")
    assert reason.supported == "bfloat16, float16, float32; float64 once jax_enable_x64 is on"


def test_claims_are_made_without_importing_jax() -> None:
    program = (
        "import sys, korder_jax\n"
        "(backend,) = korder_jax.korder_backends()\n"
        "assert backend.availability().available\n"
        "assert 'float32' in backend.capabilities().dtypes\n"
        "print('jax' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, "False"), run.stderr


def test_the_closed_form_of_the_gradient_is_refused() -> None:
    polynomial = korder.Polynomial(degree=2, gradient="closed_form")
    case = random_case(2, method=polynomial)
    (reason,) = JaxBackend().unsupported_reasons(case.plan())
    assert str(reason) == "gradient=closed_form (supported: consistent)"
    with pytest.raises(UnsupportedProblemError, match=r"gradient=closed_form \(supported: consistent\)"):
        korder.attend(jnp.asarray(case.query), tuple(map(jnp.asarray, case.keys)),
                      tuple(map(jnp.asarray, case.values)), spec=case.spec)  # fmt: skip
