"""Settings of a served model."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.options import check_options, option

__all__ = ["ServeConfig"]

_ENGINES = {"transformers": "transformers", "vllm": "vLLM"}


@dataclass(frozen=True)
class ServeConfig:
    """Address and engine of an OpenAI-compatible endpoint."""

    engine: str = option(
        "transformers",
        "transformers: its own server, for every form and any model that this package loads; vllm: many requests at a time",
        label="Engine",
        choices=_ENGINES,
    )
    host: str = option("127.0.0.1", "address to listen on; any other than a loopback address lets other machines in, without a password")
    port: int = option(8000, "port to listen on", minimum=1, maximum=65535)

    def __post_init__(self) -> None:
        check_options(self)
