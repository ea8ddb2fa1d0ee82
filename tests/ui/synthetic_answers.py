"""Answers of a worker to what the Compare page asks for."""

from __future__ import annotations

from synthetic import comparison


def detailed(body: dict[str, object]) -> dict[str, object]:
    """The same answer with what newer workers measure, too."""
    report = body["report"]
    assert isinstance(report, dict)
    ratio = report["perplexity"] / report["dense_perplexity"]
    more = {"reverse_kl": 0.4, "top5_agreement": 0.9, "perplexity_ratio_interval": [ratio - 0.05, ratio + 0.05]}
    more |= {"flops": 900, "dense_flops": 1200}
    rows = [{"first": 1, "last": 1, "tokens": 4, "nll": 5.2, "dense_nll": 5.0, "kl": 0.2, "top1_agreement": 0.7}]
    rows += [{"first": 2, "last": 3, "tokens": 8, "nll": 4.1, "dense_nll": 4.0, "kl": 0.1, "top1_agreement": 0.8}]
    return {**body, "report": report | more | {"by_position": rows}}


def on_other_text(label: str, trial: int | str, nll: float, reference: str = "file:/data/notes.txt") -> dict[str, object]:
    """An answer to a request to measure on a second text."""
    body = detailed(comparison(label, trial, nll))
    report = body["report"]
    assert isinstance(report, dict)
    named = {"dataset": "file:notes.txt", "protocol": "file:notes.txt, test split, 4 windows of 32 tokens"}
    return {**body, "kind": "other_text", "text": reference, "report": report | named}


PIECES = ["if", " a", " <", " b", ":\n"]


def tokens_answer(label: str = "uniform", pieces: list[str] = PIECES) -> dict[str, object]:
    """An answer to a request to read a text token by token: the third token lost 2 nats, the last won half a nat."""
    dense, extra = [1.0, 2.0, 0.5, 1.5], [0.0, 2.0, 0.1, -0.5]
    body = {"ok": True, "kind": "tokens", "trial": label, "label": label, "window": None, "left_out": 0, "time": 1.0, "pieces": pieces}
    body |= {"protocol": "the text that was given: 4 tokens predicted, no BOS", "dense_nll": dense, "kl": [0.0, 1.0, 0.1, 0.2]}
    body |= {"nll": [a + b for a, b in zip(dense, extra, strict=True)], "likeliest": [" x"] * 4, "dense_likeliest": [" <"] * 4}
    return body


def behaviour_answer(label: str = "uniform", trial: int | str = "uniform") -> dict[str, object]:
    """An answer to a request for a model's behaviour: twice as long as the dense one, and without an end token."""
    dense = [{"tokens": 6, "repeated": 0.0, "ended": True}, {"tokens": 10, "repeated": 0.5, "ended": False}]
    ours = [{"tokens": 16, "repeated": 0.75, "ended": None}] * 2
    sides = {"dense": {"continuations": dense}, "compressed": {"continuations": ours}}
    protocol = "python-stdlib, test split: 6 prompts, the first 8 tokens of a window each; up to 16 new tokens, greedy, with a cache"
    return {"ok": True, "kind": "behaviour", "trial": trial, "label": label, "time": 1.0, "protocol": protocol, **sides}


def speed_answer(label: str = "uniform", *, memory: bool = True) -> dict[str, object]:
    """An answer to a request to time a model: it writes twice as fast, and reads no faster."""

    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": 0.9 * median, "high": 1.1 * median}

    def side(factor: float) -> dict[str, object]:
        peaks = {"loading": round(1e6 / factor), "running": round(2e6 / factor), "measured": "peak of a fresh process"} if memory else None
        rates = {"prefill_tokens_per_second": spread(1000.0), "decode_tokens_per_second": spread(50.0 * factor)}
        return {**rates, "first_token_seconds": spread(0.012), "memory": peaks, "protocol": "batch 1, prompts of 8 random tokens"}

    speedups = {"prefill_speedup": spread(1.0), "decode_speedup": spread(2.0), "first_token_speedup": spread(1.0)}
    sides = {"dense": side(1.0), "compressed": side(2.0)}
    return {"ok": True, "kind": "speed", "trial": label, "label": label, "config": {"batch_size": 1}, "time": 1.0, **sides, **speedups}
