"""Healing on the Compare page: the form, the live curve, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from lowrank_core.config.healing import HEALER_LABELS, HealingConfig
from lowrank_core.runs import Run
from lowrank_core.studio.compare.healing_chart import healing_figure
from lowrank_core.studio.compare.healing_runs import Healing, curve_table, ends_in_words, healings
from lowrank_core.studio.shared.formatting import count, number, percent
from lowrank_core.studio.shared.model_refs import Subject
from pages.components.charts import chart
from pages.components.request_controls import submit, why_not

__all__ = ["form", "show"]

_USUAL = HealingConfig()


def form(run: Run, result: Mapping[Subject, str], first: Subject) -> None:
    """Draw the choice of an allocation, the settings of a healing, and the button that has it healed."""
    options = list(result)
    index = options.index(first) if first in options else 0
    trial = st.selectbox(
        "Allocation to heal",
        options,
        index,
        key=f"heal_trial_{run.id}_{first}",
        format_func=lambda key: result.get(key, str(key)),
        width=380,
    )
    with st.form("heal_form"), st.container(horizontal=True, vertical_alignment="bottom"):
        method = st.selectbox(
            "Method",
            list(HEALER_LABELS),
            key="heal_method",
            format_func=lambda name: HEALER_LABELS[name],
            width=300,
            help="What is trained; in the end it is part of the factors, so that the size of the model stays.",
        )
        steps = st.number_input("Steps, at most", 1, 100_000, _USUAL.steps, key="heal_steps", width=150)
        entropy = st.number_input(
            "Weight of the text's own loss",
            0.0,
            10.0,
            _USUAL.cross_entropy,
            0.01,
            key="heal_cross_entropy",
            width=210,
            help="0 follows the dense model alone. A little helps the perplexity; with more the model learns the text instead.",
        )
        pressed = st.form_submit_button("Heal it", key="heal", icon=":material/healing:", disabled=run.recorded, help=why_not(run))
    if pressed:
        settings = {"method": method, "steps": int(steps), "cross_entropy": float(entropy)}
        submit(run, "heal", [trial], healing=settings)


def show(run: Run) -> None:
    """Draw the newest healing; the older ones are reported in a line each."""
    result = healings(run)
    if not result:
        st.caption("Trains the factors for some minutes on calibration text, chooses on validation text, and measures on test text.")
        return
    newest, *older = result
    _told(newest)
    if newest.history:
        curve = curve_table(newest.history)
        chart(
            healing_figure(curve, newest.steps),
            key="healing_curve",
            title=f"Healing {newest.label}",
            how="each point is a validation on text that is not trained on; lower is better in both. The starred state is what is kept.",
            alt="KL divergence and perplexity on validation text over the steps of a healing",
            data=curve,
        )
    for healing in older:
        _told(healing)


def _told(healing: Healing) -> None:
    report = healing.report
    if report is None:
        done = healing.history[-1].step if healing.history else 0
        st.caption(f"**{healing.name}**: {healing.method}, validated up to step {done:,} of {healing.steps:,}. Asked again, it goes on.")
        return
    st.caption(
        f"**{healing.name}**: {report.label}, {report.steps:,} steps, {count(report.tokens)} tokens, {report.seconds:,.0f} s, rate "
        f"{number(report.learning_rate, 2)}. KL on validation text {number(report.kl_before)} → {number(report.kl_after)} "
        f"({percent(report.recovered)} of it gone). {ends_in_words(report)}"
    )
