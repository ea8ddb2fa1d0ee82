"""How a compressed model is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_core.config.checks import check_choice
from lowrank_core.errors import ConfigError

__all__ = ["EXPORT_DTYPES", "EXPORT_FORMS", "QUANTIZATIONS", "ExportConfig"]

EXPORT_FORMS = ("compressed", "dense")
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")


@dataclass(frozen=True)
class ExportConfig:
    """How a compressed model is written as a folder.

    Attributes:
        form: ``compressed``, the factors; ``dense``, their products in the plain architecture: for any runtime, and not smaller.
        with_code: write our code next to the weights, so that the folder loads with ``trust_remote_code`` without this package.
        dtype: ``auto`` (that of the checkpoint that the model was made from), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: of one weight file, such as ``2GB`` (units KB to TB, of 1000); a larger matrix has a file of its own.
        quantization: of the factors: ``none``, or ``int8``, whole numbers with one scale for each row.
    """

    form: str = "compressed"
    with_code: bool = False
    dtype: str = "auto"
    max_shard_size: str = "50GB"
    quantization: str = "none"

    def __post_init__(self) -> None:
        check_choice("form", self.form, EXPORT_FORMS)
        check_choice("dtype", self.dtype, EXPORT_DTYPES)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.form == "dense" and self.quantization != "none":
            raise ConfigError("a dense folder holds no factors that could be in 8 bits; write the form compressed, or leave int8 out.")
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
            (self.quantization, self.quantization != usual.quantization),
            (f"shards-of-{self.max_shard_size.upper()}", self.shard_bytes != usual.shard_bytes),
        )
        return "-".join([name, *(word for word, said in words if said)]).replace(" ", "-")

    @property
    def options(self) -> dict[str, object]:
        """Options of the command line that say the same, by name; True is a flag. What is usual is left out."""
        usual = ExportConfig()
        result = {"form": self.form, "with_code": self.with_code, "dtype": self.dtype, "max_shard_size": self.max_shard_size}
        said: dict[str, object] = {name: value for name, value in result.items() if value != getattr(usual, name)}
        return said | ({} if self.quantization == usual.quantization else {"quantize": self.quantization})
