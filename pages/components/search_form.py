"""The form that starts a search, with the model, text and calibration of the run on screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from lowrank_core.accounting import STORAGES, MatrixShape
from lowrank_core.bases import BASES
from lowrank_core.config import OBJECTIVES, SAMPLERS, CompressionConfig, RunConfig, SearchConfig
from lowrank_core.presets import PRESETS, search_by
from lowrank_core.views.formatting import count, percent
from lowrank_core.views.search import OBJECTIVE_LABELS, SAMPLER_LABELS, check_budget
from pages.components.boundary import boundary
from pages.components.start import start

__all__ = ["search_form"]

_DEFAULT = SearchConfig()


def search_form(base: RunConfig, matrices: Sequence[MatrixShape]) -> None:
    """Draw the form; a press on its button starts a search of its own run, and selects it.

    Args:
        matrices: the compressible linears, to check the budget; empty where they are not known yet.
    """
    search = _inputs()
    config = replace(base, search=search)
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button("Start search", key="start_search", type="primary", icon=":material/play_arrow:")
        feasible = _budget_line(config, matrices)
    text, batch = config.text, config.text.validation_windows * config.text.context
    st.caption(
        f"Each trial is judged on {text.validation_windows} search-validation windows of {text.context} tokens ({batch:,} tokens), "
        f"in the space {search.space}; statistics come from {text.calibration_windows} calibration windows."
    )
    if pressed and feasible:
        with boundary():
            start(config)


def _inputs() -> SearchConfig:
    left, right = st.columns(2, gap="large")
    ratio = left.slider(
        "Compression ratio (parameters removed)",
        5,
        80,
        round(100 * _DEFAULT.compression_ratio),
        format="%d %%",
        key="search_ratio",
        help="Fraction of the compressible linears' parameters to remove.",
        persist_state="session",
    )
    trials = right.slider(
        "Trials", 2, 200, _DEFAULT.trials, key="search_trials", help="The two baselines included.", persist_state="session"
    )
    objective = left.selectbox(
        "Objective",
        OBJECTIVES,
        key="search_objective",
        format_func=OBJECTIVE_LABELS.__getitem__,
        help="What a trial is judged by, on search-validation text that is neither calibration nor test.",
        persist_state="session",
    )
    basis = right.selectbox(
        "Basis",
        list(BASES),
        key="search_basis",
        format_func=lambda name: BASES[name].label,
        help="How the error of a matrix is weighed, and so which directions are kept.",
        persist_state="session",
    )
    with st.expander("Advanced"):
        first, second, third = st.columns(3)
        sampler = first.selectbox("Sampler", SAMPLERS, key="search_sampler", format_func=SAMPLER_LABELS.__getitem__)
        storage = second.selectbox(
            "Storage",
            list(STORAGES),
            key="search_storage",
            help="factored: two factors. pivoted: the same matrix without the numbers that the others tell; higher ranks for a budget.",
        )
        seed = third.number_input("Seed", min_value=0, value=_DEFAULT.seed, key="search_seed")
        with st.container(horizontal=True, gap="large"):
            dense = st.toggle(
                "Keep value projections dense", value=CompressionConfig().value_dense, key="search_value_dense", help="As the paper does."
            )
            published = st.toggle(
                "As published",
                key="search_published",
                help="Bolaco to the letter: its basis and objective, 3 initial points, kept fractions that are not scaled onto the budget "
                "(a trial outside it does not count), ranks in eights, value projections dense. Overrides the choices around it.",
            )
    if published:
        return replace(search_by(PRESETS["bolaco"], ratio / 100, seed=int(seed)), trials=trials)
    compression = CompressionConfig(basis=basis, storage=storage, value_dense=dense)
    return SearchConfig(
        compression_ratio=ratio / 100, sampler=sampler, objective=objective, trials=trials, seed=int(seed), compression=compression
    )


def _budget_line(config: RunConfig, matrices: Sequence[MatrixShape]) -> bool:
    """Say what the budget is; return whether it can be met."""
    if not matrices:
        st.caption("The budget is counted once the model was read.", width="content")
        return True
    with boundary():
        uniform = check_budget(config, matrices)
        if uniform is not None:
            spends = (
                "every trial spends this budget" if config.search and config.search.projected else "trials within a tenth below it count"
            )
            st.caption(
                f"Keeps **{count(uniform.parameters)}** of {count(uniform.dense_parameters)} parameters in {len(matrices)} linear layers "
                f"({percent(uniform.compression_ratio)} removed); {spends}.",
                width="content",
            )
        return True
    return False
