# The public names, and where each is from: __init__.py loads them from there when they are used.

from . import initializers, testing, theory
from .core.configurations import (
    CompareConfig,
    DiagnoseConfig,
    PhaseConfig,
    RatesConfig,
    ReproduceConfig,
    TrainabilityConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from .errors import (
    DataError,
    GivenUpError,
    InitflowError,
    OutageError,
    OutboxError,
    PluginError,
    ReplayError,
    ReportError,
    SettingError,
    StudyError,
    TrackingError,
    VerdictError,
    WorkError,
)
from .experiments.comparisons.compare import compare
from .experiments.comparisons.rates import rates
from .experiments.comparisons.reproduce import reproduce
from .experiments.comparisons.trainability import trainability
from .experiments.logged.compare_runs import compare_runs
from .experiments.logged.read import read
from .experiments.train import train
from .experiments.tuning.tune import tune
from .experiments.untrained.diagnose import diagnose
from .experiments.untrained.initialize import initialize
from .experiments.untrained.inspect import inspect
from .experiments.untrained.phase import phase
from .experiments.verify import export, verify
from .initializers.scheme import initializer
from .tracking.watching.callbacks import lightning_callback, transformers_callback
from .tracking.watching.watch import watch

__version__: str

__all__ = [
    "CompareConfig",
    "DataError",
    "DiagnoseConfig",
    "GivenUpError",
    "InitflowError",
    "OutageError",
    "OutboxError",
    "PhaseConfig",
    "PluginError",
    "RatesConfig",
    "ReplayError",
    "ReportError",
    "ReproduceConfig",
    "SettingError",
    "StudyError",
    "TrackingError",
    "TrainConfig",
    "TrainabilityConfig",
    "TuneConfig",
    "VerdictError",
    "VerifyConfig",
    "WorkError",
    "compare",
    "compare_runs",
    "diagnose",
    "export",
    "initialize",
    "initializer",
    "initializers",
    "inspect",
    "lightning_callback",
    "phase",
    "rates",
    "read",
    "reproduce",
    "testing",
    "theory",
    "train",
    "trainability",
    "transformers_callback",
    "tune",
    "verify",
    "watch",
]
