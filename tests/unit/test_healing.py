"""Healing: what is trained ends up in the factors, the size stays, the best state is kept, and a killed training goes on."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY
from torch import nn

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.quantization import grids_of, quantized_handle
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.config.healing import HEALER_LABELS, HealingConfig
from lowrank_core.errors import Cancelled, ConfigError, ModelError, RunError
from lowrank_core.evaluation import evaluate
from lowrank_core.healing.base import distillation_loss
from lowrank_core.healing.diagonal import DiagonalAdapter
from lowrank_core.healing.healers import HEALERS
from lowrank_core.healing.optimizers import adam, packed_state, soap, unpacked_state
from lowrank_core.healing.rates import measured_rate
from lowrank_core.healing.trainer import Healed, heal
from lowrank_core.layers.base import CompressedModule
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.runs.healing_records import read_history, read_report, write_report
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

FORMS = {
    "factored": CompressionConfig(basis="whitened", value_dense=False),
    "pivoted": CompressionConfig(basis="whitened", storage="pivoted", value_dense=False),
    "centred": CompressionConfig(basis="pooled_feature", storage="pivoted", value_dense=False),
    "stacks": CompressionConfig(basis="shared_input:whitened", storage="pivoted", value_dense=False),
}
QUICK = HealingConfig(steps=12, batch_size=4, validate_every=4, learning_rate=1e-3, cross_entropy=0.0)
LONGER = replace(QUICK, steps=48, validate_every=12, learning_rate=None)


PAIRS = [
    *(("distill", form) for form in FORMS),
    ("diagonal", "factored"),
    ("diagonal", "stacks"),
    ("lora", "pivoted"),
    ("lora", "stacks"),
    ("blockwise", "factored"),
    ("blockwise", "centred"),
]
"""Each method with one of the plain forms and each form with two methods; what differs between the forms, the fold, has a test of all."""


def compressed(handle: ModelHandle, windows: WindowSet, form: str = "pivoted") -> ModelHandle:
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=8))
    decomposed = decompose(handle, statistics, FORMS[form])
    return decomposed.compress(decomposed.allocate("uniform", 0.5), windows).handle


@pytest.fixture(scope="module")
def forms(llama: ModelHandle, windows: WindowSet) -> dict[str, ModelHandle]:
    """The tiny Llama in every form; healing leaves what it is given as it was."""
    return {form: compressed(llama, windows, form) for form in FORMS}


@pytest.fixture(scope="module")
def per_head(llama: ModelHandle, windows: WindowSet) -> CompressedModel:
    """A model with value and output projections by head, and singles next to."""
    statistics = collect_statistics(llama, windows, CalibrationConfig(group_size=8))
    config = CompressionConfig(basis="whitened", storage="pivoted", value_dense=False, heads=True)
    decomposed = decompose(llama, statistics, config)
    heads = [unit.name for unit in decomposed.units if unit.storage == "per_head"]
    fixed: dict[str, int | None] = dict.fromkeys(heads, 5)
    return decomposed.compress(decomposed.allocate("lagrangian", 0.4, fixed=fixed), windows)


@pytest.fixture(scope="module")
def texts(windows: WindowSet) -> tuple[WindowSet, WindowSet]:
    """Windows to train on, and others to validate on; the models are compressed on yet others."""
    ids = torch.randint(0, VOCABULARY, (160, 16), generator=torch.Generator().manual_seed(4))
    return replace(windows, ids=ids[:140]), replace(windows, split="validation", ids=ids[140:])


@pytest.fixture(scope="module")
def small(forms: dict[str, ModelHandle]) -> ModelHandle:
    return forms["pivoted"]


def logits(module: nn.Module, windows: WindowSet) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(input_ids=windows.ids[:4]).logits
    return result


def weights(handle: ModelHandle) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in handle.module.state_dict().items()}


def test_the_loss_is_the_divergence_at_a_temperature_and_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    result, target = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    divergence, entropy = 0.0, 0.0
    for row in range(2):
        for place in range(3):
            p, q = (torch.softmax(z[row, place].double() / 2.0, -1) for z in (target, result))
            divergence += float((p * (p / q).log()).sum()) / 6
            entropy -= float(torch.softmax(result[row, place].double(), -1)[tokens[row, place]].log()) / 6
    assert float(distillation_loss(result, target, tokens, 2.0, 0.0)) == pytest.approx(4 * divergence, rel=1e-5)
    assert float(distillation_loss(result, target, tokens, 2.0, 0.3)) == pytest.approx(4 * divergence + 0.3 * entropy, rel=1e-5)
    assert float(distillation_loss(target, target, tokens, 2.0, 0.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("method", "form"), PAIRS)
def test_healing_lowers_the_divergence_and_keeps_the_size(
    method: str, form: str, llama: ModelHandle, forms: dict[str, ModelHandle], texts: tuple[WindowSet, WindowSet]
):
    model = forms[form]
    before, dense_before = weights(model), weights(llama)
    healed = heal(model, llama, texts, replace(LONGER, method=method))
    report = healed.report
    if (method, form) == ("lora", "stacks"):  # the factor that a stack shares has no adapter: too little is left on so small a model
        assert report.kl_after <= report.kl_before
    else:
        assert report.kl_after < report.kl_before
        assert report.best_step > 0
    assert healed.handle.parameters == model.parameters
    assert healed.handle.linear_parameters == model.linear_parameters
    assert evaluate(healed.handle, texts[1], against=llama).kl == pytest.approx(report.kl_after, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in healed.handle.module.parameters())
    assert {type(child) for child in healed.handle.module.modules()} == {type(child) for child in model.module.modules()}
    for kept, handle in ((before, model), (dense_before, llama)):
        assert all(torch.equal(value, kept[name]) for name, value in handle.module.state_dict().items())


@pytest.mark.parametrize("method", HEALERS)
def test_factors_by_head_are_healed(method: str, per_head: CompressedModel, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    healed = heal(per_head.handle, llama, texts, replace(LONGER, method=method))
    assert healed.report.kl_after < healed.report.kl_before
    assert healed.handle.parameters == per_head.handle.parameters


@pytest.mark.parametrize(("method", "name"), [*((method, "gpt2") for method in HEALERS), ("distill", "qwen2")])
def test_other_architectures_are_healed(
    method: str, name: str, windows: WindowSet, texts: tuple[WindowSet, WindowSet], request: pytest.FixtureRequest
):
    dense = load_model(ModelSource(str(request.getfixturevalue(f"{name}_checkpoint"))))
    report = heal(compressed(dense, windows), dense, texts, replace(QUICK, method=method)).report
    assert report.kl_after <= report.kl_before
    assert len(report.history) == 4


def test_only_what_a_method_names_is_changed(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    healed = heal(small, llama, texts, replace(QUICK, learning_rate=1e-4)).handle
    before, layers = weights(small), {n for n, m in small.module.named_modules() if isinstance(m, CompressedModule)}
    changed = {name for name, value in healed.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.rpartition(".")[0] in layers for name in changed)


@pytest.mark.parametrize("method", ["diagonal", "lora"])
def test_what_is_beside_the_factors_folds_into_them(method: str, forms: dict[str, ModelHandle], windows: WindowSet):
    for handle in forms.values():
        module = copy.deepcopy(handle.module)
        plain = logits(module, windows)
        student = HEALERS[method].student(module, HealingConfig(method=method))
        assert torch.allclose(logits(student.module, windows), plain, atol=1e-5)  # at first it changes nothing
        with torch.no_grad():
            for parameter in student.trained.values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        expected = logits(student.module, windows)
        assert not torch.allclose(expected, plain, atol=1e-3)
        folded = student.fold()
        assert torch.allclose(logits(folded, windows), expected, atol=2e-4 * float(expected.abs().max()))
        assert not any(isinstance(child, DiagonalAdapter) or "lora" in type(child).__module__ for child in folded.modules())


def test_diagonals_are_far_fewer_than_factors(llama: ModelHandle, forms: dict[str, ModelHandle], texts: tuple[WindowSet, WindowSet]):
    small = forms["factored"]
    counts = {m: heal(small, llama, texts, replace(QUICK, method=m, steps=1)).report.trained_parameters for m in ("distill", "diagonal")}
    layers = [child for child in small.module.modules() if isinstance(child, CompressedModule)]
    assert counts["diagonal"] == sum(layer.out_features + layer.rank for layer in layers)
    assert counts["distill"] == sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def test_a_block_learns_nothing_from_the_blocks_after_it(small: ModelHandle, llama: ModelHandle, windows: WindowSet):
    module = copy.deepcopy(small.module)
    healer = HEALERS["blockwise"]
    student = healer.student(module, HealingConfig(method="blockwise"))
    first = {name: value for name, value in student.trained.items() if ".layers.0." in name}

    def gradients() -> dict[str, torch.Tensor]:
        result = torch.autograd.grad(healer.loss(student.module, llama.module, windows.ids[:4], HealingConfig()), list(first.values()))
        return dict(zip(first, result, strict=True))

    before = gradients()
    with torch.no_grad():
        for name, value in student.trained.items():
            if ".layers.1." in name:
                value *= 1.5
    assert before
    assert all(torch.allclose(value, before[name], atol=1e-7) for name, value in gradients().items())
    assert all(float(value.abs().max()) > 0 for value in before.values())


def test_the_best_state_is_kept_not_the_last(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    config = replace(QUICK, steps=40, learning_rate=0.1, warmup=0.9, validate_every=2, patience=4)
    report = heal(small, llama, texts, config).report
    best = min(report.history, key=lambda point: point.kl)
    assert report.best_step == best.step
    assert report.kl_after == pytest.approx(best.kl, rel=1e-4)
    assert report.stopped == "patience"
    assert report.steps == best.step + 8
    assert report.history[-1].kl > best.kl


def test_where_nothing_is_better_the_model_is_given_back(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    healed = heal(small, llama, texts, replace(QUICK, learning_rate=5.0, patience=2))
    assert healed.handle is small
    assert healed.report.best_step == 0
    assert healed.report.kl_after == healed.report.kl_before
    assert healed.report.recovered == 0


def test_a_training_that_diverges_says_so_and_loses_nothing(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    healed = heal(small, llama, texts, replace(QUICK, learning_rate=1e30, patience=50))
    assert healed.report.stopped == "diverged"
    assert healed.report.kl_after <= healed.report.kl_before


def test_validation_chooses_by_the_objective(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    config = replace(QUICK, cross_entropy=0.5)
    assert config.figure(0.2, 3.0) == pytest.approx(1.7)
    assert replace(config, criterion="kl").figure(0.2, 3.0) == 0.2
    report = heal(small, llama, texts, config).report
    best = min(report.history, key=lambda point: point.kl + 0.5 * point.nll)
    assert report.best_step == best.step
    assert (report.kl_after, report.nll_after) == pytest.approx((best.kl, best.nll), rel=1e-4)


def test_perplexity_can_be_the_criterion(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet]):
    report = heal(small, llama, texts, replace(QUICK, criterion="perplexity", cross_entropy=1.0, learning_rate=3e-3)).report
    assert report.nll_after < report.nll_before
    assert report.nll_after == pytest.approx(min(point.nll for point in report.history), rel=1e-4)


def stopped_at(step: int, *arguments: object, **options: object) -> None:
    def cancel(done: int, total: int) -> None:
        if done == step:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        heal(*arguments, **options, progress=cancel)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", HEALERS)
def test_a_healing_that_was_stopped_goes_on_to_the_same_end(
    method: str, small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet], tmp_path: Path
):
    config = replace(QUICK, method=method)
    whole = heal(small, llama, texts, config)
    stopped_at(6, small, llama, texts, config, folder=tmp_path)
    assert [point.step for point in read_history(tmp_path)] == [0, 4]
    steps: list[int] = []
    resumed = heal(small, llama, texts, config, folder=tmp_path, progress=lambda done, total: steps.append(done))
    assert steps == list(range(5, 13))  # step 5 and 6 were lost, nothing before
    assert same(whole, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def same(one: Healed, other: Healed) -> bool:
    timeless = [[replace(point, seconds=0.0) for point in healed.report.history] for healed in (one, other)]
    states = [healed.handle.module.state_dict() for healed in (one, other)]
    return timeless[0] == timeless[1] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_another_healing_does_not_go_on_from_here(
    small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet], tmp_path: Path
):
    stopped_at(6, small, llama, texts, QUICK, folder=tmp_path)
    with pytest.raises(RunError, match="belongs to another healing"):
        heal(small, llama, texts, replace(QUICK, seed=1), folder=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x80\x04 no safetensors")
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged.*Delete it"):
        heal(small, llama, texts, QUICK, folder=tmp_path)


def test_a_report_is_read_as_it_was_written(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet], tmp_path: Path):
    assert read_report(tmp_path) is None
    report = heal(small, llama, texts, QUICK).report
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report
    (tmp_path / "report.json").write_text('{"method": "distill"}')
    with pytest.raises(RunError, match=r"report\.json has no 'label'.*Delete the folder, and heal again"):
        read_report(tmp_path)


def test_windows_come_in_an_order_of_their_own_in_every_epoch(
    small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet], monkeypatch: pytest.MonkeyPatch
):
    seen: list[torch.Tensor] = []
    healer = HEALERS["distill"]
    plain = type(healer).loss

    def loss(self: object, student: object, dense: object, ids: torch.Tensor, config: object) -> torch.Tensor:
        seen.append(ids)
        return plain(healer, student, dense, ids, config)  # type: ignore[arg-type]

    monkeypatch.setattr(type(healer), "loss", loss)
    heal(small, llama, texts, replace(QUICK, steps=70, validate_every=70))
    first, second = torch.cat(seen[:35]), torch.cat(seen[35:])
    assert not torch.equal(first, second)
    for epoch in (first, second):  # 140 windows, 4 in a step: each once
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, texts[0].ids.tolist()))


def test_what_can_not_be_healed_is_refused(small: ModelHandle, llama: ModelHandle, texts: tuple[WindowSet, WindowSet], tmp_path: Path):
    with pytest.raises(ConfigError, match="no compressed layer"):
        heal(llama, llama, texts, QUICK)
    with pytest.raises(ConfigError, match="quantised factors can't be trained"):
        heal(quantized_handle(small, grids_of(small, "int4", "none")), llama, texts, QUICK)
    with pytest.raises(ConfigError, match="windows of two splits"):
        heal(small, llama, (texts[0], texts[0]), QUICK)
    other = load_model(ModelSource(llama.reference))
    other.module.config.vocab_size = 7
    with pytest.raises(ModelError, match="different vocabularies"):
        heal(small, other, texts, QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"criterion": "luck"}, "criterion must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning rate must be a positive number"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"cross_entropy": -1.0}, "from 0 up"),
        ({"warmup": 1.0}, "warm-up is a fraction"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        HealingConfig(**changes)  # type: ignore[arg-type]


def test_the_rate_rises_on_a_line_and_falls_as_a_cosine_to_nothing():
    config = HealingConfig(steps=100, warmup=0.1)
    rates = [config.rate_at(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[54] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def matrix_regression(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> tuple[float, torch.optim.Optimizer]:
    """Fit a matrix whose inputs and outputs have a few large directions, none of them an axis; return the loss left, as a share."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(12, 12, generator=generator))[0] for _ in range(2)]
    inward, outward = (turn @ torch.diag(torch.logspace(0, -2, 12)) @ turn.T for turn in turns)
    wanted = torch.randn(12, 12, generator=generator)
    value = nn.Parameter(torch.zeros(12, 12))
    optimizer = make([value])
    start = float((outward @ wanted @ inward).square().sum())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        loss = (outward @ (value - wanted) @ inward).square().sum()
        loss.backward()
        optimizer.step()
    return float(loss.detach()) / start, optimizer


def test_soap_finds_the_directions_that_adam_can_not():
    (turned, _), (plain, _) = matrix_regression(soap, 120), matrix_regression(adam, 120)
    assert turned < 0.2 * plain


@pytest.mark.parametrize("make", [adam, soap])
def test_the_state_of_an_optimiser_is_packed_and_unpacked(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
    _, optimizer = matrix_regression(make, 25)
    tensors, words = packed_state(optimizer)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    result = unpacked_state(tensors, json.loads(json.dumps(words)))
    other = make([nn.Parameter(torch.zeros(12, 12))])
    other.load_state_dict(result)  # type: ignore[arg-type]
    again, _ = packed_state(other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    with pytest.raises(KeyError):
        unpacked_state({}, words)


def test_the_measured_rate_is_that_of_the_curvature():
    values = {"x": nn.Parameter(torch.tensor([0.3, -0.2, 0.7]))}
    start, curvature = values["x"].detach().clone(), 50.0

    def divergence() -> float:
        moved = values["x"].detach() - start
        return 0.02 + float(moved @ torch.tensor([3.0, 1.0, -2.0])) + curvature * float(moved @ moved)

    rate = measured_rate(values, divergence, 0)
    assert 3 * curvature * (20 * rate) ** 2 == pytest.approx(0.1 * 0.02, rel=0.01)  # the slope, of either sign, is averaged away
    assert torch.equal(values["x"], start)


def test_every_healer_has_a_label():
    assert set(HEALERS) == set(HEALER_LABELS)
    assert all(healer.label == HEALER_LABELS[name] for name, healer in HEALERS.items())
