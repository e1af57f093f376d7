"""foedus: federated learning. Many parties train one model together; every party's data stays where it is.

    >>> import foedus as fd

Names are imported on first use, so that ``import foedus`` is quick and loads no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foedus import audit as audit
    from foedus import data as data
    from foedus import privacy as privacy
    from foedus.backends.private import dp_sgd as dp_sgd
    from foedus.core import attacks as attacks
    from foedus.core import poison as poison
    from foedus.core.aggregate import Aggregator as Aggregator
    from foedus.core.aggregate import mean as mean
    from foedus.core.attacks import Adversary as Adversary
    from foedus.core.budget import plan_compression as plan_compression
    from foedus.core.client import local_sgd as local_sgd
    from foedus.core.client import local_training as local_training
    from foedus.core.client import proximal as proximal
    from foedus.core.compose import Algorithm as Algorithm
    from foedus.core.compose import fedavg as fedavg
    from foedus.core.compose import fedsgd as fedsgd
    from foedus.core.drift import averaged_momentum as averaged_momentum
    from foedus.core.drift import feddyn as feddyn
    from foedus.core.drift import fednova as fednova
    from foedus.core.drift import mime_lite as mime_lite
    from foedus.core.drift import scaffold as scaffold
    from foedus.core.entropy import entropy as entropy
    from foedus.core.examples import Examples as Examples
    from foedus.core.fair import afl as afl
    from foedus.core.fair import qfedavg as qfedavg
    from foedus.core.feedback import error_feedback as error_feedback
    from foedus.core.fsvrg import fsvrg as fsvrg
    from foedus.core.gate import Gate as Gate
    from foedus.core.gate import self_checked as self_checked
    from foedus.core.layers import low_rank as low_rank
    from foedus.core.layers import matrices as matrices
    from foedus.core.layers import on_layers as on_layers
    from foedus.core.layers import power_sgd as power_sgd
    from foedus.core.lazy import lag as lag
    from foedus.core.lazy import lazy as lazy
    from foedus.core.linear import linear as linear
    from foedus.core.linear import logistic as logistic
    from foedus.core.method import Consult as Consult
    from foedus.core.method import Contribution as Contribution
    from foedus.core.method import Measure as Measure
    from foedus.core.method import Method as Method
    from foedus.core.method import Train as Train
    from foedus.core.personal import ditto as ditto
    from foedus.core.personal import fedbn as fedbn
    from foedus.core.personal import fedrep as fedrep
    from foedus.core.personal import fine_tune as fine_tune
    from foedus.core.personal import ifca as ifca
    from foedus.core.personal import local_parts as local_parts
    from foedus.core.personal import pfedme as pfedme
    from foedus.core.population import Clients as Clients
    from foedus.core.quantise import drive as drive
    from foedus.core.quantise import eden as eden
    from foedus.core.quantise import qsgd as qsgd
    from foedus.core.quantise import quantise as quantise
    from foedus.core.quantise import sign_majority as sign_majority
    from foedus.core.robust import bulyan as bulyan
    from foedus.core.robust import centred_clipping as centred_clipping
    from foedus.core.robust import collect as collect
    from foedus.core.robust import dnc as dnc
    from foedus.core.robust import fltrust as fltrust
    from foedus.core.robust import geometric_median as geometric_median
    from foedus.core.robust import krum as krum
    from foedus.core.robust import median as median
    from foedus.core.robust import multi_krum as multi_krum
    from foedus.core.robust import trimmed_mean as trimmed_mean
    from foedus.core.rotation import rotate as rotate
    from foedus.core.scores import Watch as Watch
    from foedus.core.scores import quarantine as quarantine
    from foedus.core.select import always as always
    from foedus.core.select import available as available
    from foedus.core.select import by_data as by_data
    from foedus.core.select import everybody as everybody
    from foedus.core.select import poisson as poisson
    from foedus.core.select import spaced as spaced
    from foedus.core.select import uniform as uniform
    from foedus.core.server import adagrad as adagrad
    from foedus.core.server import adam as adam
    from foedus.core.server import momentum as momentum
    from foedus.core.server import sgd as sgd
    from foedus.core.server import yogi as yogi
    from foedus.core.sparse import rand_k as rand_k
    from foedus.core.sparse import random_mask as random_mask
    from foedus.core.sparse import subsample as subsample
    from foedus.core.sparse import top_k as top_k
    from foedus.core.sparse_linear import sparse_logistic as sparse_logistic
    from foedus.core.sparse_rows import sparse_rows as sparse_rows
    from foedus.core.stage import Stage as Stage
    from foedus.core.stage import chain as chain
    from foedus.core.stage import clip as clip
    from foedus.core.structured import structured as structured
    from foedus.core.task import JaxModel as JaxModel
    from foedus.core.task import Metric as Metric
    from foedus.core.task import NumpyModel as NumpyModel
    from foedus.core.task import Task as Task
    from foedus.core.task import accuracy as accuracy
    from foedus.core.task import auroc as auroc
    from foedus.core.task import mae as mae
    from foedus.core.task import rmse as rmse
    from foedus.core.timing import asynchronous as asynchronous
    from foedus.core.timing import buffered as buffered
    from foedus.core.timing import hierarchical as hierarchical
    from foedus.core.timing import semi_synchronous as semi_synchronous
    from foedus.core.widths import heterofl as heterofl
    from foedus.net.join import Joining as Joining
    from foedus.net.join import join as join
    from foedus.net.owner.examples import ExampleStore as ExampleStore
    from foedus.net.serve import serve as serve
    from foedus.net.served import Keeping as Keeping
    from foedus.net.served import Rounds as Rounds
    from foedus.net.serving import Serving as Serving
    from foedus.privacy.claims import calibrate as calibrate
    from foedus.record.export import MLflow as MLflow
    from foedus.record.export import TensorBoard as TensorBoard
    from foedus.rounds.evaluate import Evaluation as Evaluation
    from foedus.secure.graph import Withstand as Withstand
    from foedus.secure.homomorphic import encrypted as encrypted
    from foedus.secure.homomorphic import silo_key as silo_key
    from foedus.secure.masked import masked as masked
    from foedus.sim import executors as executors
    from foedus.sim.compare import Arms as Arms
    from foedus.sim.compare import Comparison as Comparison
    from foedus.sim.compare import compare as compare
    from foedus.sim.engine import simulate as simulate
    from foedus.sim.federation import Federation as Federation
    from foedus.sim.run import Run as Run
    from foedus.sim.run import read_run as read_run
    from foedus.sim.settings import LocalCurves as LocalCurves
    from foedus.sim.settings import Settings as Settings
    from foedus.sim.sweep import Sweep as Sweep
    from foedus.sim.sweep import sweep as sweep
    from foedus.sim.world import World as World

# Where each public name lives. A test holds this table, the imports above and the reference together.
_HOMES = {
    "Adversary": "foedus.core.attacks",
    "Aggregator": "foedus.core.aggregate",
    "Algorithm": "foedus.core.compose",
    "Arms": "foedus.sim.compare",
    "Clients": "foedus.core.population",
    "Comparison": "foedus.sim.compare",
    "Consult": "foedus.core.method",
    "Contribution": "foedus.core.method",
    "Evaluation": "foedus.rounds.evaluate",
    "ExampleStore": "foedus.net.owner.examples",
    "Examples": "foedus.core.examples",
    "Federation": "foedus.sim.federation",
    "Gate": "foedus.core.gate",
    "JaxModel": "foedus.core.task",
    "Joining": "foedus.net.join",
    "Keeping": "foedus.net.served",
    "LocalCurves": "foedus.sim.settings",
    "MLflow": "foedus.record.export",
    "Measure": "foedus.core.method",
    "Method": "foedus.core.method",
    "Metric": "foedus.core.task",
    "NumpyModel": "foedus.core.task",
    "Rounds": "foedus.net.served",
    "Run": "foedus.sim.run",
    "Serving": "foedus.net.serving",
    "Settings": "foedus.sim.settings",
    "Stage": "foedus.core.stage",
    "Sweep": "foedus.sim.sweep",
    "Task": "foedus.core.task",
    "TensorBoard": "foedus.record.export",
    "Train": "foedus.core.method",
    "Watch": "foedus.core.scores",
    "Withstand": "foedus.secure.graph",
    "World": "foedus.sim.world",
    "accuracy": "foedus.core.task",
    "adagrad": "foedus.core.server",
    "adam": "foedus.core.server",
    "afl": "foedus.core.fair",
    "always": "foedus.core.select",
    "asynchronous": "foedus.core.timing",
    "auroc": "foedus.core.task",
    "available": "foedus.core.select",
    "averaged_momentum": "foedus.core.drift",
    "buffered": "foedus.core.timing",
    "bulyan": "foedus.core.robust",
    "by_data": "foedus.core.select",
    "calibrate": "foedus.privacy.claims",
    "centred_clipping": "foedus.core.robust",
    "chain": "foedus.core.stage",
    "clip": "foedus.core.stage",
    "collect": "foedus.core.robust",
    "compare": "foedus.sim.compare",
    "ditto": "foedus.core.personal",
    "dnc": "foedus.core.robust",
    "dp_sgd": "foedus.backends.private",
    "drive": "foedus.core.quantise",
    "eden": "foedus.core.quantise",
    "encrypted": "foedus.secure.homomorphic",
    "entropy": "foedus.core.entropy",
    "error_feedback": "foedus.core.feedback",
    "everybody": "foedus.core.select",
    "fedavg": "foedus.core.compose",
    "fedbn": "foedus.core.personal",
    "feddyn": "foedus.core.drift",
    "fednova": "foedus.core.drift",
    "fedrep": "foedus.core.personal",
    "fedsgd": "foedus.core.compose",
    "fine_tune": "foedus.core.personal",
    "fltrust": "foedus.core.robust",
    "fsvrg": "foedus.core.fsvrg",
    "geometric_median": "foedus.core.robust",
    "heterofl": "foedus.core.widths",
    "hierarchical": "foedus.core.timing",
    "ifca": "foedus.core.personal",
    "join": "foedus.net.join",
    "krum": "foedus.core.robust",
    "lag": "foedus.core.lazy",
    "lazy": "foedus.core.lazy",
    "linear": "foedus.core.linear",
    "local_parts": "foedus.core.personal",
    "local_sgd": "foedus.core.client",
    "local_training": "foedus.core.client",
    "logistic": "foedus.core.linear",
    "low_rank": "foedus.core.layers",
    "mae": "foedus.core.task",
    "masked": "foedus.secure.masked",
    "matrices": "foedus.core.layers",
    "mean": "foedus.core.aggregate",
    "median": "foedus.core.robust",
    "mime_lite": "foedus.core.drift",
    "momentum": "foedus.core.server",
    "multi_krum": "foedus.core.robust",
    "on_layers": "foedus.core.layers",
    "pfedme": "foedus.core.personal",
    "plan_compression": "foedus.core.budget",
    "poisson": "foedus.core.select",
    "power_sgd": "foedus.core.layers",
    "proximal": "foedus.core.client",
    "qfedavg": "foedus.core.fair",
    "qsgd": "foedus.core.quantise",
    "quantise": "foedus.core.quantise",
    "quarantine": "foedus.core.scores",
    "rand_k": "foedus.core.sparse",
    "random_mask": "foedus.core.sparse",
    "read_run": "foedus.sim.run",
    "rmse": "foedus.core.task",
    "rotate": "foedus.core.rotation",
    "scaffold": "foedus.core.drift",
    "self_checked": "foedus.core.gate",
    "semi_synchronous": "foedus.core.timing",
    "serve": "foedus.net.serve",
    "sgd": "foedus.core.server",
    "sign_majority": "foedus.core.quantise",
    "silo_key": "foedus.secure.homomorphic",
    "simulate": "foedus.sim.engine",
    "spaced": "foedus.core.select",
    "sparse_logistic": "foedus.core.sparse_linear",
    "sparse_rows": "foedus.core.sparse_rows",
    "structured": "foedus.core.structured",
    "subsample": "foedus.core.sparse",
    "sweep": "foedus.sim.sweep",
    "top_k": "foedus.core.sparse",
    "trimmed_mean": "foedus.core.robust",
    "uniform": "foedus.core.select",
    "yogi": "foedus.core.server",
}
_MODULES = {
    "attacks": "foedus.core.attacks",
    "audit": "foedus.audit",
    "data": "foedus.data",
    "executors": "foedus.sim.executors",
    "poison": "foedus.core.poison",
    "privacy": "foedus.privacy",
}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    message = f"module 'foedus' has no attribute {name!r}"
    if not name.startswith("_") and name in import_module("foedus.data").__all__:
        message += f"; it is foedus.data.{name}"
    raise AttributeError(message, name=name, obj=import_module("foedus"))  # Python adds "Did you mean ..."


def __dir__() -> list[str]:
    return __all__
