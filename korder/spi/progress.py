"""Where a kernel that takes long says how far it is: a listener of the running call, not of the shared kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

PROGRESS: ContextVar[Callable[[float], None] | None] = ContextVar("korder_progress", default=None)
"""Told the share of the work that is done, 0 to 1, from the thread that runs the kernel; None = nobody listens."""
