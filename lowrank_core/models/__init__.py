"""Models: loading them, finding their linear layers, and the low-rank layer that replaces one."""

from lowrank_core.models.handle import LayerSpec, ModelHandle, describe
from lowrank_core.models.loading import load_model, max_context, notes_of
from lowrank_core.models.lowrank_linear import LowRankLinear

__all__ = ["LayerSpec", "LowRankLinear", "ModelHandle", "describe", "load_model", "max_context", "notes_of"]
