"""Loads each folder in every way that transformers has, without our package; prints a line of JSON for each. Run by tests in a process.

``python tests/plain_transformers.py FOLDER ...``; which transformers that is, PYTHONPATH says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


class Absent(MetaPathFinder):
    """Makes our package one that is not installed."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "lowrank_core":
            raise ModuleNotFoundError(name)
        return


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline  # noqa: E402


def ways() -> dict[str, Callable[[str], object]]:
    """Return name -> how a folder is loaded; the last as transformers' own server does it, with its own code where that can be imported."""
    result: dict[str, Callable[[str], object]] = {
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
        "AutoModel": AutoModel.from_pretrained,
        "device_map": lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"),
        "bfloat16": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        "pipeline": lambda folder: pipeline("text-generation", model=folder),
        "class": lambda folder: getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained(folder),
    }
    try:
        from transformers.cli.serving.model_manager import ModelManager

        served = ModelManager(device="cpu", trust_remote_code=True)
    except ImportError:  # its own dependencies (the extra "serving") are not installed
        return result
    return result | {"server": lambda folder: served.load_model_and_processor(f"{folder}@main")}


def outcome(load: Callable[[str], object], folder: str) -> str:
    try:
        load(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main() -> None:
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        result = {name: outcome(load, folder) for name, load in ways().items()}
        print(json.dumps({"folder": folder, "version": transformers.__version__, "ways": result}))
    sys.stdout.flush()
    os._exit(0)  # the server's clean-up waits five minutes in a thread


if __name__ == "__main__":
    main()
