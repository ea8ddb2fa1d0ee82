"""Folders of factors that other projects write: opened, they compute the products of their factors, and count what they hold.

Each form is written here by a few lines of its own, from what the projects' public code saves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import save_tokenizer, small_llama
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lowrank_core.allocation import read_ranks
from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.errors import LowRankError
from lowrank_core.export.manifest import read_manifest, report_of
from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.models import load_model
from lowrank_core.models.headers import check_headers, vllm_dtype
from lowrank_core.studio.overview.checkpoint import read_model

Halves = Mapping[str, tuple[Tensor, Tensor]]
RANK = 5


def _dense(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        config = Qwen2Config(**{**small_llama().to_diff_dict(), "model_type": "qwen2"})
        return Qwen2ForCausalLM(config)
    if kind == "opt":
        sizes = {"vocab_size": 300, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 80, "num_hidden_layers": 2}
        return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))
    return LlamaForCausalLM(small_llama())


def _factored(model: PreTrainedModel, head: bool) -> Halves:
    """Put products of factors, of ranks that differ, in place of the matrices of ``model``; return them."""
    halves = {}
    if head:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # some are tied to the embedding
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and (head or name != "lm_head") and not name.endswith("layers.1.self_attn.k_proj"):
            rank = RANK + len(halves) % 3
            halves[name] = torch.randn(child.out_features, rank) / 4, torch.randn(rank, child.in_features) / 4
            child.weight.data = halves[name][0] @ halves[name][1]
            if child.bias is not None:
                child.bias.data.normal_()
    return halves


def _rest(model: PreTrainedModel, halves: Halves) -> dict[str, Tensor]:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in halves and name not in tied}


def _biases(model: PreTrainedModel, halves: Halves) -> dict[str, Tensor]:
    return {name: bias.data for name in halves if (bias := model.get_submodule(name).bias) is not None}


def _lems(model: PreTrainedModel, halves: Halves) -> tuple[dict[str, object], dict[str, Tensor]]:
    tensors = _rest(model, halves) | {f"{name}.bias": bias for name, bias in _biases(model, halves).items()}
    for name, (up, down) in halves.items():
        tensors |= {f"{name}.mod_a.weight": down, f"{name}.mod_b.weight": up}
    config = {
        "model_type": "low_rank_compressed",
        "auto_map": {"AutoConfig": "configuration_low_rank.LowRankConfig", "AutoModelForCausalLM": "modeling_low_rank.LowRankCausalLM"},
        "base_config": model.config.to_dict(),
        "base_model_type": model.config.model_type,
        "rank_dict": {name: down.shape[0] for name, (_, down) in halves.items()},
    }
    return config, {f"wrapped_model.{name}": tensor for name, tensor in tensors.items()}


def _ab(key: str, entry: Callable[[int], object]) -> Callable[[PreTrainedModel, Halves], tuple[dict[str, object], dict[str, Tensor]]]:
    def written(model: PreTrainedModel, halves: Halves) -> tuple[dict[str, object], dict[str, Tensor]]:
        tensors = _rest(model, halves) | {f"{name}.ALinear.bias": bias for name, bias in _biases(model, halves).items()}
        for name, (up, down) in halves.items():
            tensors |= {f"{name}.ALinear.weight": up, f"{name}.BLinear.weight": down}
        code = {
            "AutoConfig": "configuration_asvd_llama.ASVDLlamaConfig",
            "AutoModelForCausalLM": "modeling_asvd_llama.ASVDLlamaForCausalLM",
        }
        changed = {"architectures": ["ASVDLlamaForCausalLM"], "auto_map": code, key: {n: entry(len(d)) for n, (_, d) in halves.items()}}
        return {**model.config.to_dict(), **changed}, tensors

    return written


def _svd_llm(model: PreTrainedModel, halves: Halves) -> tuple[dict[str, object], dict[str, Tensor]]:
    tensors = _rest(model, halves)
    for name, (up, down) in halves.items():
        stem = name.removesuffix("_proj")
        tensors |= {f"{stem}_u_proj.weight": up, f"{stem}_v_proj.weight": down}
    tensors |= {f"{name.removesuffix('_proj')}_u_proj.bias": bias for name, bias in _biases(model, halves).items()}
    return model.config.to_dict(), tensors


def _svd_llm_ranks(model: PreTrainedModel, halves: Halves) -> tuple[dict[str, object], dict[str, Tensor]]:
    tensors = _rest(model, halves)
    for name, (up, down) in halves.items():
        tensors |= {f"{name}.u_proj.weight": up, f"{name}.v_proj.weight": down}
    changed = {"model_type": f"svdllm-{model.config.model_type}", "svd_ranks": {name: len(down) for name, (_, down) in halves.items()}}
    return {**model.config.to_dict(), **changed}, tensors


FORMS = {
    "LEMS": _lems,
    "ASVD": _ab("truncation_ranks", int),
    "LowRankArena": _ab("low_rank_modules", lambda rank: {"rank": rank}),
    "SVD-LLM": _svd_llm,
    "SVD-LLM ranks": _svd_llm_ranks,
}


def _save(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return save_tokenizer(folder, text)


def _written(form: str, folder: Path, text: str, kind: str = "llama") -> tuple[PreTrainedModel, Halves, Path]:
    model = _dense(kind).eval()
    halves = _factored(model, head=form == "ASVD")  # which compresses the output head, too
    return model, halves, _save(folder, *FORMS[form](model, halves), text)


CASES = [
    *((form, "llama") for form in FORMS),
    ("LEMS", "qwen2"),
    ("ASVD", "qwen2"),
    ("ASVD", "opt"),
    ("SVD-LLM", "qwen2"),
    ("SVD-LLM", "opt"),
]


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_folder_of_others_computes_the_products_of_its_factors_and_counts_them(form: str, kind: str, tmp_path: Path, sample_text: str):
    model, halves, folder = _written(form, tmp_path / "folder", sample_text, kind)
    handle = load_model(str(folder))
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(handle.module(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    ours = {name: child for name, child in handle.module.named_modules() if isinstance(child, LowRankLinear)}
    assert {name: child.rank for name, child in ours.items()} == {name: len(down) for name, (_, down) in halves.items()}
    saved = sum(up.shape[0] * down.shape[1] - up.numel() - down.numel() for up, down in halves.values())
    assert handle.parameters == sum(parameter.numel() for parameter in model.parameters()) - saved
    assert type(handle.module) is type(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_dashboard_reads_from_headers_what_is_loaded(form: str, tmp_path: Path, sample_text: str):
    _, _, folder = _written(form, tmp_path / "folder", sample_text)
    handle, facts = load_model(str(folder)), read_model(folder).facts
    assert (facts.parameters, facts.bytes) == (handle.parameters, handle.bytes)
    assert {shape.name for shape in facts.matrices} == {shape.name for shape in handle.shapes}
    assert facts.coverage.parameters == handle.coverage.parameters
    assert not read_model(folder).notes


@pytest.mark.parametrize(("form", "kind"), [("LEMS", "qwen2"), ("ASVD", "opt"), ("SVD-LLM", "llama")])
def test_it_is_exported_as_ours_in_each_form_with_exact_counts(
    form: str, kind: str, tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
):
    model, halves, folder = _written(form, tmp_path / "folder", sample_text, kind)
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    dense = _dense(kind).num_parameters()
    for written in ("compressed", "plain", "dense"):
        assert main(["export", "--from", str(folder), "--form", written, "--out", str(tmp_path / written)]) == 0, capsys.readouterr().err
        with torch.no_grad():
            logits = load_model(str(tmp_path / written)).module(input_ids=ids).logits
            torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        manifest = read_manifest(tmp_path / written)
        report = report_of(manifest)
        assert (report.parameters_before, report.parameters_after) == (dense, load_model(str(folder)).parameters)
        assert report.ranks == {name: len(down) for name, (_, down) in halves.items()}
        assert 0 < report.compression_ratio < 1
        assert f"as factors in the form of {form}, and written by lowrank-studio" in (tmp_path / written / "README.md").read_text()
    assert read_manifest(tmp_path / "compressed").written_parameters == load_model(str(folder)).parameters


def test_it_is_measured_like_any_model(tmp_path: Path, sample_text: str, text_file: Path, capsys: pytest.CaptureFixture[str]):
    _, _, folder = _written("LEMS", tmp_path / "folder", sample_text)
    assert main(["evaluate", "--model", str(folder), "--text", f"file:{text_file}", "--context", "32", "--windows", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_weights_that_leave_too_little_memory_stay_on_disk(tmp_path: Path, sample_text: str):
    model, _, folder = _written("LEMS", tmp_path / "folder", sample_text)
    handle = load_model(ModelSource(str(folder), memory="1KB"))
    assert handle.weights is not None
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(handle.module(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_vllm_is_not_given_what_it_would_load_as_a_dense_model(tmp_path: Path, sample_text: str):
    _, _, folder = _written("ASVD", tmp_path / "folder", sample_text)
    check_headers(folder)  # of transformers' server, which gets the model as we load it
    with pytest.raises(LowRankError, match=r"vLLM reads no factors of ASVD.*lowrank export --from"):
        vllm_dtype(str(folder), ModelSource(str(folder)))


@pytest.mark.parametrize("form", ["LEMS", "ASVD", "LowRankArena", "SVD-LLM ranks"])
def test_the_ranks_of_its_config_are_those_of_a_manual_allocation(form: str, tmp_path: Path, sample_text: str):
    _, halves, folder = _written(form, tmp_path / "folder", sample_text)
    assert read_ranks(folder / "config.json") == {name: len(down) for name, (_, down) in halves.items()}
    bad = tmp_path / "ranks.json"
    bad.write_text('{"rank_dict": [1]}')
    with pytest.raises(LowRankError, match="must hold a JSON object"):
        read_ranks(bad)


def test_a_pickle_is_refused_by_its_name(tmp_path: Path, sample_text: str):
    _, _, folder = _written("ASVD", tmp_path / "folder", sample_text)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LowRankError, match=r"pytorch_model\.bin, a pickle: those are not read"):
        load_model(str(folder))


def _without(half: str) -> Callable[[dict[str, object], dict[str, Tensor]], None]:
    def change(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if half in name)]

    return change


def _transposed(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if "o_proj" in name and re.search(r"ALinear|mod_b", name):
            tensors[name] = tensors[name].T


def _wider(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "o_proj" in name and name.endswith(("ALinear.weight", "mod_b.weight")))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def _other_rank(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    ranks = config["rank_dict" if "rank_dict" in config else "truncation_ranks"]
    assert isinstance(ranks, dict)
    ranks[next(name for name in ranks if "o_proj" in name)] = 3


def _unnamed(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    ranks = config["rank_dict" if "rank_dict" in config else "truncation_ranks"]
    assert isinstance(ranks, dict)
    del ranks[next(name for name in ranks if "o_proj" in name)]


def _unknown(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    ranks = config["rank_dict" if "rank_dict" in config else "truncation_ranks"]
    assert isinstance(ranks, dict)
    known = next(name for name in ranks if "o_proj" in name)
    ranks["model.layers.0.mixer"] = ranks.pop(known)
    for name in [name for name in tensors if known in name]:
        tensors[name.replace(known, "model.layers.0.mixer")] = tensors.pop(name)


FAULTS = {
    "missing up": (_without("mod_b"), _without("ALinear"), "lacks one of the two factors of the layer"),
    "missing down": (_without("mod_a"), _without("BLinear"), "lacks one of the two factors of the layer"),
    "transposed": (_transposed, _transposed, "don't fit each other"),
    "wider": (_wider, _wider, r"make a matrix of shape \(64, 32\); LlamaForCausalLM has \(32, 32\) there"),
    "another rank": (_other_rank, _other_rank, "have rank [567], and its config.json says 3"),
    "not named": (_unnamed, _unnamed, "have rank [567], and its config.json names no rank"),
    "unknown module": (_unknown, _unknown, "'model.layers.0.mixer', which is no linear layer of LlamaForCausalLM"),
}


@pytest.mark.parametrize("form", ["LEMS", "ASVD"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused_in_a_line(form: str, fault: str, tmp_path: Path, sample_text: str):
    model = _dense("llama")
    config, tensors = FORMS[form](model, _factored(model, head=False))
    FAULTS[fault][form == "ASVD"](config, tensors)
    folder = _save(tmp_path / "folder", config, tensors, sample_text)
    with pytest.raises(LowRankError, match=FAULTS[fault][2]) as refused:
        load_model(str(folder))
    assert "\n" not in str(refused.value)


def test_half_of_the_factors_that_only_their_names_tell_is_refused(tmp_path: Path, sample_text: str):
    model = _dense("llama")
    config, tensors = _svd_llm(model, _factored(model, head=False))
    del tensors["model.layers.1.mlp.up_u_proj.weight"]
    with pytest.raises(LowRankError, match=r"lacks one of the two factors of the layer 'model\.layers\.1\.mlp\.up_proj'"):
        load_model(str(_save(tmp_path / "folder", config, tensors, sample_text)))


def test_an_architecture_that_transformers_has_not_is_named(tmp_path: Path, sample_text: str):
    model = _dense("llama")
    config, tensors = _lems(model, _factored(model, head=False))
    with pytest.raises(LowRankError, match="in the form of LEMS for 'mammoth', an architecture that transformers has not"):
        load_model(str(_save(tmp_path / "folder", {**config, "base_model_type": "mammoth"}, tensors, sample_text)))
