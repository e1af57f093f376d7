"""First weights of a run: fresh ones, or a warm start from trained ones."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foedus.backends import Trainer, Weights
from foedus.errors import ConfigurationError
from foedus.record.versions import versions as installed
from foedus.tree import Layout, Vector, leaves


def weights(given: Any, trainer: Trainer) -> Weights:
    """The weights to start from.

    Args:
        given: ``None`` for fresh ones; else a torch module, a (nested) mapping of arrays, or a path of a
            safetensors file. Buffers that are missing keep their fresh values.

    Raises:
        ConfigurationError: a parameter is missing, or has another shape, or is not finite.
    """
    fresh = trainer.initial()
    if given is None:
        return fresh
    named = _named(given)
    vector = _filled(trainer.layout, named, None)
    if not np.isfinite(vector).all():
        name = trainer.layout.name_at(int(np.argmin(np.isfinite(vector))))
        raise ConfigurationError(f"the weights to start from are not finite: {name!r}")
    return Weights(vector, _filled(trainer.buffer_layout, named, fresh.buffers))


def _filled(layout: Layout, named: Mapping[str, Any], default: Vector | None) -> Vector:
    missing = [n for n in layout.names if n not in named]
    if missing and default is None:
        there = ", ".join(list(named)[:8])
        raise ConfigurationError(f"the weights to start from lack {', '.join(missing[:5])}; they have: {there}")
    values = {} if default is None else layout.unflatten(default)
    return layout.flatten({n: named[n] if n in named else values[n] for n in layout.names})


def _named(given: Any) -> dict[str, Any]:
    if isinstance(given, str | Path):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(given))
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"no weights could be read from {given}: {error}") from error
    if hasattr(given, "state_dict"):
        given = {name: tensor.detach().cpu().numpy() for name, tensor in given.state_dict().items()}
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            "Settings(start=...) takes a torch module, a mapping of names to arrays or a path; not "
            f"{type(given).__name__}"
        )
    return dict(leaves(given))


def describe(given: Any) -> str:
    """A digest of the weights to start from, so that a resumed run can tell."""
    if given is None:
        return "fresh"
    digest = hashlib.sha256()
    for name, array in sorted(_named(given).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {**installed(), "system": platform.system()}
