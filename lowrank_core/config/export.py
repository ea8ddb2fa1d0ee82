"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["EXPORT_DTYPES", "EXPORT_FORMS", "QUANTIZATIONS", "ExportConfig"]

EXPORT_FORMS = ("compressed", "dense")
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")


@dataclass(frozen=True)
class ExportConfig:
    """Form of a compressed model on disk."""

    form: str = option(
        "compressed",
        "compressed: the factors; dense: their products in the plain architecture, for any runtime, and not smaller",
        label="Form",
        choices=EXPORT_FORMS,
    )
    with_code: bool = option(
        False, "write our code with the weights: the folder loads with trust_remote_code where this is not installed", label="With our code"
    )
    dtype: str = option("auto", "that is written; auto: that of the checkpoint", label="Dtype", flag="export-dtype", choices=EXPORT_DTYPES)
    max_shard_size: str = option("50GB", "of one weight file, such as 2GB (units KB to TB, of 1000)", label="Largest weight file")
    drop_biases: bool = option(
        False,
        "with the form dense: leave out the biases that a centred metric adds and the architecture has no place for, and measure that cost",
        label="Drop biases without a place",
    )
    quantization: str = option(
        "none", "of the factors; int8: whole numbers with one scale a row", label="Quantisation", flag="quantize", choices=QUANTIZATIONS
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.form == "dense" and self.quantization != "none":
            raise ConfigError("a dense folder holds no factors that could be in 8 bits; write the form compressed, or leave int8 out.")
        if self.drop_biases and self.form != "dense":
            raise ConfigError("factors have a place for every bias; leave --drop-biases out, or write the form dense.")
        if self.form == "dense" and self.with_code:
            raise ConfigError("a dense folder loads without any code of ours; leave --with-code out.")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]B", self.max_shard_size.upper()):
            raise ConfigError(f"max shard size must be a number with a unit from KB to TB, got {self.max_shard_size!r}. Try 2GB.")

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
            (f"shards-of-{self.max_shard_size.upper()}", self.shard_bytes != usual.shard_bytes),
        )
        return "-".join([name, *(word for word, said in words if said)]).replace(" ", "-")
