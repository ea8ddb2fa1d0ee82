"""Advanced options of the search form."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.presets.recipes import PRESETS
from pages.components.widgets import draw, draw_all

__all__ = ["advanced", "seed_alone"]

_SPACES = {
    "5x1": "By module type (5x1)",
    "5x4": "By module type, in 4 depth groups (5x4)",
    "types": "By module type, in N depth groups",
    "per-layer": "Per layer",
    "depth": "Depth bias: two variables of all blocks (LEMS)",
}
_NUMBERS = (
    *("input_damping", "gradient_damping", "drift_beta", "fit_windows", "rank_multiple"),
    *("input_shrinkage", "gradient_shrinkage"),
)


def seed_alone() -> int:
    """Draw the seed, the only choice of the published recipe."""
    with st.expander("Advanced"):
        st.caption("The published recipe fixes everything but the seed. Choose “Custom” to change more.")
        return _seed()


def advanced(*, own: bool, ranged: bool, objective: str) -> dict[str, object]:
    """Draw the choices; return them as fields of ``SearchConfig``.

    Args:
        own: whether basis, storage and variables are the user's, instead of the studio recipe's.
        ranged: whether a range of ratios is searched; then trials are not stopped early.
    """
    with st.expander("Advanced"):
        result: dict[str, object] = _recipe() if own else {"compression": PRESETS["studio"].compression, "variables": "error_weight"}
        return result | _searching(ranged=ranged) | _measuring(objective)


def _recipe() -> dict[str, object]:
    first, second, third = st.columns(3)
    basis = draw(CompressionConfig, "basis", key="search_basis", place=first)
    storage = draw(CompressionConfig, "storage", key="search_storage", place=second)
    variables = draw(SearchConfig, "variables", key="search_variables", place=third)
    with st.container(horizontal=True, gap="large"):
        dense = draw(CompressionConfig, "value_dense", key="search_value_dense")
        weights = variables == "error_weight"
        stacks = draw(CompressionConfig, "stacks", key="search_stacks", disabled=not weights)
        heads = draw(CompressionConfig, "heads", key="search_heads", disabled=not weights or dense)
        robust = draw(CompressionConfig, "robust_gradients", key="search_robust_gradients")
    numbers = draw_all(CompressionConfig, _NUMBERS, st.columns(3), "search_")
    alternatives = {"stacks": stacks and weights, "heads": heads and weights and not dense}
    compression = CompressionConfig(basis=basis, storage=storage, value_dense=dense, robust_gradients=robust, **alternatives, **numbers)
    return {"compression": compression, "variables": variables}


def _searching(*, ranged: bool) -> dict[str, object]:
    first, second, third = st.columns(3)
    space = draw(SearchConfig, "space", key="search_space", place=first, choices=_SPACES)
    groups = second.number_input(
        "Depth groups (N)",
        min_value=1,
        value=2,
        key="search_depth_groups",
        disabled=space != "types",
        help="Groups of consecutive blocks, for the space by module type in N depth groups.",
        persist_state="session",
    )
    sampler = draw(SearchConfig, "sampler", key="search_sampler", place=third)
    pruner = draw(SearchConfig, "pruner", key="search_pruner", place=first, disabled=ranged)
    startup = draw(SearchConfig, "startup_trials", key="search_startup_trials", place=third)
    flat = draw(SearchConfig, "stop_when_flat", key="search_stop_when_flat", place=first, disabled=ranged)
    weights = draw(SearchConfig, "error_weights", key="search_error_weights", place=third)
    deep = draw(SearchConfig, "deep_weights", key="search_deep_weights", place=third, disabled=not weights)
    return {
        "space": f"types x {int(groups)}" if space == "types" else space,
        "sampler": sampler,
        "startup_trials": startup,
        "error_weights": weights,
        "deep_weights": deep and weights,
        "pruner": "none" if ranged else pruner,
        "stop_when_flat": flat and not ranged,
        "seed": _seed(second),
    }


def _seed(place: object = st) -> int:
    return int(draw(SearchConfig, "seed", key="search_seed", place=place))


def _measuring(objective: str) -> dict[str, object]:
    first, second, third = st.columns(3)
    exact = objective == "bolaco"
    top_k = draw(SearchConfig, "top_k", key="search_top_k", place=first, disabled=exact)
    confirmed = draw(SearchConfig, "confirmed", key="search_confirmed", place=second, max_value=20)
    autocast = draw(SearchConfig, "autocast", key="search_autocast", place=third)
    return {"top_k": 0 if exact else top_k, "confirmed": confirmed, "autocast": autocast}
