"""Configs: frozen values, validated when built, with conversion to and from JSON.

::

    sources      model and text                  calibration   statistics
    compression  factors                         search        trials
    export       the folder that is written      run           all that a worker needs
    checks       what several of them check      mapping       JSON
"""

from lowrank_core.config.calibration import CALIBRATION_MATRICES, GROUP_WEIGHTS, ROBUST_RULES, TOKENS_PER_DIMENSION, CalibrationConfig
from lowrank_core.config.checks import check_choice, check_min, check_ratio
from lowrank_core.config.compression import CompressionConfig, CompressRequest
from lowrank_core.config.export import ExportConfig
from lowrank_core.config.mapping import from_mapping, to_mapping
from lowrank_core.config.run import RunConfig
from lowrank_core.config.search import DEPTH, OBJECTIVES, PRUNERS, SAMPLERS, SPACES, VARIABLES, SearchConfig, depth_groups
from lowrank_core.config.sources import BOS_RULES, DTYPES, WORKING_SHARE, ModelSource, TextConfig, looks_like_path

__all__ = [
    "BOS_RULES",
    "CALIBRATION_MATRICES",
    "DEPTH",
    "DTYPES",
    "GROUP_WEIGHTS",
    "OBJECTIVES",
    "PRUNERS",
    "ROBUST_RULES",
    "SAMPLERS",
    "SPACES",
    "TOKENS_PER_DIMENSION",
    "VARIABLES",
    "WORKING_SHARE",
    "CalibrationConfig",
    "CompressRequest",
    "CompressionConfig",
    "ExportConfig",
    "ModelSource",
    "RunConfig",
    "SearchConfig",
    "TextConfig",
    "check_choice",
    "check_min",
    "check_ratio",
    "depth_groups",
    "from_mapping",
    "looks_like_path",
    "to_mapping",
]
