"""Run directories: the one place where the dashboard, the command line and the worker meet. Torch-free.

::

    $LOWRANK_HOME (default ~/.cache/lowrank)
    ├── runs/<id>/
    │   ├── run.json         config, name, time, versions; a search that is extended is changed here
    │   ├── notes.json       what the user noted on it
    │   ├── storage.json     where the study is, if not here; may hold a password, so only its owner reads it
    │   ├── status.json      state, stage, progress, heartbeat; replaced atomically by the worker
    │   ├── model.json       what the model is made of              ─┐
    │   ├── text.json        splits, windows, tokens, hashes         │ written by the worker,
    │   ├── calibration.json summary of the statistics               │ each when its stage is done
    │   ├── selection.json   windows that a search as published took  │
    │   ├── weight_spectra.npz  singular values alone, until then    │
    │   ├── spectra.npz      singular values and eigenvalues         │
    │   ├── curves.npz       errors by unit and rank                 │
    │   ├── study.journal    the Optuna study                       ─┘
    │   ├── identity.json    hashes of model, tokens and statistics: nothing is measured with others
    │   ├── events.jsonl     what happened, in order
    │   ├── workers/         what each further worker says of itself
    │   ├── paused           while it is there, no trial is started
    │   ├── requests/        what users ask of the worker (one JSON file each)
    │   ├── results/         its answers, under the same names
    │   ├── exports/         compressed models
    │   ├── sensitivity/     what modules cost when they alone are compressed, cell by cell
    │   └── worker.log
    ├── stage_times.json     what stages took on this machine, for estimates
    └── statistics/<key>/    calibration results by content, with checksums, shared by runs
"""

from lowrank_core.runs.create import create_run
from lowrank_core.runs.files import JsonMapping, read_json, write_json
from lowrank_core.runs.find import list_runs, open_run, recorded_run
from lowrank_core.runs.paths import bundled_path, home, statistics_home
from lowrank_core.runs.run import Run
from lowrank_core.runs.status import ACTIVE_STATES, RunStatus, process_started

__all__ = [
    "ACTIVE_STATES",
    "JsonMapping",
    "Run",
    "RunStatus",
    "bundled_path",
    "create_run",
    "home",
    "list_runs",
    "open_run",
    "process_started",
    "read_json",
    "recorded_run",
    "statistics_home",
    "write_json",
]
