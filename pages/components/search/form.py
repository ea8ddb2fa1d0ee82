"""Search form, with model, text and calibration of the current run."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from lowrank_core.config import RunConfig, SearchConfig
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.studies.published import POOL_RATIO
from lowrank_core.studio.search.search_plan import Plan, check_budget, time_estimate
from lowrank_core.studio.shared.formatting import count, duration, percent
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.stage_estimate import stage_estimate, stage_estimate_words
from pages.components import coverage
from pages.components.boundary import boundary
from pages.components.request_controls import start
from pages.components.search import form_options
from pages.components.widgets import choose, draw

__all__ = ["search_form"]

_DEFAULT = SearchConfig()
_RECIPES = {"studio": "Studio (default)", "bolaco": "Bolaco (as published)", "own": "Custom"}
_ABOUT = {
    "studio": "Factors fitted block by block in the two-sided (K-FAC) metric; stacks and per-head factors as alternatives; the search "
    "starts at the Lagrangian allocation and tunes its error weights.",
    "bolaco": "Bolaco as its code runs it: pooled feature covariances, ranks in eights, value projections dense; kept fractions, drawn "
    "until they meet the budget, from the paper's first point and the two draws farthest from it on, by a Gaussian process and one time in "
    "ten at random; judged by perplexity plus 0.001 x the KL of a window, on the 100 windows whose perplexity varies most over 20 "
    "random allocations.",
    "own": "Choose error metric, storage and variables under Advanced.",
}


def search_form(base: RunConfig, facts: ModelFacts | None) -> None:
    """Draw the form; its button starts and selects a new run.

    Args:
        facts: of the model, to check the budget; None where they are not known yet.
    """
    config: RunConfig | None = None
    with boundary():
        config = replace(base, search=_inputs())
    feasible = config is not None and _budget_line(config, facts)
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button("Start search", key="start_search", type="primary", icon=":material/play_arrow:", disabled=config is None)
        _time_line(config, facts)
    search = config.search if config is not None and config.search is not None else _DEFAULT
    st.caption(_judged_words(base, search))
    if pressed and feasible and config is not None:
        start(config)


def _judged_words(base: RunConfig, search: SearchConfig) -> str:
    text, windows = base.text, search.selected_windows or base.text.validation_windows
    pool = round(POOL_RATIO * search.selected_windows)
    selected = f", selected before the first trial from up to {pool}," if search.selected_windows else ""
    return (
        f"Each trial is judged on {windows} search-validation windows of {text.context} tokens ({windows * text.context:,} tokens)"
        f"{selected or ','} in the space {search.space}; statistics come from {text.calibration_windows} calibration windows."
    )


def _inputs() -> SearchConfig:
    """Draw the inputs and return the config.

    Raises:
        ConfigError: they do not go together.
    """
    recipe = choose("Recipe", _RECIPES, key="search_recipe", help="How the matrices are factorised and what the search varies.")
    st.caption(_ABOUT[recipe])
    minimum, maximum, trials, objective = _simple(published=recipe == "bolaco")
    if recipe == "bolaco":
        seed = form_options.seed_alone()
        return replace(search_by(PRESETS["bolaco"], minimum, seed=seed), trials=trials)
    options = form_options.advanced(own=recipe == "own", ranged=maximum is not None, objective=objective)
    chosen = {"compression_ratio": minimum, "max_ratio": maximum, "objective": objective, "trials": trials}
    return replace(search_by(PRESETS["studio"], minimum), **{**options, **chosen})  # type: ignore[arg-type]


def _simple(*, published: bool) -> tuple[float, float | None, int, str]:
    """Draw the main inputs; return the ratio, the end of its range or None, the trials and the objective."""
    far = st.toggle(
        "Sweep of ratios (Pareto front)",
        key="search_far",
        disabled=published,
        help="Searches a range of ratios at once and returns the Pareto front of loss against ratio instead of one best trial. Needs more "
        "trials. Bolaco's search has a single ratio.",
        persist_state="session",
    )
    left, right = st.columns(2, gap="large")
    with left:
        minimum, maximum = _ratio(ranged=far and not published)
    trials = right.slider(
        "Trials",
        2,
        200,
        _DEFAULT.trials,
        key="search_trials",
        help="Including baselines (Bolaco's search has none). Can be extended later.",
        persist_state="session",
    )
    objective = draw(SearchConfig, "objective", key="search_objective", place=left, disabled=published)
    return minimum, maximum, trials, objective


def _ratio(*, ranged: bool) -> tuple[float, float | None]:
    """Draw the ratio, or the two ends of a range."""
    label, help, begin, key = (
        ("Compression ratios (parameters removed)", "Every trial removes its own fraction between these two.", (20, 60), "search_ratios")
        if ranged
        else (
            "Compression ratio (parameters removed)",
            "Fraction of the compressible linears' parameters to remove.",
            round(100 * _DEFAULT.compression_ratio),
            "search_ratio",
        )
    )
    chosen = st.slider(label, 5, 80, begin, format="%d %%", key=key, help=help, persist_state="session")
    return (chosen[0] / 100, chosen[1] / 100) if isinstance(chosen, tuple) else (chosen / 100, None)


def _budget_line(config: RunConfig, facts: ModelFacts | None) -> bool:
    """Show the budget; return whether it can be met."""
    if facts is None or not facts.matrices:
        st.caption("The budget is shown once the model has been read.")
        return True
    with boundary():
        plan = check_budget(config, facts.matrices, facts.joint_units)
        if plan is not None and config.search is not None:
            st.caption(_budget_words(plan, config.search, len(facts.matrices)))
            coverage.show(facts, config.search.compression_ratio)
            coverage.warn(facts, config.search.compression_ratio)
        return True
    return False


def _budget_words(plan: Plan, search: SearchConfig, layers: int) -> str:
    variables = f"{len(plan.variables)} variables"
    if search.max_ratio is not None:
        return (
            f"Keeps **{count(plan.allowed)}** ({percent(search.compression_ratio)} removed) down to **{count(plan.minimum)}** "
            f"({percent(search.max_ratio)} removed) of {count(plan.dense)} parameters in {layers} linear layers; {variables}."
        )
    spends = (
        "every trial spends this budget"
        if search.projected
        else "only points that keep at most this, and at most a tenth of all less, are drawn"
    )
    return (
        f"Keeps **{count(plan.allowed)}** of {count(plan.dense)} parameters in {layers} linear layers "
        f"({percent(search.compression_ratio)} removed); {spends}; {variables}."
    )


def _time_line(config: RunConfig | None, facts: ModelFacts | None) -> None:
    """Show the estimated time and its source."""
    if config is None:
        return
    result = time_estimate(config, facts)
    if result is None:
        by_stage = None if facts is None else stage_estimate(config, facts)
        unknown = "No time estimate before the first trial: this machine has no measurements yet."
        st.caption(unknown if by_stage is None or by_stage.total is None else stage_estimate_words(by_stage), width="content")
        return
    before = f", after about {duration(result.before)} until the first" if result.before is not None else ""
    selecting = f", and up to {duration(result.selecting)} to select windows" if result.selecting else ""
    words = f"Estimate: about **{duration(result.trials)}** for the trials{before}{selecting}, going by {result.basis}."
    st.caption(words, width="content")
