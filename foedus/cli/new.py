"""``foedus new``"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from foedus.cli.verb import Verb
from foedus.errors import ConfigurationError
from foedus.record import files

_NAMES = {"federation.py": "federation.py", "README.md": "README.md", "gitignore": ".gitignore"}


@click.command("new", cls=Verb, examples=("foedus new my_project", "foedus new work/second"))
@click.argument("name")
def command(name: str) -> None:
    """Make a small project to start from.

    A folder NAME with a model, ten clients and an algorithm. It runs at once and offline, on handwritten digits
    that come with scikit-learn.
    """
    if not name.strip():
        raise ConfigurationError("a project needs a name: foedus new my_project")
    make(Path(name))
    click.echo(f"made {name}: {', '.join(_NAMES.values())}")
    click.echo("next:")
    click.echo(f"  cd {name}")
    click.echo("  foedus simulate federation.py")
    click.echo("  foedus compare federation.py")


def make(folder: Path) -> None:
    """Write the template's files.

    Raises:
        ConfigurationError: there is something in the folder already.
        StorageError: it cannot be written.
    """
    if strangers := [p for p in folder.parents if p.exists() and not p.is_dir()]:
        raise ConfigurationError(f"{folder} cannot be made, because {strangers[0]} is a file; choose another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is not empty; choose another name")
    template = resources.files("foedus.cli") / "template"
    with files.storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for source, target in _NAMES.items():
        text = (template / source).read_text("utf-8").replace("NAME", _shown(folder.resolve().name))
        files.replace(folder / target, text.encode())


def _shown(name: str) -> str:
    """A name that may stand in a docstring: without what would end it."""
    return "".join(c if c.isprintable() and c not in '"\\' else "_" for c in name)
