"""Replacements of linear layers: plain factors, pivoted ones, stacks, per-head factors, in floats, int8 or int4."""

__all__ = ["register_vllm"]


def register_vllm() -> None:
    """Register our format with vLLM: its entry point ``vllm.general_plugins``, called in each of its processes."""
    import lowrank_core.layers.vllm  # noqa: F401  (registered on import)
