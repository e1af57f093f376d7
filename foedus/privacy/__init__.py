"""Differential privacy: mechanisms, what may be claimed for them, and the ledger of what was spent.

A mechanism (:func:`central`, :func:`adaptive`, :func:`local`, :func:`gaussian_shares`, ...) says what ran, as an
*event*; an accountant (:func:`rdp`, :func:`pld`) says what events are worth together; a :class:`Ledger` counts them,
and a :class:`Budget` ends a run before it would be exceeded. Pure: nothing here reads files or clocks.

Not here: secure aggregation, noise on single examples within a client's training.
"""

from foedus.privacy.accounting import pld, rdp
from foedus.privacy.blt import buffered_toeplitz
from foedus.privacy.claims import Plan, Point, calibrate, curve, example_epsilon, round_event
from foedus.privacy.distributed import gaussian_shares, skellam_shares, trusted_sum
from foedus.privacy.events import (
    BandedStream,
    Concentrated,
    Gaussian,
    LocalGaussian,
    Neighbours,
    Sampled,
    SharedGaussian,
    SharedSkellam,
    ToeplitzStream,
    Tree,
    TreeStream,
    trusted,
)
from foedus.privacy.ledger import Budget, Ledger, allows, charged, ledger_json, of_ledger_json, spent
from foedus.privacy.mechanisms import adaptive, central, local
from foedus.privacy.noise import keyed, known_to_all_who_know_the_seed, system
from foedus.privacy.strategies import Strategy, banded, noise_matrix, prefix_error, tree
from foedus.privacy.streams import correlated

__all__ = [
    "BandedStream", "Budget", "Concentrated", "Gaussian", "Ledger", "LocalGaussian", "Neighbours", "Plan",
    "Point", "Sampled", "SharedGaussian", "SharedSkellam", "Strategy", "ToeplitzStream", "Tree", "TreeStream",
    "adaptive", "allows", "banded", "buffered_toeplitz", "calibrate", "central", "charged", "correlated",
    "curve", "example_epsilon", "gaussian_shares", "keyed", "known_to_all_who_know_the_seed", "ledger_json",
    "local", "noise_matrix", "of_ledger_json", "pld", "prefix_error", "rdp", "round_event", "skellam_shares",
    "spent", "system", "tree", "trusted", "trusted_sum",
]  # fmt: skip
