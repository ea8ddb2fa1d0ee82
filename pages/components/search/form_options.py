"""What the form of a search has under Advanced."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from lowrank_core.config import PRUNERS, SAMPLERS, VARIABLES, CompressionConfig, SearchConfig
from lowrank_core.metrics import METRICS
from lowrank_core.parameters import STORAGES
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.studio.search.history import SAMPLER_LABELS

__all__ = ["advanced", "seed_alone"]

_DEFAULT = SearchConfig()
_SPACES = {
    "5x1": "By module type (5x1)",
    "5x4": "By module type, in 4 depth groups (5x4)",
    "types": "By module type, in N depth groups",
    "per-layer": "Every layer by itself",
}
_VARIABLES = {"kept": "Kept fractions", "errors": "Error weights around lagrangian"}
_PRUNERS = {"none": "Measure every trial to the end", "wilcoxon": "Stop bad trials early (Wilcoxon test)"}


def seed_alone() -> int:
    """Draw the one choice that a published recipe leaves."""
    with st.expander("Advanced"):
        st.caption("As published, everything but the seed is given. Choose “My own” to change more.")
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
    basis = first.selectbox(
        "Basis",
        list(METRICS),
        key="search_basis",
        format_func=lambda name: METRICS[name].label,
        help="How the error of a matrix is weighed, and so which directions are kept.",
        persist_state="session",
    )
    storage = second.selectbox(
        "Storage",
        list(STORAGES),
        key="search_storage",
        help="factored: two factors. pivoted: the same matrix without the numbers that the others tell; higher ranks for a budget.",
        persist_state="session",
    )
    variables = third.selectbox(
        "Variables",
        VARIABLES,
        key="search_variables",
        format_func=_VARIABLES.__getitem__,
        help="What a variable multiplies: the kept fraction of its matrices, as in the paper, or the weight of their errors when the "
        "allocator lagrangian trades them; at 1 everywhere that is lagrangian itself.",
        persist_state="session",
    )
    with st.container(horizontal=True, gap="large"):
        dense = st.toggle(
            "Keep value projections dense",
            value=CompressionConfig().value_dense,
            key="search_value_dense",
            help="As the paper does.",
            persist_state="session",
        )
        weights = variables == "error_weight"
        stacks = st.toggle(
            "Offer stacks",
            key="search_stacks",
            disabled=not weights,
            help="Matrices with one input may share their input directions, where that is cheaper. Needs error weights.",
            persist_state="session",
        )
        heads = st.toggle(
            "Offer per-head factors",
            key="search_heads",
            disabled=not weights or dense,
            help="Value and output projections may be compressed head by head. Needs error weights, and value projections that may be "
            "compressed.",
            persist_state="session",
        )
    alternatives = {"stacks": stacks and weights, "heads": heads and weights and not dense}
    compression = replace(CompressionConfig(), basis=basis, storage=storage, value_dense=dense, **alternatives)
    return {"compression": compression, "variables": variables}


def _searching(*, ranged: bool) -> dict[str, object]:
    first, second, third = st.columns(3)
    space = first.selectbox(
        "Space",
        list(_SPACES),
        key="search_space",
        format_func=_SPACES.__getitem__,
        help="Which matrices share a variable; q and k always do.",
        persist_state="session",
    )
    groups = second.number_input(
        "Depth groups (N)",
        min_value=1,
        value=2,
        key="search_depth_groups",
        disabled=space != "types",
        help="Groups of consecutive blocks, for the space by module type in N depth groups.",
        persist_state="session",
    )
    sampler = third.selectbox(
        "Sampler",
        SAMPLERS,
        key="search_sampler",
        format_func=SAMPLER_LABELS.__getitem__,
        help="What proposes the next trial. The Gaussian process takes up to 30 variables; CMA-ES has one ratio only.",
        persist_state="session",
    )
    pruner = first.selectbox(
        "Bad trials",
        PRUNERS,
        key="search_pruner",
        format_func=_PRUNERS.__getitem__,
        disabled=ranged,
        help="A trial is stopped when a signed-rank test over its windows says that it can't become the best. With a range of ratios every "
        "trial is measured to the end.",
        persist_state="session",
    )
    return {
        "space": f"types x {int(groups)}" if space == "types" else space,
        "sampler": sampler,
        "pruner": "none" if ranged else pruner,
        "seed": _seed(second),
    }


def _seed(place: object = st) -> int:
    seed = place.number_input(  # type: ignore[attr-defined]
        "Seed",
        min_value=0,
        value=_DEFAULT.seed,
        key="search_seed",
        help="Of the sampler: the same seed proposes the same trials.",
        persist_state="session",
    )
    return int(seed)


def _measuring(objective: str) -> dict[str, object]:
    first, second, third = st.columns(3)
    exact = objective == "bolaco"
    top_k = first.number_input(
        "Likeliest tokens compared (top-k)",
        min_value=0,
        value=_DEFAULT.top_k,
        step=64,
        key="search_top_k",
        disabled=exact,
        help="0: KL over the whole vocabulary. With k, over the dense model's k likeliest tokens and the rest taken together: a lower "
        "bound that needs less memory. Bolaco's objective needs the whole vocabulary.",
        persist_state="session",
    )
    confirmed = second.number_input(
        "Best trials measured on test text",
        min_value=0,
        max_value=20,
        value=_DEFAULT.confirmed,
        key="search_confirmed",
        help="When the search is done, on text that no trial saw.",
        persist_state="session",
    )
    autocast = third.toggle(
        "Trials in bfloat16",
        key="search_autocast",
        help="Faster where the device has it; the dense model that trials are compared with stays as it is.",
        persist_state="session",
    )
    return {"top_k": 0 if exact else int(top_k), "confirmed": int(confirmed), "autocast": autocast}
