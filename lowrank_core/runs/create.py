"""Creation of a run: a folder with everything a worker needs."""

from __future__ import annotations

import platform
import re
import secrets
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from lowrank_core.config import RunConfig, to_mapping
from lowrank_core.errors import RunError
from lowrank_core.runs.files import write_json
from lowrank_core.runs.paths import home
from lowrank_core.runs.run import Run
from lowrank_core.wording import given_percent

__all__ = ["create_run"]

_PACKAGES = ("torch", "transformers", "optuna", "numpy", "streamlit")


def create_run(config: RunConfig, *, name: str = "", path: Path | None = None) -> Run:
    """Create a run directory, under the home unless ``path`` is given.

    Raises:
        RunError: the folder holds something already, or can't be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = path.absolute() if path is not None else home() / "runs" / f"{stamp}-{secrets.token_hex(2)}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty. Give a new folder, or resume the run in it with `lowrank worker --run {folder}`.")
    record = {
        "id": folder.name,
        "name": name or _default_name(config),
        "kind": "search" if config.search else "analysis",
        "created": time.time(),
        "config": to_mapping(_anchored(config)),
        "versions": _versions(),
        "recorded": False,
    }
    write_json(folder / "run.json", record)
    return Run(folder)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lowrank-studio", *_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _anchored(config: RunConfig) -> RunConfig:
    """Return ``config`` with absolute paths: a worker may start in another folder."""
    model, text = config.model.reference, config.text.reference
    if model != "demo" and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    name, _, place = text.partition(":")
    if place:
        text = f"{name}:{Path(place).expanduser().absolute()}"
    return replace(config, model=replace(config.model, reference=model), text=replace(config.text, reference=text))


def _default_name(config: RunConfig) -> str:
    model = re.split(r"[\\/]", config.model.reference.rstrip("\\/"))[-1]
    text = re.split(r"[\\/]", config.text.reference)[-1]
    if config.search is None:
        return f"{model} on {text}"
    maximum = config.search.max_ratio
    ratios = given_percent(config.search.compression_ratio) + (f" to {given_percent(maximum)}" if maximum is not None else "")
    return f"{model} on {text}, {ratios} removed"
