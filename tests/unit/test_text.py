"""Texts: splits that share nothing, windows that are the token stream, and clear words for texts that can't be read."""

from __future__ import annotations

import gzip
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_core.config import TextConfig
from lowrank_core.documents.stdlib import iter_modules, split_of_module, stdlib_documents
from lowrank_core.errors import ConfigError, TextError
from lowrank_core.models import ModelHandle
from lowrank_core.text import SPLITS, load_text, load_windows, open_text
from lowrank_core.text import hub as hub_module
from lowrank_core.text.sources import FileText

MODULE = "def number_{0}():\n    return {0}\n\n\n" + "# {0} is a line that makes the module long enough to be read\n" * 8


@pytest.fixture(scope="module")
def tokenizer(llama: ModelHandle) -> PreTrainedTokenizerBase:
    """Adds BOS in front, as Llama's does."""
    return llama.tokenizer


def _without_bos_rule(tokenizer: PreTrainedTokenizerBase, **special: str) -> PreTrainedTokenizerFast:
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    body["post_processor"] = None
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(body)), **special)


# --- python-stdlib ---------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A standard library of 80 modules in two packages."""
    numbers = list(range(80))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        path = tmp_path / f"package{number % 2}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODULE.format(number), encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib_documents.cache_clear()
    yield tmp_path
    stdlib_documents.cache_clear()


def test_every_module_of_the_library_has_one_split(library: Path):
    everything = [source for _, source in iter_modules(library)]
    parts = [stdlib_documents(split) for split in (*SPLITS, "train")]
    assert len(everything) == 80
    assert sorted(document for part in parts for document in part) == sorted(everything)


def test_a_module_keeps_its_split_whatever_else_is_installed(library: Path):
    before = {split: set(stdlib_documents(split)) for split in SPLITS}
    (library / "another.py").write_text(MODULE.format(1000), encoding="utf-8")
    stdlib_documents.cache_clear()
    after = {split: set(stdlib_documents(split)) for split in SPLITS}
    assert all(before[split] <= after[split] for split in SPLITS)


def test_split_shares_are_as_documented():
    counts = dict.fromkeys((*SPLITS, "train"), 0)
    for number in range(2000):
        counts[split_of_module(f"package.module{number}")] += 1
    # 200 expected with a standard deviation of 13; 1400 with one of 20
    assert all(150 < counts[split] < 250 for split in SPLITS), counts
    assert 1300 < counts["train"] < 1500


def test_library_text_is_the_same_each_time(library: Path):
    first = open_text("python-stdlib").text("test")
    stdlib_documents.cache_clear()
    assert open_text("python-stdlib").text("test") == first
    assert first


def test_the_real_library_has_disjoint_splits():
    parts = {split: set(stdlib_documents(split)) for split in SPLITS}
    assert all(parts.values())
    assert not parts["calibration"] & parts["validation"]
    assert not parts["calibration"] & parts["test"]
    assert not parts["validation"] & parts["test"]


def test_an_interpreter_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib_documents.cache_clear()
    with pytest.raises(TextError, match=r"ships none\. Use file:PATH"):
        stdlib_documents("test")
    stdlib_documents.cache_clear()


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_cut_into_disjoint_splits(text_file: Path, sample_text: str):
    source = open_text(f"file:{text_file}")
    parts = [source.text(split) for split in SPLITS]
    assert "".join(parts) == sample_text
    lines = [set(part.splitlines()) for part in parts]  # every line has a number of its own
    assert not lines[0] & lines[1]
    assert not lines[0] & lines[2]
    assert not lines[1] & lines[2]
    shares = [len(part) / len(sample_text) for part in parts]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=20))
def test_splits_of_any_file_are_the_file_in_order(lines: list[str], tmp_path_factory: pytest.TempPathFactory):
    whole = "x\n" + "\n".join(lines)
    path = tmp_path_factory.mktemp("any") / "any.txt"
    path.write_text(whole, encoding="utf-8", newline="")
    source = FileText(path)
    parts = [source.text(split) for split in SPLITS]
    assert "".join(parts) == source.text("all") == whole
    # no line is in two splits: a part ends the text or a line (a last line longer than the rest has no break to end at)
    for part, rest in ((parts[0], parts[1] + parts[2]), (parts[1], parts[2])):
        assert not part or not rest or part.endswith("\n") or "\n" not in rest


def test_windows_of_the_three_splits_hold_no_common_line(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    windows = load_text(TextConfig(f"file:{text_file}", context=64), tokenizer)
    seen = [set(_lines(tokenizer, getattr(windows, split).ids)) for split in SPLITS]
    assert all(seen)
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def _lines(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """Whole lines inside single windows."""
    return [line for row in ids for line in tokenizer.decode(row, skip_special_tokens=True).split("\n")[1:-1]]


def test_split_all_takes_a_file_whole(text_file: Path, tokenizer: PreTrainedTokenizerBase, sample_text: str):
    windows = load_windows(TextConfig(f"file:{text_file}", context=16, bos="none"), tokenizer, "all")
    tokens = tokenizer(sample_text, add_special_tokens=False)["input_ids"]
    assert windows.available_tokens == len(tokens)
    assert windows.windows == len(tokens) // 16


def test_jsonl_and_parquet_hold_the_same_text(tmp_path: Path):
    documents = ["the first document", "zweiter Text: äöü", "a third\nof two lines"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d, "id": 1}) for d in documents) + "\n\n", encoding="utf-8")
    pd.DataFrame({"id": range(3), "text": documents}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert open_text(f"file:{tmp_path / name}").text("all") == "\n\n".join(documents)


def test_missing_values_of_a_parquet_file_are_no_text(tmp_path: Path):
    pd.DataFrame({"text": ["one", None, "two"]}).to_parquet(tmp_path / "a.parquet")
    assert open_text(f"file:{tmp_path / 'a.parquet'}").text("all") == "one\n\ntwo"


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", ["none", "window"])
@pytest.mark.parametrize("context", [2, 16, 33])
def test_windows_are_the_token_stream(text_file: Path, tokenizer: PreTrainedTokenizerBase, bos: str, context: int):
    config = TextConfig(f"file:{text_file}", context=context, bos=bos)
    windows = load_windows(config, tokenizer, "test")
    tokens = tokenizer(open_text(config.reference).text("test"), add_special_tokens=False)["input_ids"]
    assert windows.ids.shape[1] == windows.context == context
    if bos == "window":
        assert (windows.ids[:, 0] == tokenizer.bos_token_id).all()
    body = windows.ids[:, 1:] if bos == "window" else windows.ids
    stream = body.flatten().tolist()
    assert stream == tokens[: len(stream)]
    assert len(tokens) - len(stream) < body.shape[1]  # only what fills no window is left out
    assert windows.predicted_tokens == windows.windows * (context - 1)


def test_fewer_windows_are_spread_over_the_split_in_order(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    config = TextConfig(f"file:{text_file}", context=16)
    everything = load_windows(config, tokenizer, "validation").ids
    few = load_windows(config, tokenizer, "validation", count=5).ids
    places = [next(i for i, row in enumerate(everything) if torch.equal(row, chosen)) for chosen in few]
    assert places[0] == 0
    assert places[-1] == len(everything) - 1
    assert places == sorted(set(places))
    assert len(load_windows(config, tokenizer, "validation", count=10**6).ids) == len(everything)


def test_calibration_windows_are_drawn_with_the_seed(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    def drawn(seed: int) -> torch.Tensor:
        return load_windows(TextConfig(f"file:{text_file}", context=16, seed=seed), tokenizer, "calibration", count=12).ids

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    rows = {tuple(row.tolist()) for row in drawn(0)}
    assert len(rows) == 12  # without replacement: every line of the text has a number of its own


def test_seed_changes_neither_validation_nor_test(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    first, second = (load_text(TextConfig(f"file:{text_file}", context=16, seed=seed, calibration_windows=8), tokenizer) for seed in (0, 1))
    assert first.validation.sha256 == second.validation.sha256
    assert first.test.sha256 == second.test.sha256
    assert first.calibration.sha256 != second.calibration.sha256


def test_bos_auto_does_as_the_tokenizer_does(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    config = TextConfig(f"file:{text_file}", context=16)
    bare = _without_bos_rule(tokenizer, bos_token="<s>")
    assert load_windows(config, tokenizer, "test").bos
    assert "BOS first in every window" in load_windows(config, tokenizer, "test").protocol
    assert not load_windows(config, bare, "test").bos
    assert "no BOS" in load_windows(config, bare, "test").protocol


def test_bos_window_needs_a_bos_token(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    bare = _without_bos_rule(tokenizer)
    assert not load_windows(TextConfig(f"file:{text_file}", context=16), bare, "test").bos
    with pytest.raises(TextError, match="--bos none"):
        load_windows(TextConfig(f"file:{text_file}", context=16, bos="window"), bare, "test")


def test_protocol_names_what_a_figure_needs(text_file: Path, tokenizer: PreTrainedTokenizerBase):
    windows = load_windows(TextConfig(f"file:{text_file}", context=16), tokenizer, "test", count=3)
    assert windows.protocol == (
        "file:sample.txt, test split: 3 non-overlapping windows of 16 tokens, 45 tokens predicted, BOS first in every window"
    )


# --- benchmark texts -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_documents() -> Iterator[None]:
    yield
    hub_module._documents.cache_clear()


def _gzip_lines(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": document, "url": "u"}) + "\n" for document in documents)


@pytest.mark.parametrize("subfolder", ["", "wikitext-2-raw-v1"])
def test_wikitext_from_a_local_folder(tmp_path: Path, subfolder: str):
    (tmp_path / subfolder).mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        pd.DataFrame({"text": [f"{split} one", f"{split} two"]}).to_parquet(tmp_path / subfolder / f"{split}-00000-of-00001.parquet")
    source = open_text(f"wikitext-2:{tmp_path}")
    assert source.text("calibration") == "train one\n\ntrain two"
    assert source.text("validation") == "validation one\n\nvalidation two"
    assert source.text("all").count("one") == 3


def test_ptb_from_a_local_folder_of_the_hubs_form(tmp_path: Path):
    for split in ("train", "validation", "test"):
        folder = tmp_path / "penn_treebank" / split
        folder.mkdir(parents=True)
        pd.DataFrame({"sentence": [f"{split} a", f"{split} b"]}).to_parquet(folder / "0000.parquet")
    source = open_text(f"ptb:{tmp_path}")
    assert source.text("calibration") == "train a train b"
    assert source.text("test") == "test a test b"


def test_c4_deals_its_validation_split_into_two(tmp_path: Path):
    _gzip_lines(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", ["train 0", "train 1"])
    _gzip_lines(tmp_path / "en" / "c4-validation.00000-of-00008.json.gz", [f"held {number}" for number in range(6)])
    source = open_text(f"c4:{tmp_path}")
    assert source.text("calibration") == "train 0\n\ntrain 1"
    assert source.text("validation").split("\n\n") == ["held 0", "held 2", "held 4"]
    assert source.text("test").split("\n\n") == ["held 1", "held 3", "held 5"]


def test_local_copies_that_are_not_whole_are_told(tmp_path: Path):
    with pytest.raises(TextError, match="no folder"):
        open_text(f"wikitext-2:{tmp_path / 'nowhere'}").text("test")
    with pytest.raises(TextError, match=r"no \.parquet or \.json file of the test split"):
        open_text(f"wikitext-2:{tmp_path}").text("test")
    pd.DataFrame({"words": ["a"]}).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(TextError, match="no column 'text'"):
        open_text(f"wikitext-2:{tmp_path}").text("test")
    pd.DataFrame({"text": ["", " "]}).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    with pytest.raises(TextError, match="is empty"):
        open_text(f"wikitext-2:{tmp_path}").text("validation")


def test_a_damaged_local_copy_is_told(tmp_path: Path):
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    _gzip_lines(path, [f"a document {number}" for number in range(2000)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TextError, match="c4 can't be loaded"):
        open_text(f"c4:{tmp_path}").text("calibration")


def test_without_the_datasets_library_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r'pip install "\.\[data\]"'):
        open_text("wikitext-2").text("test")


@pytest.mark.parametrize("name", ["wikitext-2", "c4", "ptb"])
def test_an_unreachable_hub_is_told(name: str, monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match=f"give a local copy as {name}:FOLDER"):
        open_text(name).text("test")


# --- what can't be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gutenberg", "is none of python-stdlib, file:PATH, wikitext-2, c4, ptb"),
        ("python-stdlib:extra", "is none of"),
        ("file:", "needs a path"),
    ],
)
def test_unknown_sources_are_told(reference: str, message: str):
    with pytest.raises(TextError, match=message):
        open_text(reference)


def test_a_bare_path_gets_a_hint(text_file: Path):
    with pytest.raises(TextError, match=f"write file:{text_file}"):
        open_text(str(text_file))


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n", "is empty"),
    "binary.txt": (b"\xff\xfe\x00\x9f", "can't be read"),
    "empty.jsonl": (b"\n", "is empty"),
    "column.jsonl": (b'{"words": "a"}\n', "a string under `text`"),
    "number.jsonl": (b'{"text": 3}\n', "a string under `text`"),
    "list.jsonl": (b"[1]\n", "a string under `text`"),
    "torn.jsonl": (b'{"text": "a', "can't be read"),
    "torn.parquet": (b"PAR1", "can't be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_without_text_are_told(name: str, tmp_path: Path):
    body, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(body)
    with pytest.raises(TextError, match=message):
        open_text(f"file:{tmp_path / name}").text("test")


def test_missing_files_and_columns_are_told(tmp_path: Path):
    with pytest.raises(TextError, match="no file"):
        open_text(f"file:{tmp_path / 'none.txt'}").text("all")
    with pytest.raises(TextError, match="no file"):
        open_text(f"file:{tmp_path}").text("all")
    pd.DataFrame({"a": ["x"], "b": ["y"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TextError, match="no column `text`; it has a, b"):
        open_text(f"file:{tmp_path / 'a.parquet'}").text("all")


def test_a_text_shorter_than_a_window_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = tmp_path / "short.txt"
    path.write_text("the rank of a matrix", encoding="utf-8")
    with pytest.raises(TextError, match="fewer than one window of 512"):
        load_windows(TextConfig(f"file:{path}", context=512), tokenizer, "all")
    with pytest.raises(TextError, match=r"the calibration split of file:short\.txt"):
        load_text(TextConfig(f"file:{path}", context=8), tokenizer)


@pytest.mark.parametrize("field", ["calibration_windows", "validation_windows", "test_windows"])
def test_counts_below_one_are_refused(field: str):
    with pytest.raises(ConfigError, match=f"{field.replace('_', ' ')} must be at least 1, got 0"):
        TextConfig(**{field: 0})


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="context must be at least 2"):
        TextConfig(context=1)
    with pytest.raises(ConfigError, match="seed must be at least 0"):
        TextConfig(seed=-1)
    with pytest.raises(ConfigError, match="bos must be one of auto, window, none"):
        TextConfig(bos="always")
