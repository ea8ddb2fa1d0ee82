"""Whole recipes under one name: published ones as published, and ours. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from lowrank_core.config import CompressionConfig, SearchConfig, check_choice
from lowrank_core.presets.differences import DIFFERS

__all__ = ["DEFAULT_PRESET", "PRESETS", "VARIANTS", "Preset", "preset_named", "search_by"]


@dataclass(frozen=True)
class Preset:
    """A recipe without a search.

    Attributes:
        compression: basis, storage and what goes with them.
        allocation: name of the allocator.
        search: fields of ``SearchConfig`` in which a search by this recipe differs from the default.
        differs: in words, where this departs from the paper or its published code, and which of the two was taken; empty for ours.
    """

    name: str
    label: str
    reference: str
    compression: CompressionConfig
    allocation: str = "uniform"
    search: Mapping[str, object] = field(default_factory=dict)
    differs: str = ""


def _plain(basis: str, storage: str = "factored") -> CompressionConfig:
    return CompressionConfig(basis=basis, storage=storage, value_dense=False)


_ALL = 1_000_000
"""Fitted windows of methods that run all calibration windows through the compressed blocks."""

_STUDIO = CompressionConfig(basis="drift_aware:two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True)

_PRESETS = (
    Preset("studio", "Studio (default)", "this project", _STUDIO, allocation="lagrangian", search={"variables": "error_weight"}),
    Preset(
        "bolaco",
        "Bolaco, as published, fixed ratios",
        "arXiv 2405.10616",
        CompressionConfig(basis="pooled_feature", storage="factored", value_dense=True, rank_multiple=8),
        allocation="lord_manual",
        search={
            "objective": "bolaco",
            "sampler": "gp",
            "startup_trials": 3,
            "trials": 50,
            "space": "5x1",
            "projected": False,
            "selected_windows": 100,
        },
    ),
    Preset("svd", "Weight SVD", "Eckart & Young 1936", _plain("weight_svd")),
    Preset("fwsvd", "FWSVD", "arXiv 2207.00112", _plain("fisher_rows")),
    Preset("asvd", "ASVD", "arXiv 2312.05821", _plain("activation_scaled"), allocation="truncation_search"),
    Preset("svd_llm", "SVD-LLM", "arXiv 2403.07378", _plain("whitened")),
    Preset("pifa", "SVD-LLM in PIFA's storage", "arXiv 2501.19090", _plain("whitened", "pivoted")),
    Preset(
        "mpifa",
        "MPIFA",
        "arXiv 2501.19090",
        CompressionConfig(basis="refitted", storage="pivoted", value_dense=False, drift_beta=0.25, fit_windows=_ALL),
    ),
    Preset("svd_llm_v2", "SVD-LLM V2's ratios", "arXiv 2503.12340", _plain("whitened"), allocation="svd_llm_v2"),
    Preset("welore", "WeLore's threshold", "arXiv 2407.11239", _plain("weight_svd"), allocation="threshold"),
    Preset("io_svd", "IO-SVD", "arXiv 2605.15626", _plain("two_sided_half")),
    Preset(
        "lems",
        "LEMS",
        "LEMS, ICML 2026",
        CompressionConfig(
            basis="two_sided_uncentred",
            storage="factored",
            value_dense=False,
            rank_multiple=8,
            gradient_damping=1e-6,
            input_shrinkage=0.1,
            gradient_shrinkage=0.3,
            robust_gradients=True,
        ),
        allocation="lems",
        search={
            "variables": "error_weight",
            "space": "depth",
            "sampler": "tpe",
            "trials": 10,
            "error_weights": True,
            "deep_weights": True,
        },
    ),
    Preset("modegpt", "MoDeGPT", "arXiv 2408.09632", replace(_plain("whitened"), modules=True), allocation="block_influence"),
    Preset("aa_svd", "AA-SVD", "arXiv 2604.02119", replace(_plain("drift_aware"), fit_windows=_ALL)),
    Preset("basis_sharing", "Basis Sharing", "arXiv 2410.03765", _plain("cross_layer")),
    Preset("data_free", "Data-free joint rank-k", "arXiv 2402.16319", _plain("data_free_joint")),
)


def _variant(name: str, words: str, allocation: str = "lagrangian", **changes: object) -> Preset:
    return Preset(f"studio {name}", f"Studio, {words}", "this project", replace(_STUDIO, **changes), allocation)  # type: ignore[arg-type]


_VARIANTS = (
    _variant("one-shot", "not fitted block by block", basis="two_sided"),
    _variant("no heads", "without per-head factors", heads=False),
    _variant("no stacks", "without stacks", stacks=False),
    _variant("singles", "without stacks and per-head factors", stacks=False, heads=False),
    _variant("factored", "plain factors, single matrices", storage="factored", stacks=False, heads=False),
    _variant("uniform", "uniform ranks, single matrices", "uniform", stacks=False, heads=False),
    _variant("energy", "equal retained energy, single matrices", "energy", stacks=False, heads=False),
    _variant("influence", "ranks by block influence, single matrices", "block_influence", stacks=False, heads=False),
    _variant("half", "γ = ½", basis="drift_aware:two_sided_half"),
    _variant("whitened", "one-sided: raw output errors traded", basis="drift_aware"),
    _variant("lems", "ranks by LEMS, single matrices", "lems", stacks=False, heads=False),
    _variant("robust", "robust token weights in gradients", robust_gradients=True),
    _variant("shrunk", "gradients shrunk by 0.3", gradient_damping=1e-6, gradient_shrinkage=0.3),
    _variant("less damping", "gradient damping 0.001", gradient_damping=1e-3),
    _variant("more damping", "gradient damping 0.1", gradient_damping=1e-1),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: replace(preset, differs=DIFFERS.get(preset.name, "")) for preset in _PRESETS}
)
DEFAULT_PRESET = PRESETS["studio"]

VARIANTS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _VARIANTS})
"""Our default with a part left out or changed: what each part is worth, for `lowrank benchmark quality --variants`."""


def search_by(preset: Preset, compression_ratio: float, *, seed: int = 0) -> SearchConfig:
    """Return the search that ``preset`` stands for."""
    given = {"compression_ratio": compression_ratio, "seed": seed, "compression": preset.compression, **preset.search}
    return replace(SearchConfig(), **given)  # type: ignore[arg-type]


def preset_named(name: str) -> Preset:
    """Return the preset ``name``.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    check_choice("preset", name, PRESETS)
    return PRESETS[name]
