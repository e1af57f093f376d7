"""Working attacks, run against the defences of foedus itself and, by ``foedus audit``, against a user's run.

``foedus.audit(federation)`` attacks a federation and reports (``examine.py``). The attacks by themselves are functions
of what an attacker has: a :class:`~foedus.audit.seen.Seen` update (``invert``, ``infer_property``, ``disaggregate``),
models of every round (``Impostor``, canaries), or the final model (``by_loss``, ``by_likelihood_ratio``, ``imagine``).

Attacks on what is learnt rather than on privacy (poisoning, backdoors) are in ``foedus.attacks`` and ``foedus.poison``.

Names are imported on use: importing this package loads no framework.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from foedus.audit.canaries import Empirical as Empirical
    from foedus.audit.canaries import Lookout as Lookout
    from foedus.audit.canaries import empirical as empirical
    from foedus.audit.canaries import in_final_model as in_final_model
    from foedus.audit.canaries import in_messages as in_messages
    from foedus.audit.canaries import told_apart as told_apart
    from foedus.audit.canaries import with_canaries as with_canaries
    from foedus.audit.disaggregation import Disaggregated as Disaggregated
    from foedus.audit.disaggregation import disaggregate as disaggregate
    from foedus.audit.examine import Audit as Audit
    from foedus.audit.examine import audit as audit
    from foedus.audit.gan import Aim as Aim
    from foedus.audit.gan import Impostor as Impostor
    from foedus.audit.inversion import Inversion as Inversion
    from foedus.audit.inversion import Inverted as Inverted
    from foedus.audit.inversion import Knowledge as Knowledge
    from foedus.audit.inversion import cosine as cosine
    from foedus.audit.inversion import dlg as dlg
    from foedus.audit.inversion import idlg as idlg
    from foedus.audit.inversion import invert as invert
    from foedus.audit.membership import Membership as Membership
    from foedus.audit.membership import by_likelihood_ratio as by_likelihood_ratio
    from foedus.audit.membership import by_loss as by_loss
    from foedus.audit.membership import scored as scored
    from foedus.audit.model_inversion import Imagined as Imagined
    from foedus.audit.model_inversion import imagine as imagine
    from foedus.audit.parts import Effort as Effort
    from foedus.audit.properties import Played as Played
    from foedus.audit.properties import infer_property as infer_property
    from foedus.audit.quality import Judged as Judged
    from foedus.audit.quality import judge as judge
    from foedus.audit.seen import Seen as Seen
    from foedus.audit.seen import Victim as Victim
    from foedus.audit.seen import look as look
    from foedus.audit.uploads import Uploaded as Uploaded
    from foedus.audit.uploads import intercept as intercept
    from foedus.sim.federation import Federation

_HOMES = {
    "Aim": "gan",
    "Audit": "examine",
    "Disaggregated": "disaggregation",
    "Effort": "parts",
    "Empirical": "canaries",
    "Imagined": "model_inversion",
    "Impostor": "gan",
    "Inversion": "inversion",
    "Inverted": "inversion",
    "Judged": "quality",
    "Knowledge": "inversion",
    "Lookout": "canaries",
    "Membership": "membership",
    "Played": "properties",
    "Seen": "seen",
    "Uploaded": "uploads",
    "Victim": "seen",
    "audit": "examine",
    "by_likelihood_ratio": "membership",
    "by_loss": "membership",
    "cosine": "inversion",
    "disaggregate": "disaggregation",
    "dlg": "inversion",
    "empirical": "canaries",
    "idlg": "inversion",
    "imagine": "model_inversion",
    "in_final_model": "canaries",
    "in_messages": "canaries",
    "infer_property": "properties",
    "intercept": "uploads",
    "invert": "inversion",
    "judge": "quality",
    "look": "seen",
    "scored": "membership",
    "told_apart": "canaries",
    "with_canaries": "canaries",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = f"foedus.audit.{_HOMES[name]}"
        try:
            found = getattr(import_module(home), name)
        except ModuleNotFoundError as error:
            from foedus.errors import MissingExtra

            if error.name is None or error.name.partition(".")[0] != "torch":
                raise
            raise MissingExtra("torch", "torch", f"foedus.audit.{name}") from error
        globals()[name] = found
        return found
    raise AttributeError(f"module 'foedus.audit' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return __all__


class _Callable(ModuleType):
    """This package, called: ``foedus.audit(federation)``.

    The verb has the package's name, and Python puts a package that was imported in the place of any function of that
    name. Type checkers do not know callable modules; for them the verb is ``foedus.audit.audit``.
    """

    def __call__(self, federation: Federation, *, run: str | Path | None = None, effort: Effort | None = None) -> Audit:
        from foedus.audit.examine import audit

        return audit(federation, run=run, effort=effort)


sys.modules[__name__].__class__ = _Callable
