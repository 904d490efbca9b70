"""The one hook that a plugin implements."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from korder.spi.backend import Backend

PROJECT = "korder"
ENTRY_POINT_GROUP = "korder.backends"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def korder_backends() -> Sequence[Backend]:
    """Return the backends of this plugin. Cheap: must not import a framework."""
    return ()
