"""Train the bundled model, `assets/demo-lm`: a small Llama that completes Python.

    python assets/train_demo_lm.py --work DIR            # train; run it again after a stop, and it goes on
    python assets/train_demo_lm.py --work DIR --save     # write assets/demo-lm from the last checkpoint

`--architecture gpt2 --out FOLDER` makes another model of the same text, to compare methods on: no gated MLP, no grouped queries,
learned positions, biases, transposed and packed matrices.

The text is what any machine with Python carries: the standard library's modules of the ``train`` split, the
interpreter's documentation topics, and the sources of installed packages. The modules that ``python-stdlib``
holds out for calibration, validation and test are never read, nor is any file that shares many lines with them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lowrank_core.documents.stdlib import SPLIT_PERCENT, iter_modules, stdlib_documents

BOS = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
BATCH, CHUNK = 16, 8  # windows per step, windows per backward pass
PEAK_LR, FINAL_LR, WARMUP = 2.5e-3, 1e-4, 100
STDLIB_EPOCHS = 2
PACKAGES = (
    *("numpy", "pandas", "networkx", "sympy", "sqlalchemy", "optuna", "streamlit", "huggingface_hub"),
    *("pip", "setuptools", "torch", "transformers", "pydantic", "rich", "_pytest", "PIL", "narwhals"),
    *("fsspec", "jinja2", "anyio", "altair", "filelock", "websockets", "click"),
)
PACKAGE_CHARACTERS = 2_500_000  # at most so much of one package, so that none dominates
DUPLICATE_SHARE = 0.2  # of a file's long lines seen in held-out modules: the file is left out


def long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 40}


def package_documents(held_out: set[str], generator: random.Random) -> Iterator[str]:
    """Yield sources of the installed packages, without near copies of held-out modules."""
    for package in PACKAGES:
        folder = Path(sysconfig.get_path("purelib"), package)
        if not folder.is_dir():
            sys.exit(f"train_demo_lm: package {package} is not installed in {folder.parent}")
        sources = [text for _, text in iter_modules(folder)]
        generator.shuffle(sources)
        taken = 0
        for text in sources:
            lines = long_lines(text)
            if len(lines & held_out) > DUPLICATE_SHARE * len(lines) or len(text) > 400_000:
                continue
            if taken + len(text) > PACKAGE_CHARACTERS:
                break
            taken += len(text)
            yield text


def corpus(seed: int) -> tuple[list[str], dict[str, int]]:
    """Return the training documents in a seeded order, and characters by origin."""
    generator = random.Random(seed)
    held_out = set().union(*(long_lines(text) for split in SPLIT_PERCENT for text in stdlib_documents(split)))
    library = list(stdlib_documents("train"))
    documentation = [topics[name] for name in sorted(topics)]
    packages = list(package_documents(held_out, generator))
    documents = STDLIB_EPOCHS * (library + documentation) + packages
    generator.shuffle(documents)
    sizes = {"standard library": library, "documentation topics": documentation, "packages": packages}
    return documents, {name: sum(map(len, texts)) for name, texts in sizes.items()}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that begins every text with BOS, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def prepare(work: Path, seed: int) -> None:
    """Write the tokenizer and the token stream under ``work``."""
    documents, characters = corpus(seed)
    tokenizer = train_tokenizer(documents)
    ids = tokenizer(documents)["input_ids"]  # each document begins with BOS
    stream = np.fromiter((token for document in ids for token in document), dtype=np.uint16)
    tokenizer.save_pretrained(work / "tokenizer")
    np.save(work / "tokens.npy", stream)
    record = {"characters": characters, "stream_tokens": len(stream), "python": platform.python_version(), "packages": PACKAGES}
    (work / "corpus.json").write_text(json.dumps(record, indent=1))
    print(record, flush=True)


def batches(stream: np.ndarray, steps: int, seed: int) -> torch.Tensor:
    """Return (steps·BATCH, CONTEXT) token windows: BOS, then CONTEXT-1 consecutive tokens, in a seeded order."""
    body = CONTEXT - 1
    count = len(stream) // body
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(count) for _ in range(math.ceil(steps * BATCH / count))])[: steps * BATCH]
    windows = stream[: count * body].reshape(count, body)[order].astype(np.int64)
    return torch.from_numpy(np.concatenate([np.zeros((len(windows), 1), np.int64), windows], axis=1))


def build_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def build_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=192,
        n_layer=6,
        n_head=4,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


ARCHITECTURES = {"llama": build_llama, "gpt2": build_gpt2}


def build_model(architecture: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]()


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2


def keep_lines(path: Path, count: int) -> None:
    """Drop what was logged after the checkpoint that training goes on from: those steps are run, and logged, again."""
    if path.exists():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def train(work: Path, model: PreTrainedModel, *, steps: int, seed: int, compiled: bool) -> None:
    """Train to ``steps``, from the last checkpoint if there is one; a line of losses.jsonl per step."""
    windows = batches(np.load(work / "tokens.npy"), steps, seed)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    checkpoint = work / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    keep_lines(work / "losses.jsonl", first)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
        return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    loss_fn = torch.compile(loss_of) if compiled else loss_of
    with (work / "losses.jsonl").open("a") as log:
        for step in range(first, steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            total = 0.0
            for ids in windows[step * BATCH : (step + 1) * BATCH].split(CHUNK):
                loss = loss_fn(ids) * (len(ids) / BATCH)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(json.dumps({"step": step + 1, "loss": total, "seconds": time.perf_counter() - began}) + "\n")
            log.flush()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                print(step + 1, round(total, 4), flush=True)


def save(work: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write the last checkpoint as a bf16 checkpoint of transformers, with its tokenizer and its card."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    model.generation_config.max_length = CONTEXT
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(folder)
    write_card(work, folder, steps=state["step"])
    print(f"wrote {folder} after {state['step']} steps")


def smoothed(losses: list[float], width: int = 50) -> np.ndarray:
    """Return means over ``width`` steps, to see a trend through batches of very different text."""
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def draw_losses(losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), dpi=120, layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1) * BATCH * CONTEXT / 1e6, losses, color="#B8C4CC", linewidth=0.6)
    curve = smoothed(losses)
    axes.plot((np.arange(len(curve)) + 50) * BATCH * CONTEXT / 1e6, curve, color="#0072B2", linewidth=1.8)
    axes.set(xlabel="training tokens (millions)", ylabel="training loss (nats per token)", ylim=(2, 8))
    axes.set_title("Each batch, and the mean over 50 batches", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


PROMPTS = ('def read_lines(path):\n    """Return the lines of a file."""\n', "import os\nimport sys\n\n\nclass ", "    def __init__(self, ")
SAMPLE = {"tokens": 90, "seed": 0, "temperature": 0.5}


def write_card(work: Path, folder: Path, *, steps: int) -> None:
    """Measure the saved model and write its card; every figure in it is of this checkpoint."""
    from lowrank_core.config import ModelSource, TextConfig
    from lowrank_core.evaluation import evaluate
    from lowrank_core.evaluation.generation import continue_prompt
    from lowrank_core.models import load_model
    from lowrank_core.text import load_windows

    losses = [json.loads(line)["loss"] for line in (work / "losses.jsonl").read_text().splitlines()]
    draw_losses(losses, folder / "loss.png")
    corpus_record = json.loads((work / "corpus.json").read_text())
    handle = load_model(ModelSource(str(folder)))
    reports = [
        evaluate(handle, load_windows(TextConfig(context=context), handle.tokenizer, split))
        for split, context in (("validation", 256), ("test", 256), ("test", 512))
    ]
    rows = "\n".join(
        f"| {r.perplexity:.2f} | {r.perplexity_interval[0]:.2f} to {r.perplexity_interval[1]:.2f} | {r.protocol} |" for r in reports
    )
    samples = "\n\n".join(f"```python\n{prompt}⟨{continue_prompt(handle, prompt, **SAMPLE)}⟩\n```" for prompt in PROMPTS)
    values = {
        "parameters": f"{handle.parameters:,}",
        "tokens": f"{steps * BATCH * CONTEXT:,}",
        "stream": f"{corpus_record['stream_tokens']:,}",
        "steps": f"{steps:,}",
        "python": corpus_record["python"],
        "characters": ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in corpus_record["characters"].items()),
        "packages": ", ".join(corpus_record["packages"]),
        "last_loss": f"{smoothed(losses)[-1]:.3f}",
        "rows": rows,
        "samples": samples,
    }
    template = (Path(__file__).with_name("demo-lm-card.md")).read_text(encoding="utf-8")
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    (folder / "README.md").write_text(template, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and losses")
    parser.add_argument("--steps", type=int, default=2000, help=f"optimiser steps of {BATCH * CONTEXT} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler; about 10%% faster)")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--save", action="store_true", help="write --out from the last checkpoint instead of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "demo-lm", help="folder that --save writes")
    arguments = parser.parse_args()
    model = build_model(arguments.architecture, arguments.seed)
    if arguments.save:
        save(arguments.work, model, arguments.out)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "tokens.npy").exists():
        prepare(arguments.work, arguments.seed)
    train(arguments.work, model, steps=arguments.steps, seed=arguments.seed, compiled=arguments.compile)


if __name__ == "__main__":
    main()
