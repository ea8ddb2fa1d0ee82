"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["ExportConfig"]

_FORMS = {"compressed": "Factors", "plain": "Plain factors", "dense": "Dense merge"}
_DTYPES = {"auto": "As checkpoint", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_QUANTIZATIONS = {"none": "Floats", "int8": "int8, one scale a row", "int4": "int4, groups of 64", "int4_128": "int4, groups of 128"}
_ROUNDINGS = {"nearest": "To nearest", "gptq": "GPTQ"}


@dataclass(frozen=True)
class ExportConfig:
    """Form of a compressed model on disk."""

    form: str = option(
        "compressed",
        "compressed: the factors, smaller, for transformers and vLLM with this package, or transformers with our code; plain: two linear "
        "layers for each compressed one and a module of 40 lines, for transformers and vLLM without this package; dense: the "
        "factors multiplied out into the plain architecture, no smaller, for llama.cpp and any other runtime",
        label="Form",
        choices=_FORMS,
    )
    with_code: bool = option(
        False,
        "write our code with the weights: the folder loads with trust_remote_code=True where this package is not installed; others need "
        "none",
        label="With our code",
    )
    dtype: str = option(
        "auto",
        "of all tensors in floats; auto: the checkpoint's; bfloat16 halves float32 and rounds; float16 is for runtimes without it",
        label="Stored as",
        flag="export-dtype",
        choices=_DTYPES,
    )
    max_shard_size: str = option(
        "50GB",
        "of one weight file, such as 2GB (units KB to TB, of 1000): for uploads and file systems with a limit",
        label="Largest weight file",
    )
    drop_biases: bool = option(
        False,
        "with the form dense: leave out the biases that a centred metric adds and the architecture has no place for, and measure that cost",
        label="Drop biases without a place",
    )
    quantization: str = option(
        "none",
        "of the factors; int8: whole numbers with one scale a row; int4: two in a byte, with a float16 scale for each 64 columns of a row; "
        "int4_128: for each 128; less disk and memory, with some rounding error and no speed-up; with the form compressed",
        label="Factors as",
        flag="quantize",
        choices=_QUANTIZATIONS,
    )
    dense_quantization: str = option(
        "none",
        "likewise, of the compressible layers that stay dense; embeddings, head, norms and biases are left as they are",
        label="Dense layers as",
        flag="quantize-dense",
        choices=_QUANTIZATIONS,
    )
    rounding: str = option(
        "nearest",
        "of what is quantised; nearest: each number to the nearest; gptq: column by column, so that the error of the output on calibration "
        "text is small; on the same grid, in the same bytes",
        label="Rounding",
        choices=_ROUNDINGS,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.form != "compressed" and self.quantizes:
            raise ConfigError(
                f"a {self.form} folder holds floats alone; write the form compressed, or leave --quantize and --quantize-dense out."
            )
        if self.drop_biases and self.form != "dense":
            raise ConfigError("factors have a place for every bias; leave --drop-biases out, or write the form dense.")
        if self.form != "compressed" and self.with_code:
            own = "without any code of ours" if self.form == "dense" else "by a module of its own"
            raise ConfigError(f"a {self.form} folder loads {own}; leave --with-code out.")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]B", self.max_shard_size.upper()):
            raise ConfigError(f"max shard size must be a number with a unit from KB to TB, got {self.max_shard_size!r}. Try 2GB.")

    def check_rounding(self) -> None:
        """Raise where a way of rounding is chosen, and nothing is quantised.

        Raises:
            ConfigError: so it is.
        """
        if self.rounding != "nearest" and not self.quantizes:
            raise ConfigError("--rounding is of what is quantised: give --quantize or --quantize-dense, or leave it out.")

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantised."""
        return (self.quantization, self.dense_quantization) != ("none", "none")

    @property
    def shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        amount, unit = self.max_shard_size[:-2], self.max_shard_size[-2:].upper()
        return int(float(amount) * 1000 ** (1 + "KMGT".index(unit[0])))

    def folder_name(self, name: str) -> str:
        """Return the name of the folder for the model ``name``: with a word for each choice that is not the usual one."""
        usual = ExportConfig()
        words = (
            (self.form, self.form != usual.form),
            ("with-code", self.with_code),
            (self.dtype, self.dtype != usual.dtype),
            ("without-biases", self.drop_biases),
            (self.quantization, self.quantization != usual.quantization),
            (f"dense-{self.dense_quantization}", self.dense_quantization != usual.dense_quantization),
            (self.rounding, self.rounding != usual.rounding),
            (f"shards-of-{self.max_shard_size.upper()}", self.shard_bytes != usual.shard_bytes),
        )
        return "-".join([name, *(word for word, said in words if said)]).replace(" ", "-")
