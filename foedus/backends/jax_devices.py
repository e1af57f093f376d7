"""Which devices jax computes on, and where it keeps compiled programs: jax's own state, set in one place.

Jax fixes the number of CPU devices when it is first used in a process, so :func:`devices` comes before
everything else that uses jax.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import jax

from foedus.backends.cores import cores

__all__ = ["cpu_devices", "devices", "keep_programs"]


def devices(wanted: str | None = None) -> list[Any]:
    """The devices to compute on: the GPUs if jax sees any, else one CPU device per core.

    Args:
        wanted: ``"cpu"``, or another platform's name such as ``"cuda"``; ``None`` chooses.
    """
    if wanted is not None and not wanted.startswith("cpu"):
        return list(jax.devices(wanted.split(":")[0]))
    own = cpu_devices()  # before jax is used: their number is fixed then
    return own if wanted is not None or jax.default_backend() == "cpu" else list(jax.devices())


def cpu_devices(count: int | None = None) -> list[Any]:
    """One device per core, or ``count`` devices, of the CPU.

    Jax fixes their number when it is first used in a process. If that was before, or the user has set the
    number, the devices are those there are, perhaps one.
    """
    wanted = count or cores()
    if jax.config.jax_num_cpu_devices < 1:  # the user has not said how many
        with suppress(RuntimeError):  # jax has been used already
            jax.config.update("jax_num_cpu_devices", wanted)
    return list(jax.devices("cpu")[:wanted])


def keep_programs() -> None:
    """Keep compiled programs between processes, unless the user has said where or how."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    import platformdirs
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(platformdirs.user_cache_path("foedus") / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # what jax concluded from having no folder is out of date
