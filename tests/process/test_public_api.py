"""What ``import lowrank_core as lr`` gives: every name lazily, and a notebook of ten lines."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lowrank_core as lr
from lowrank_core.compression import pipeline as module


def _fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_import_is_light_and_knows_its_names():
    _fresh(
        "import sys; before = set(sys.modules); import lowrank_core as lr\n"
        "heavy = {'torch', 'transformers', 'numpy', 'optuna'} & set(sys.modules); assert not heavy, heavy\n"
        "ours = sorted(name for name in sys.modules if name.startswith('lowrank_core')); assert ours == ['lowrank_core'], ours\n"
        "assert set(lr.__all__) <= set(dir(lr)); lr.PRESETS, lr.METRICS, lr.ALLOCATORS, lr.SearchConfig, lr.list_runs\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )


@pytest.mark.parametrize("name", lr.__all__)
def test_every_name_is_there(name: str):
    assert name in dir(lr)
    assert getattr(lr, name) is getattr(lr, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = lr.nothing_like_it


def test_export_is_a_function_and_a_package_in_any_order():
    package = importlib.import_module("lowrank_core.export")
    assert lr.export is package
    assert callable(lr.export)
    assert package.check_free
    _fresh("import lowrank_core as lr; first = lr.export; import lowrank_core.export as package; assert first is lr.export is package")


@pytest.mark.parametrize(
    "first", ["import lowrank_core.models.hf", "import transformers, lowrank_core", "import lowrank_core as lr; lr.Pipeline"]
)
def test_the_format_is_registered(first: str):
    _fresh(f"{first}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nassert 'lowrank' in AUTO_QUANTIZER_MAPPING")


def test_nothing_hooks_into_imports():
    _fresh("import sys; before = list(sys.meta_path); import lowrank_core; assert sys.meta_path == before")


def test_a_notebook_calibrates_once(llama_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: Counter[str] = Counter()
    for name in ("cached_statistics", "decompose"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, original=original, **k: (calls.update([name]), original(*a, **k))[1])
    text = lr.TextConfig(f"file:{text_file}", context=32, calibration_windows=16, validation_windows=4, test_windows=4)
    p = lr.Pipeline(str(llama_checkpoint), text)
    for ratio in (0.2, 0.4):
        model = p.compress(ratio)
        report = lr.evaluate(model.handle, p.windows.test, against=p.handle)
        assert report.kl is not None
        manifest = lr.export(model, tmp_path / f"{ratio}")
        assert manifest.guards > 0
        loaded = lr.load_model(lr.ModelSource(str(tmp_path / f"{ratio}")))
        assert loaded.parameters == model.report.parameters_after
    assert calls == {"cached_statistics": 1, "decompose": 1}
