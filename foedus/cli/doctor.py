"""``foedus doctor``

Executors are not guessed at by what is installed: each runs a tiny federation, in a process of its own, so that
one that crashes or hangs is a finding and not the end.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from foedus.cli.verb import Verb

if TYPE_CHECKING:
    from foedus.sim.probe import Finding

# package → (extra of ours, what for)
PACKAGES = {
    "torch": ("torch", "models written in PyTorch"),
    "jax": ("jax", "models written in JAX; the compiled executor"),
    "scikit-learn": ("data", "the bundled data sets"),
    "pandas": ("data", "data frames"),
    "matplotlib": ("report", "figures"),
    "dp-accounting": ("privacy", "privacy accounting"),
    "cryptography": ("secure", "masked sums, noise for privacy"),
    "tenseal": ("he", "encrypted sums"),
    "ray": ("ray", "the executor for clusters"),
    "tensorboard": ("tensorboard", "export"),
    "mlflow-skinny": ("mlflow", "export"),
}
SECONDS = 120.0  # that one executor may take before it counts as hanging
PROBE = (sys.executable, "-m", "foedus.sim.probe")


@click.command("doctor", cls=Verb, examples=("foedus doctor",))
def command() -> None:
    """What is installed, and what really works.

    Versions, devices, and every executor on a tiny federation; what to do about those that do not work. Exits
    with 1 if an executor fails although what it needs is installed.
    """
    from rich.console import Console

    from foedus.report.tables import show, table

    console = Console()
    show(table(installed(), title="Installed"))
    console.print()
    show(table(devices(), title="Machine"))
    console.print("\n[bold]Executors[/]  (each runs a tiny federation)")
    failed = False
    from foedus.sim.executors import BY_NAME

    for finding in examine([name for name in BY_NAME if name != "auto"]):
        failed |= not finding.works and finding.missing is None
        mark = "[green]works[/]  " if finding.works else "[yellow]does not[/]"
        console.print(f"  {finding.name:<12} {mark} ", end="")
        advice = f": pip install 'foedus[{finding.missing}]'" if finding.missing else ""
        console.print(finding.told + advice, markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise click.exceptions.Exit(1)


def installed() -> list[dict[str, Any]]:
    """One row per package: its version, or how to get it."""
    rows = [
        {"": "python", "version": platform.python_version(), "for": platform.platform()},
        {"": "foedus", "version": metadata.version("foedus"), "for": ""},
    ]
    for package, (extra, purpose) in PACKAGES.items():
        try:
            rows.append({"": package, "version": metadata.version(package), "for": purpose})
        except metadata.PackageNotFoundError:
            rows.append({"": package, "version": "-", "for": f"{purpose}: pip install 'foedus[{extra}]'"})
    return rows


def devices() -> list[dict[str, Any]]:
    """Processors, accelerators, memory, and where data is looked for."""
    from foedus.backends.cores import cores
    from foedus.data import data_folder

    rows = [{"": "processor", "what": f"{cores()} cores"}]
    for framework, names in _frameworks().items():
        gpu = "" if any("cpu" not in name for name in names) else "; it sees no GPU"
        rows.append({"": framework, "what": f"{', '.join(names)}{gpu}"})
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rows.append({"": "memory", "what": f"{size / 2**30:.1f} GiB"})
    folder = data_folder()
    there = "" if folder.is_dir() else " (made when something is downloaded)"
    rows.append({"": "data", "what": f"{folder}{there}; another: set FOEDUS_DATA"})
    return rows


def _frameworks() -> dict[str, list[str]]:
    # In a process of its own: asking takes memory on a GPU, and a broken driver may take the process down.
    try:
        asked = subprocess.run(
            [*PROBE, "devices"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
        found: dict[str, list[str]] = json.loads(asked.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        return {}
    return found


# --- executors ----------------------------------------------------------------------------------------------


def examine(names: Sequence[str]) -> Iterator[Finding]:
    """Run a tiny job in every executor; if one takes the process down, go on after it in a new one."""
    left = list(names)
    while left:
        for finding in _examined(tuple(left)):
            left.remove(finding.name)
            yield finding


def _examined(names: Sequence[str]) -> Iterator[Finding]:
    """The findings of one process, up to one that it did not survive."""
    from foedus.sim.probe import Finding

    process = subprocess.Popen([*PROBE, *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        for name in names:
            line = _line(process, SECONDS)
            if line is None:
                yield Finding(name, False, f"took longer than {SECONDS:.0f} s and was stopped")
                return
            if not line:
                process.wait()
                yield Finding(name, False, f"its process ended by itself (exit code {process.returncode})")
                return
            yield Finding(**json.loads(line))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _line(process: subprocess.Popen[str], seconds: float) -> str | None:
    """The process' next line; empty at its end, None if it takes too long."""
    found: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda stream: found.append(stream.readline()), args=(process.stdout,))
    reader.start()
    reader.join(seconds)
    if reader.is_alive():
        process.kill()  # ends the reader, too
        reader.join()
        return None
    return found[0]
