"""How docstrings are read for the reference: what our sources write is turned into what mkdocstrings knows.

Example:                          →  Examples: (else doctests would be shown as quotations)
:class:`~foedus.core.task.Task`   →  `Task`
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Dialect(griffe.Extension):
    """Loaded by mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
