"""The errors that users meet. Each message says what happened, what was allowed and what to do next.

::

    LowRankError
    ├── ConfigError        an argument or a config file is out of range
    │   ├── BudgetError    the compression ratio can't be met
    │   └── RankError      a rank is outside its limits
    ├── ModelError         a model can't be found, read or used
    ├── TextError          a text can't be found, read or cut into windows
    ├── NumericalError     NaN, Inf or a decomposition that failed; names the layer
    ├── RunError           a run directory is missing, damaged or in use
    └── Cancelled          the user asked to stop; not a failure
"""

__all__ = [
    "BudgetError",
    "Cancelled",
    "ConfigError",
    "LowRankError",
    "ModelError",
    "NumericalError",
    "RankError",
    "RunError",
    "TextError",
]


class LowRankError(Exception):
    """Base of everything that ``lowrank_core`` raises on purpose."""


class ConfigError(LowRankError):
    """An argument or a config file is out of range."""


class BudgetError(ConfigError):
    """The compression ratio can't be met by the matrices that may be compressed."""


class RankError(ConfigError):
    """A rank is outside its limits."""


class ModelError(LowRankError):
    """A model can't be found, read or used."""


class TextError(LowRankError):
    """A text can't be found, read or cut into windows."""


class NumericalError(LowRankError):
    """NaN, Inf or a decomposition that failed; the message names the layer."""


class RunError(LowRankError):
    """A run directory is missing, damaged or in use."""


class Cancelled(LowRankError):
    """The user asked to stop."""
