"""Self-contained HTML report of a run: charts, tables, protocol, versions, seeds. Torch-free.

Everything shown comes from the typed tables and charts of ``studio``; nothing is computed here. What comes from
files is escaped by the template, and the page's own policy lets no script run but the two that are in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from lowrank_core import __version__
from lowrank_core.errors import RunError
from lowrank_core.runs import Run, bundled_path, open_run
from lowrank_core.runs.files import replace_file
from lowrank_core.studio.report.blocks import Facts, Note, Section, csv_link, metrics_in
from lowrank_core.studio.report.compare_section import healing_section, loss_section, second_text_section, speed_section, tokens_section
from lowrank_core.studio.report.model_section import calibration_section, model_section, spectra_section, text_section
from lowrank_core.studio.report.outcome_section import configuration_section, exports_section, measured_section, reproduction_section
from lowrank_core.studio.report.search_section import search_section
from lowrank_core.studio.shared.embedding import EMBED_CONFIG, figure_json, plotly_script
from lowrank_core.studio.shared.formatting import duration
from lowrank_core.studio.shared.run_list import STATE_WORDS, is_working, stages, status_words

__all__ = ["charts_html", "report_html", "write_report"]

_FOLDER = Path(__file__).resolve().parent
_SECTIONS = (
    *(model_section, text_section, calibration_section, spectra_section, search_section),
    *(measured_section, loss_section, second_text_section, tokens_section, speed_section, healing_section),
    *(exports_section, reproduction_section, configuration_section),
)
"""In the order of the story; one without anything to say is left out."""


def report_html(run: Run) -> str:
    """Return the report of ``run`` as one HTML page, about 5 MB of which plotly.js is 4.8.

    A stage that is not done yet is said to be missing; a run that is worked on is shown as it is now.

    Raises:
        RunError: the folder is no run, or a file in it is damaged.
        ConfigError: the ranks of a trial do not fit the model, or the database of the study can't be reached.
    """
    return _page(run, [_beginning(run), *(result for section in _SECTIONS if (result := section(run)).blocks)])


def charts_html(run: Run) -> str:
    """Return the charts of ``report_html`` alone, each with CSV data and SVG, PNG and HTML buttons.

    Raises:
        RunError, ConfigError: as ``report_html``.
    """
    sections = [replace(result, blocks=tuple(metrics_in(result.blocks))) for section in _SECTIONS if (result := section(run)).blocks]
    return _page(run, [section for section in sections if section.blocks])


def _page(run: Run, sections: Sequence[Section]) -> str:
    record = open_run(run.path).record
    style, script, plotly = _asset("style.css"), _asset("script.js"), plotly_script()
    return (
        _template()
        .render(
            name=str(record.get("name") or run.id),
            sections=sections,
            policy=_policy(plotly, script),
            style=Markup(style),
            script=Markup(script),
            plotly=Markup(plotly),
            config=Markup(json.dumps(EMBED_CONFIG)),
            logo=Markup(bundled_path("assets", "logo-mark.svg").read_text(encoding="utf-8")),
            version=__version__,
            written=_moment(time.time()),
        )
        .lstrip()
    )


def write_report(run: Run, out: Path) -> int:
    """Write the report of ``run`` to ``out``, whole or not at all, and return its size in bytes; an older one is replaced.

    Raises:
        RunError: as ``report_html``, or ``out`` can't be written.
        ConfigError: as ``report_html``.
    """
    out = out.absolute()
    if out.is_dir():
        raise RunError(f"{out} is a folder. Give a file with --out.")
    if not out.parent.is_dir():
        raise RunError(f"can't write {out}: there is no folder {out.parent}. Make it, or give another file with --out.")
    body = report_html(run).encode("utf-8")
    try:
        replace_file(out, body)
    except OSError as error:
        raise RunError(f"can't write {out}: {error.strerror}. Free some space, or give another file with --out.") from error
    return len(body)


def _beginning(run: Run) -> Section:
    """Return the section on the run and its state."""
    record, config, status = run.record, run.config, run.status()
    state = "recorded" if run.recorded else STATE_WORDS.get(status.state, status.state)
    search, took = config.search, stages(status)
    each = "".join(f"; {stage.name} {duration(stage.seconds)}" for stage in took)
    facts = Facts(
        {
            "Run": (run.id, "search for ranks" if search else "analysis of a model"),
            "State": (state, status.stage if is_working(status) else ""),
            "Started": (_moment(float(record.get("created", 0.0))), ""),
            "Time in stages": (
                duration(sum(stage.seconds for stage in took) if took else None),
                f"of the last worker, without trials{each}",
            ),
        }
    )
    notes = [Note("warning", warning) for warning in (*status.warnings, *status.dense_warnings)]
    if not run.recorded and is_working(status):
        now = " · ".join(word for word in (status.stage, status_words(status)) if word)
        notes.append(Note("warning", f"This run was running when the report was written ({now or state}): numbers are of that moment."))
    if status.state in ("failed", "interrupted"):
        notes.append(Note("error", f"This run {STATE_WORDS[status.state]}. {status.message}"))
    if status.state == "new" and not run.recorded:
        notes.append(Note("missing", f"This run has not begun: no worker took it up yet. `lowrank worker --run {run.path}` starts it."))
    return Section("run", "The run", "Run, times and state.", (facts, *notes))


def _moment(seconds: float) -> str:
    return time.strftime("%d %b %Y, %H:%M UTC", time.gmtime(seconds))


@cache
def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(csv_link=csv_link, figure_json=figure_json)
    return environment.get_template("page.html")


def _policy(*scripts: str) -> str:
    """Return the page's content security policy: no requests, only these scripts."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
