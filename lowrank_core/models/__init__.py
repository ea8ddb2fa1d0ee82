"""Models: loading them, finding their linear layers, and the low-rank layer that replaces one."""

from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.models.handle import LayerSpec, ModelHandle, describe
from lowrank_core.models.loading import load_model, max_context, notes_of

__all__ = ["LayerSpec", "LowRankLinear", "ModelHandle", "describe", "load_model", "max_context", "notes_of"]
