"""``lowrank heal``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.export import export_config_of, export_options
from lowrank_core.cli.options import Command, Result, model_options, source_of, text_of, text_options
from lowrank_core.config.healing import CRITERIA, HEALER_LABELS, HealingConfig

__all__ = ["add"]

_USUAL = HealingConfig()
_NUMBERS = {
    "steps": "of the optimiser, at most",
    "batch_size": "windows in a step",
    "validate_every": "steps between validations, which are checkpoints, too",
    "patience": "validations without a better one after which training ends",
    "train_windows": "of the calibration split, at most",
    "lora_rank": "of the adapters of lora",
}
_FRACTIONS = {
    "learning_rate": "largest (default: measured from how sensitive the model is)",
    "temperature": f"of the distributions that are compared (default: {_USUAL.temperature:g})",
    "cross_entropy": f"weight of the loss on the text itself next to the divergence (default: {_USUAL.cross_entropy:g})",
}


def add(command: Command) -> None:
    parser = command(
        "heal", "Train the factors of a compressed model towards the dense one, at the same size; goes on where it was killed."
    )
    model_options(parser)
    text_options(parser, "test_windows")
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model (default: the one that the folder was made from)")
    parser.add_argument("--method", default=_USUAL.method, help=f"one of {', '.join(HEALER_LABELS)} (default: %(default)s)")
    parser.add_argument(
        "--criterion",
        default=_USUAL.criterion,
        help=f"that validation chooses by, of {', '.join(CRITERIA)} (default: %(default)s, KL + X NLL)",
    )
    for name, meaning in _NUMBERS.items():
        usual = getattr(_USUAL, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=usual, metavar="N", help=f"{meaning} (default: {usual})")
    for name, meaning in _FRACTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(_USUAL, name), metavar="X", help=meaning)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the healed model")
    export_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    names = ("method", "criterion", *_NUMBERS, *_FRACTIONS, "seed")
    config = HealingConfig(**{name: getattr(arguments, name) for name in names})
    written = export_config_of(arguments)  # a bad choice is reported before torch is loaded
    from lowrank_core.commands.heal import HealRequest, heal_folder

    request = HealRequest(config, arguments.out, arguments.against, written, arguments.line)
    return heal_folder(source_of(arguments), text_of(arguments, "test_windows"), request)
