"""The report: the numbers of the views, everything that is missing said so, nothing loaded, nothing unescaped."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ui"))

from synthetic import comparison, make_run, matrices, spectra, write_answers, write_front, write_healing, write_rich_study
from synthetic_answers import on_other_text, speed_answer, tokens_answer

from lowrank_core.cli import main, parser
from lowrank_core.cli.options import config_of, source_of, text_of
from lowrank_core.cli.search import _config
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import RunError
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import Run, RunStatus, create_run, open_run, recorded_run, write_json
from lowrank_core.runs.client import results
from lowrank_core.studies.gain import search_gain
from lowrank_core.studies.naming import trial_label
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studio.compare.comparison import comparisons, other_texts
from lowrank_core.studio.compare.healing_runs import healings
from lowrank_core.studio.compare.loss_details import comparison_table, position_table, window_table
from lowrank_core.studio.compare.measured_speed import speed_numbers, speed_table, speeds
from lowrank_core.studio.compare.second_text import other_text
from lowrank_core.studio.compare.token_losses import strips, worst_tokens
from lowrank_core.studio.export.export_list import written_models
from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.report import report_html, write_report
from lowrank_core.studio.search.history import history, progress
from lowrank_core.studio.search.pareto_chart import front
from lowrank_core.studio.search.static_chart import front_figure, history_figure
from lowrank_core.studio.shared.embedding import figure_json, plotly_script
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.reproduce import reproduction
from lowrank_core.studio.shared.summary import (
    by_protocol,
    failures,
    flat_table,
    measured_table,
    min_relative,
    protocol_of,
    seed_table,
    type_table,
    unfinished_table,
)
from lowrank_core.worker.main import run_worker

EVIL = "<script>alert('x')</script><img src=https://elsewhere.example/p.png onerror=alert(1)>"
ASKED_FOR = ["closely", "second-text", "tokens", "speed"]
"""Sections that are there only where somebody asked for their measurement, or would look for it."""
ANCHORS = [
    *("run", "model", "text", "calibration", "spectra", "search", "measured", *ASKED_FOR),
    *("healing", "exports", "reproduction", "configuration"),
]
LOADING = {"src", "srcset", "data", "action", "poster", "background", "xlink:href", "formaction"}


class Page(HTMLParser):
    """What a browser would find: elements, tables by caption, links, the words that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._inside: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title", "caption", "td", "th", "table"):
            self._inside.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self._inside:
            self._inside.remove(tag)
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if "script" in self._inside or "style" in self._inside:
            return
        self.words.append(data)
        if "caption" in self._inside:
            self._caption += data
        elif self._inside and self._inside[-1] in ("td", "th"):
            self._rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def files(self) -> dict[str, str]:
        """Return the files that the page offers, by name."""
        links = {link["download"]: link["href"] for link in self.all("a") if "download" in link}
        return {str(name): base64.b64decode(str(link).split(",", 1)[1]).decode("utf-8") for name, link in links.items()}

    def frame(self, name: str) -> pd.DataFrame:
        return pd.read_csv(io.StringIO(self.files()[name]))

    def rows(self, caption: str) -> list[dict[str, str]]:
        """Return the rows of the table whose caption begins so."""
        head, *body = next(rows for result, rows in self.tables.items() if result.startswith(caption))
        return [dict(zip(head, row, strict=True)) for row in body]


def report(run: Run) -> Page:
    html = report_html(run)
    assert_sound(html)
    return Page(html)


def without_plotly(html: str) -> str:
    return html.replace(plotly_script(), "")


def assert_sound(html: str) -> None:
    """What holds for every report: it loads nothing, shows no NaN, has each anchor once, and what is named is there."""
    page = Page(html)
    for tag, attributes in page.elements:
        for name in LOADING & set(attributes):
            assert str(attributes[name]).startswith("data:"), (tag, name, attributes[name])
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not page.all("link")
    assert not page.all("iframe")
    links = [str(link["href"]) for link in page.all("a")]
    assert all(link.startswith(("#", "data:text/csv;base64,", "data:application/json;base64,")) for link in links)
    names = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    anchors = [link[1:] for link in links if link.startswith("#")]
    assert anchors == [result["id"] for result in page.all("section")] == [name for name in ANCHORS if name in anchors]
    assert set(ANCHORS) - set(anchors) <= set(ASKED_FOR)
    assert not re.search(r"\b(nan|None|NaT|inf|undefined)\b", page.text), re.search(r".{40}\b(nan|None|NaT|inf|undefined)\b", page.text)
    assert "NaN" not in without_plotly(html)
    assert len(without_plotly(html)) < 3_000_000
    for plot in [result for result in page.all("div") if result.get("class") == "plot"]:
        assert plot["role"] == "img"
        assert len(str(plot["aria-label"])) > 30


def charts(page: Page) -> list[str]:
    return [str(result["id"]) for result in page.all("div") if result.get("class") == "plot"]


@pytest.fixture(scope="module")
def recorded() -> Run:
    run = recorded_run()
    assert run is not None
    return run


@pytest.fixture(scope="module")
def page(recorded: Run) -> Page:
    return report(recorded)


@pytest.fixture(scope="module")
def best(recorded: Run) -> TrialRecord:
    search = recorded.config.search
    assert search is not None
    result = progress(read_trials(recorded), search).best
    assert result is not None
    return result


# --- the recorded run: the same numbers as the views' ------------------------------------------------------------------


def test_the_story_is_told_in_order(recorded: Run, page: Page, best: TrialRecord):
    assert [result["id"] for result in page.all("section")] == ANCHORS
    (healed,) = healings(recorded)
    drawn = ["map-features", "map-weights", "scree", "history", f"allocation-trial-{best.number}", "perplexity-python-stdlib-test"]
    assert charts(page) == [
        *drawn,
        "window-scatter",
        "window-histogram",
        "positions",
        "second-text-1",
        "speedups",
        f"healing-{healed.folder}",
    ]


def test_trials_and_the_best_value_are_those_of_the_search(recorded: Run, page: Page, best: TrialRecord):
    trials, search = read_trials(recorded), recorded.config.search
    assert search is not None
    assert f"{len(trials)} of {search.trials}" in page.text
    assert f"Best value {number(best.value, 4)}" in page.text
    added = search_gain(recorded)
    assert added.rivals
    assert added.test is not None
    assert added.words in page.text
    frame = page.frame("trials.csv")
    assert len(frame) == len(trials) == len(page.rows("Every trial"))
    assert list(frame["value"]) == pytest.approx([trial.value for trial in trials], rel=1e-12)
    assert sum("★" in row["Kind"] for row in page.rows("Every trial")) == 1
    allocation = json.loads(page.files()[f"recorded-run-trial-{best.number}.json"])
    assert allocation["ranks"] == dict(best.ranks)


def test_perplexities_and_intervals_are_those_of_the_comparison(recorded: Run, page: Page):
    result = comparisons(results(recorded), read_trials(recorded))
    table = comparison_table(result)
    frame = page.frame("test-python-stdlib-test.csv")
    for ours, theirs in (("model", "allocation"), ("perplexity",) * 2, ("low",) * 2, ("high",) * 2, ("kl",) * 2, ("bytes",) * 2):
        left, right = frame[ours], table[theirs]
        assert list(left) == (list(right) if ours == "model" else pytest.approx(list(right), rel=1e-12, nan_ok=True))
    rows = page.rows("Quality")
    assert [row["Perplexity"] for row in rows] == [number(value, 5) for value in table["perplexity"]]
    assert [row["Form"] for row in rows] == ["dense", *(comparison.form for comparison in result)]
    ends = {comparison.name: comparison.perplexity_difference_interval for comparison in result}
    paired = frame[frame["form"] != "dense"]
    assert list(zip(paired["difference_low"], paired["difference_high"], strict=True)) == [ends[name] for name in paired["model"]]
    assert result[0].protocol in page.text


def test_the_best_searched_model_is_looked_at_closely(recorded: Run, page: Page, best: TrialRecord):
    (shown,) = [result for result in comparisons(results(recorded), read_trials(recorded)) if result.name == trial_label(best)]
    view, positions = window_table(shown), position_table(shown)
    assert view is not None
    assert f"{shown.name}: {view.words}" in page.text
    frame = page.frame("window-scatter.csv")
    assert list(frame["compressed"]) == pytest.approx(shown.window_nll, rel=1e-12)
    assert list(frame["dense"]) == pytest.approx(shown.dense_window_nll, rel=1e-12)
    assert list(page.frame("window-histogram.csv")["difference"]) == pytest.approx(list(view.frame["difference"]), rel=1e-12)
    assert list(page.frame("positions.csv")["kl"]) == pytest.approx(list(positions["kl"]), rel=1e-12)
    assert f"{protocol_of(shown)}." in page.text


def test_of_baselines_alone_the_best_is_looked_at():
    run = make_run()
    for index, body in enumerate((comparison("uniform", "uniform", 3.9), comparison("energy", "energy", 3.4))):
        write_json(run.path / "results" / f"{index}.json", body)
    assert "Each window: the dense model against Equal energy" in report(run).text


def test_the_second_text_stands_beside_the_own_one_as_on_the_compare_page(recorded: Run, page: Page):
    bodies, trials = results(recorded), read_trials(recorded)
    ((reference, result),) = other_texts(bodies, trials).items()
    view = other_text(comparisons(bodies, trials), result)
    assert view is not None
    assert view.words in page.text
    assert f"{view.own_protocol}. {view.other_protocol}." in page.text
    frame = page.frame("second-text-1.csv")
    assert list(frame["name"]) == list(view.frame["name"])
    for name in ("own_ratio", "own_low", "other_ratio", "other_high", "kl_other"):
        assert list(frame[name]) == pytest.approx(list(view.frame[name]), rel=1e-12)
    rows = page.rows(f"Every model on both texts. {view.own_protocol}")
    assert [row[f"Ratio on {reference}"] for row in rows] == [number(value, 4) for value in view.frame["other_ratio"]]


def test_every_text_that_was_read_token_by_token_is_there_with_its_worst_tokens(recorded: Run, page: Page):
    result = strips(results(recorded), read_trials(recorded))
    assert len(result) == 3
    assert len([figure for figure in page.all("figure") if figure.get("class") == "strip"]) == 3
    coloured = [span for span in page.all("span") if "background-color" in str(span.get("style"))]
    assert len(coloured) > len(result[0].frame)
    for index, strip in enumerate(result, 1):
        assert strip.words in page.text
        frame = page.frame(f"tokens-{index}.csv")
        assert list(frame["extra"]) == pytest.approx(list(strip.frame["extra"]), rel=1e-12)
        rows = page.rows(f"Tokens with the largest extra loss of {strip.name}; the file has all tokens. {strip.protocol}")
        worst = worst_tokens(strip, 10)
        assert [row["Extra loss (nats)"] for row in rows] == [number(value, 3) for value in worst["extra"]]
        assert [row["Token"] for row in rows] == list(worst["piece"])


def test_speed_and_memory_are_those_of_the_compare_page(recorded: Run, page: Page):
    (speed,) = speeds(results(recorded), read_trials(recorded))
    assert f"Memory of {speed.name}: {speed.memory}." in page.text
    rows = page.rows(f"{speed.name} next to the dense model. {speed.protocol}")
    reported = speed_table(speed)
    assert [row["Compressed"] for row in rows] == list(reported["compressed"])
    assert [row["Speed-up"] for row in rows] == list(reported["faster"])
    numbers, frame = speed_numbers([speed]), page.frame("speedups.csv")
    assert list(frame["decode_tokens_per_second"]) == pytest.approx(list(numbers["decode_tokens_per_second"]), rel=1e-12)
    assert list(frame["protocol"]) == [speed.protocol] * 2


def test_facts_of_model_text_and_calibration_are_there(recorded: Run, page: Page):
    model, text = recorded.part("model"), recorded.part("text")
    facts = calibration_facts(recorded)
    assert model is not None
    assert text is not None
    assert facts is not None
    for words in (model["architecture"], f"{model['parameters']:,}", "tied: embedding and head share one matrix", "held as float32"):
        assert words in page.text
    assert {row["SHA-256 (first 12)"] for row in page.rows("Three disjoint splits")} == {
        split["sha256"][:12] for split in text["splits"].values()
    }
    assert f"{facts.tokens:,}" in page.text
    assert len(page.rows("Statistics of each distinct input")) == len(facts.inputs)


def test_configuration_seeds_and_versions_are_whole(recorded: Run, page: Page):
    record = recorded.record
    shown = {row["Name"]: row["Value"] for row in page.rows("Configuration")}
    assert len(shown) == len(flat_table(record["config"]))
    assert shown["search.compression.basis"] == "drift_aware:two_sided"
    assert shown["search.projected"] == "true"
    assert shown["search.most_ratio"] == "none"
    assert {row["Name"] for row in page.rows("Seeds")} == {"text.seed", "calibration.gradient_seed", "search.seed"}
    assert {row["Name"]: row["Value"] for row in page.rows("Versions")} == record["versions"]


def test_tables_have_captions_and_scopes_and_figures_their_protocol(page: Page):
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(head["scope"] == "col" for head in page.all("th"))
    assert page.text.count("How to read this:") == len(charts(page))
    assert "statistics in float64" in page.text
    assert "Search-validation values are minimised, so optimistic; report test values." in page.text


def test_nothing_is_read_but_what_is_there_and_nothing_is_written(recorded: Run, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in recorded.path.rglob("*")}
    size = write_report(recorded, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size == size < 8_000_000
    assert before == {path: path.stat().st_mtime_ns for path in recorded.path.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# --- runs in every state ------------------------------------------------------------------------------------------------


def test_a_run_that_was_just_made_says_what_is_missing():
    run = create_run(RunConfig(search=SearchConfig(0.4)))
    page = report(run)
    assert charts(page) == []
    assert f"`lowrank worker --run {run.path}` starts it" in page.text
    for words in ("The model was not read yet", "The text was not cut yet", "Not calibrated yet", "No spectra yet"):
        assert words in page.text
    for words in ("No trial has begun yet", "Nothing was measured on test text yet", "No compressed model was written"):
        assert words in page.text
    assert page.text.count("Missing:") == 8


def test_a_run_that_only_analyses_has_spectra_and_no_search():
    page = report(make_run(search=False))
    assert charts(page) == ["map-features", "map-weights", "scree"]
    assert "This run only analyses the model" in page.text
    assert "lowrank analyze --model demo" in page.text
    assert len(page.rows("Effective rank of every module")) == len(matrices())


def test_a_failed_run_says_why_and_keeps_what_there_is():
    page = report(make_run(state="failed"))
    assert "Failed: This run failed. model: the loss of layer 3 is not finite." in page.text
    assert "history" in charts(page)
    assert "Nothing was measured on test text yet" in page.text


def test_a_run_at_work_is_shown_as_it_is_now():
    page = report(make_run(state="running"))
    assert "was running when the report was written (Searching · 5 of 30" in page.text
    assert {"running", "failed"} <= {row["Kind"] for row in page.rows("Trials that do not count")}


def test_a_worker_that_died_is_told():
    run = make_run()
    run.write_status(RunStatus("running", "Searching", pid=2**22 + 1, pid_started=1.0))
    assert "Failed: This run interrupted. The worker's process ended" in report(run).text


def test_trials_of_every_kind_are_listed_with_what_became_of_them():
    run = make_run(study=write_rich_study)
    page, trials = report(run), read_trials(run)
    unfinished = {row["Trial"]: row for row in page.rows("Trials that do not count")}
    assert len(unfinished) == sum(trial.state != "complete" for trial in trials)
    assert "the objective kl is not finite at this allocation" in unfinished["Trial 7"]["Outcome"]
    assert "stopped early after 6 windows" in unfinished["Trial 4"]["Outcome"]
    assert unfinished["Manual (trial 6)"]["Kind"] == "outside budget"


def test_two_objectives_have_a_front_and_maps_along_it():
    run = make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=6), study=write_front)
    page = report(run)
    assert [row["On the front"] for row in page.rows("Pareto front")] == ["Uniform (trial 0)", "Uniform (trial 1)", "Trial 4", "Trial 3"]
    maps = [name for name in charts(page) if name.startswith("allocation")]
    assert maps == ["allocation-trial-0", "allocation-trial-4", "allocation-trial-3"]
    assert "Best trial" not in page.text


def test_warnings_of_a_thin_calibration_come_first():
    run = make_run()
    body = json.loads((run.path / "calibration.json").read_text())
    for entry in body["inputs"]:
        entry["tokens_per_dimension"] = 2.0
    write_json(run.path / "calibration.json", body)
    assert "saw fewer than 8 tokens per dimension" in report(run).text


def test_a_protocol_is_never_mixed_with_another():
    run = make_run()
    write_answers(run)
    other = comparison("trial 3", 3, 3.9)
    other["report"] |= {"dataset": "wikitext-2", "protocol": "wikitext-2, test split, 4 windows of 32 tokens"}  # type: ignore[operator]
    other["label"] = "trial 5"
    write_json(run.path / "results" / "9.json", other)
    page = report(run)
    assert len(by_protocol(comparisons(results(run)))) == 2
    assert [row["Model"] for row in page.rows("Quality, dense next to compressed. wikitext-2")] == ["Dense", "Trial 5"]
    assert len([name for name in charts(page) if name.startswith("perplexity")]) == 2


def test_negative_results_are_said():
    run = make_run()
    bodies = [comparison("trial 3", 3, 3.4), comparison("uniform", "uniform", 3.2), {"ok": False, "kind": "export", "error": "disk full"}]
    for index, body in enumerate(bodies):
        write_json(run.path / "results" / f"{index + 1}.json", body)
    page = report(run)
    assert "No searched trial is better than Uniform (trial 0) (24.533)" in page.text
    assert "A request (export) failed: disk full" in page.text


def test_a_healed_rule_is_no_searched_trial():
    run = make_run()
    bodies = [comparison("trial 3", 3, 3.4), comparison("uniform", "uniform", 3.2)]
    healed = comparison("uniform, healed by distillation", "uniform", 3.1)
    bodies.append({**healed, "kind": "heal", "folder": "uniform-abcd", "one_shot": bodies[1]["report"]})
    for index, body in enumerate(bodies):
        write_json(run.path / "results" / f"{index + 1}.json", body)
    assert "No searched trial is better than Uniform (trial 0) (24.533)" in report(run).text


def test_an_answer_that_was_not_measured_is_named():
    run = make_run()
    write_json(run.path / "results" / "1.json", comparison("trial 2", 2, 3.4))
    page = report(run)
    assert "Not measured on test text: Trial 3" in page.text
    assert "The uniform baseline was not measured on test text" in page.text


def test_what_was_not_asked_for_is_said_where_a_reader_would_look_for_it():
    run = make_run()
    assert not set(ASKED_FOR) & {result["id"] for result in report(run).all("section")}
    write_answers(run)
    page = report(run)
    assert [result["id"] for result in page.all("section")] == [name for name in ANCHORS if name != "tokens"]
    assert "Missing: No second text was measured" in page.text
    assert "Missing: No model was timed" in page.text


def test_second_texts_strips_and_timings_of_several_models_stand_by_themselves():
    run = make_run()
    write_answers(run)
    unknown = on_other_text("trial 5", 5, 3.8, "ptb")
    unknown["report"] |= {"dataset": "ptb", "protocol": "ptb, test split, 4 windows of 32 tokens"}  # type: ignore[operator]
    more = [on_other_text("uniform", "uniform", 3.9), unknown, tokens_answer(), tokens_answer("trial 3")]
    more += [speed_answer(), speed_answer("trial 3", memory=False)]
    for index, body in enumerate(more):
        write_json(run.path / "results" / f"{index + 20}.json", body)
    page = report(run)
    assert charts(page)[-3:] == ["second-text-1", "second-text-2", "speedups"]
    own = "Every model on both texts. python-stdlib, test split, 4 windows of 32 tokens."
    (row,) = page.rows(f"{own} ptb, test split, 4 windows of 32 tokens.")
    assert (row["Model"], row["Ratio on python-stdlib"]) == ("Trial 5", "–")
    assert [row["Model"] for row in page.rows(f"{own} file:notes.txt")] == ["Uniform (trial 0)"]
    assert [row["Token"] for row in page.rows("Tokens with the largest extra loss of Trial 3")] == ["␣<", "␣b", "␣a", ":⏎"]
    assert [row["Extra loss (nats)"] for row in page.rows("Tokens with the largest extra loss of Uniform (trial 0)")] == [
        "2.00",
        "0.100",
        "0",
        "-0.500",
    ]
    assert "Memory of Trial 3 was not measured." in page.text
    assert "Memory of Uniform (trial 0): peak of a fresh process." in page.text
    timed = page.rows("Uniform (trial 0) next to the dense model. batch 1, prompts of 8 random tokens")
    assert timed[1]["Speed-up"] == "2.00 (1.80 to 2.20)"


def test_healings_are_told_with_their_curve_and_a_row_of_their_own():
    run = make_run()
    assert "No model of this run was healed" in report(run).text
    write_healing(run)
    page = report(run)
    assert "40 steps on 4,000 tokens in 40 s" in page.text
    assert "0.300 before, 0.250 after" in page.text
    assert "Trial 3, healed by distill" in page.text


def test_models_on_disk_are_listed_and_those_that_went_are_said_to_be_gone():
    run = make_run()
    write_answers(run)
    folder = run.path / "exports" / "trial-5"
    said = {"allocation": "trial 5", "form": "dense", "compression_ratio": 0.3, "model_compression_ratio": 0.2, "ranks": {}}
    write_json(folder / "lowrank.json", {**said, "measured": {"perplexity": 24.5}})
    checked = {"ok": True, "kind": "verify", "path": str(folder), "verification": {"ok": False, "recorded": 24.5, "measured": 25.5}}
    write_json(run.path / "results" / "9.json", checked)
    (folder / "model.safetensors").write_bytes(b"0" * 2048)
    rows = report(run).rows("Compressed models on disk")
    assert [(row["Allocation"], row["Removed, linears"], row["At the time of this report"]) for row in rows] == [
        ("Trial 5", "30.00 %", "there, merged"),
        ("Trial 3", "–", "gone"),
    ]
    assert (rows[0]["Weight files"], rows[0]["Perplexity as written"], rows[1]["Perplexity as written"]) == ("2.00 KiB", "24.500", "–")
    assert rows[0]["Read again in a fresh process"] == "perplexity 25.500, recorded 24.500: DIFFERS from the recording"
    assert rows[1]["Read again in a fresh process"] == "–"
    write_json(run.path / "results" / "9.json", {**checked, "verification": {"ok": True, "recorded": 24.5, "measured": 24.5}})
    assert "recorded 24.500: equal up to rounding" in report(run).text


# --- what comes from files ---------------------------------------------------------------------------------------------


def evil_run() -> Run:
    """Return a run whose name, text, modules, errors and answers try to be markup."""
    run = make_run(study=write_rich_study)
    write_answers(run)
    write_json(run.path / "run.json", {**run.record, "name": EVIL})
    for part, key in (("text", "reference"), ("model", "architecture"), ("model", "fingerprint")):
        write_json(run.path / f"{part}.json", {**(run.part(part) or {}), key: EVIL})
    answer = json.loads((run.path / "results" / "3.json").read_text())
    write_json(run.path / "results" / "3.json", {**answer, "dense_text": EVIL, "compressed_text": "</script>" + EVIL})
    write_json(run.path / "results" / "8.json", {"ok": False, "kind": EVIL, "error": EVIL})
    write_json(run.path / "results" / "10.json", {**tokens_answer(EVIL, [EVIL, *[f"</div>{EVIL}"] * 4]), "protocol": EVIL})
    write_json(run.path / "results" / "11.json", speed_answer(EVIL))
    run.write_status(RunStatus("failed", message=EVIL, warnings=(EVIL,)))
    return run


def test_what_comes_from_files_is_escaped():
    html = report_html(evil_run())
    assert_sound(html)
    assert EVIL not in html
    page = Page(html)
    assert "alert('x')" in page.text  # shown, as text
    assert len(page.all("img")) == 0
    types = [result.get("type") for result in page.all("script")]
    assert [kind for kind in types if kind != "application/json"] == [None, None]


def test_no_script_runs_but_the_two_of_the_page(page: Page):
    policy = next(str(result["content"]) for result in page.all("meta") if result.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_figures_can_stand_in_a_script_element():
    run = evil_run()
    search = run.config.search
    assert search is not None
    body = figure_json(history_figure(history(read_trials(run), search.objective)))
    assert "<" not in body
    assert "NaN" not in body
    assert (
        json.loads(body)["layout"]["template"] == {"data": {"scatter": [{"type": "scatter"}]}} or "template" in json.loads(body)["layout"]
    )


@pytest.mark.parametrize("name", ["model.json", "text.json", "calibration.json", "spectra.npz", "study.journal", "results/1.json"])
def test_a_damaged_file_is_a_clear_error(name: str, tmp_path: Path):
    run = make_run()
    write_answers(run)
    path = run.path / name
    path.write_bytes(b"{damaged\n{}\n")  # a journal may end in half a line, and in no more
    with pytest.raises(RunError, match=re.escape(path.name)):
        write_report(run, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"is no run: it has no run\.json"):
        report_html(Run(tmp_path))


def test_a_place_that_can_not_be_written_is_told(recorded: Run, tmp_path: Path):
    with pytest.raises(RunError, match=r"is a folder\. Give a file"):
        write_report(recorded, tmp_path)
    with pytest.raises(RunError, match=r"there is no folder .*missing\. Make it"):
        write_report(recorded, tmp_path / "missing" / "report.html")


def test_an_older_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, run = tmp_path / "report.html", make_run(search=False)
    out.write_text("older")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"No space left on device\. Free some space"):
        write_report(run, out)
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    write_report(run, out)
    assert out.read_text().startswith("<!DOCTYPE html>")


# --- tables and figures of its own -------------------------------------------------------------------------------------


def test_types_have_the_ends_and_the_middle_of_their_modules():
    result = type_table(spectra(), "effective_rank").set_index("type")
    assert list(result.index) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert (result["modules"] == 3).all()
    for source in ("features", "weights"):
        assert (result[f"{source}_least"] <= result[f"{source}_median"]).all()
        assert (result[f"{source}_median"] <= result[f"{source}_most"]).all()
    minimum = min_relative(spectra(), "effective_rank")
    assert result.loc[minimum.shape.kind.removesuffix("_proj"), "features_least"] == result["features_least"].min()


def test_the_dense_model_is_the_first_row_and_the_differences_are_from_it():
    run = make_run()
    write_answers(run)
    frame = measured_table(comparisons(results(run)))
    assert list(frame["form"]) == ["dense", "one-shot", "one-shot"]
    assert list(frame["perplexity"][1:] - frame["perplexity"][0]) == pytest.approx(list(frame["difference"][1:]))
    assert pd.isna(frame["difference"][0])
    assert measured_table([]).empty


def test_empty_tables_have_their_columns():
    assert list(unfinished_table([]).columns) == ["trial", "name", "state", "reason"]
    assert failures([]) == []
    run = make_run(search=False)
    assert written_models(run, []) == []
    assert list(seed_table({"a": {"seed": 1, "other": 2}, "b_seed": 3})["name"]) == ["a.seed", "b_seed"]


def test_the_figures_of_a_finished_search_hold_its_numbers():
    run = make_run(study=write_rich_study)
    trials = read_trials(run)
    figure = history_figure(history(trials, "kl"))
    points = {trace.name: trace for trace in figure.data}
    assert list(points["baseline"].y) == [0.41, 0.44, 0.36]
    assert len({trace.marker.symbol for name, trace in points.items() if name != "best so far"}) == len(points) - 1  # without the colour
    highest = max(value for trace in figure.data for value in trace.y if value == value)
    assert list(points["failed"].y) == [highest]
    assert len(figure.layout.annotations) == 3
    ranged = make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=6), study=write_front)
    view = front(read_trials(ranged), "kl")
    drawn = front_figure(view)
    assert list(drawn.data[0].x) == list(view.best["removed"])
    assert "Pareto front" in [trace.name for trace in drawn.data]


def test_a_search_without_a_value_is_drawn_without_a_warning():
    view = history(read_trials(make_run(study=write_rich_study)), "kl")
    nothing = replace(view, trials=view.trials[view.trials["kind"] == "failed"], baselines={})
    assert list(history_figure(nothing).data[-1].y) == [1.0]


# --- repeating ---------------------------------------------------------------------------------------------------------


def _configurations() -> Iterator[RunConfig]:
    yield RunConfig()
    yield RunConfig(search=SearchConfig(0.4, compression=CompressionConfig(basis="whitened", value_dense=False)))
    yield RunConfig(search=SearchConfig(0.4))
    yield RunConfig(ModelSource("some/model", "cpu", "bfloat16"), TextConfig("file:/a b/c.txt", context=32, seed=3, bos="none"))
    yield RunConfig(text=TextConfig(test_windows=7), search=SearchConfig(compression=PRESETS["svd"].compression))
    yield RunConfig(calibration=CalibrationConfig(group_size=8, batch_size=2, gradient_windows=9, gradient_seed=4, group_weights="dof"))
    yield RunConfig(search=SearchConfig(seed=4, compression=PRESETS["svd"].compression))
    yield RunConfig(search=SearchConfig(startup_trials=3, pruner="wilcoxon", compression=CompressionConfig(rank_multiple=4, fit_windows=5)))
    yield RunConfig(search=SearchConfig(projected=False, selected_windows=7, objective="bolaco"))
    yield RunConfig(search=replace(search_by(PRESETS["bolaco"], 0.2), projected=True, selected_windows=0, objective="perplexity"))
    for name, preset in PRESETS.items():
        search = search_by(preset, 0.35, seed=2)
        yield RunConfig(text=TextConfig(seed=2, calibration_windows=9), search=search, calibration=CalibrationConfig(robust="trimmed"))
        if name == "studio":
            yield RunConfig(search=replace(search, seed=0, max_ratio=0.5, space="types x 3", sampler="tpe", top_k=9, autocast=True))
            changed = replace(search.compression, gradient_damping=0.123456789, drift_beta=0.5)
            yield RunConfig(search=replace(search, seed=0, error_weights=True, confirmed=0, compression=changed))


@pytest.mark.parametrize("config", list(_configurations()))
def test_the_command_in_options_means_the_same_run(config: RunConfig):
    result = reproduction({"id": "run", "recorded": True}, config)
    arguments = parser().parse_args(shlex.split(result.options)[1:])
    search = None if config.search is None else _config(arguments)
    assert RunConfig(source_of(arguments), text_of(arguments), config_of(arguments, CalibrationConfig), search) == config


def test_the_commands_shown_are_ones_that_the_command_line_takes(page: Page):
    shown = [line for line in "\n".join(page.words).splitlines() if line.startswith("lowrank ") and "--" in line]
    assert {shlex.split(line)[1] for line in shown} == {"search", "export", "heal", "evaluate", "report"}
    for line in shown:
        parser().parse_args(shlex.split(line)[1:])


def test_a_worker_repeats_a_run_from_the_record_in_its_report(llama_checkpoint: Path, text_file: Path, tmp_path: Path):
    config = RunConfig(
        ModelSource(str(llama_checkpoint)),
        TextConfig(f"file:{text_file}", context=32, calibration_windows=16, validation_windows=2, test_windows=2),
        CalibrationConfig(group_size=8),
    )
    first = create_run(config, name="twice")
    run_worker(first, verbose=False)
    page = report(first)
    assert "--group-size 8" in page.text
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "run.json").write_text(page.files()["run.json"])
    again = open_run(tmp_path / "again")
    run_worker(again, verbose=False)
    repeated = report(again)
    for name in ("spectra.csv", "splits.csv", "scree.csv"):
        assert repeated.files()[name] == page.files()[name]


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_run_and_says_where(capsys: pytest.CaptureFixture[str]):
    run = make_run(search=False)
    assert main(["report", "--run", str(run.path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body == {"out": str(run.path / "report.html"), "bytes": (run.path / "report.html").stat().st_size, "run": str(run.path)}
    assert "demo on python-stdlib" in Page((run.path / "report.html").read_text(encoding="utf-8")).text


def test_the_recorded_run_is_reported_beside_the_reader(
    recorded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--run", str(recorded.path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert not (recorded.path / "report.html").exists()
    assert "open it in any browser" in capsys.readouterr().out


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
