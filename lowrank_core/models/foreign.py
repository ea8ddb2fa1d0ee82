"""Models in folders that other projects write (``files.foreign``): the architecture as transformers has it, with our layers."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_core.errors import ModelError
from lowrank_core.files.foreign import ForeignFolder, read_foreign
from lowrank_core.models.handle import auto_class_of, weight_of

__all__ = ["dense_skeleton", "foreign_config", "foreign_folder", "key_mapping"]


def foreign_folder(place: str) -> ForeignFolder | None:
    """Return what the headers of a local folder in another project's form say; None for all others.

    Raises:
        ModelError: as ``read_foreign``; begins with what it is about.
    """
    try:
        return read_foreign(Path(place))
    except ModelError as error:
        raise ModelError(f"model: {error}") from error


def dense_skeleton(foreign: ForeignFolder) -> PreTrainedModel:
    """Return the dense architecture without weights.

    Raises:
        ModelError: transformers has none of that name.
    """
    stated = str(foreign.config.get("model_type"))
    kind = stated if stated in CONFIG_MAPPING else re.split("[-_]", stated)[-1]  # such as ``asvd_llama`` and ``svdllm-llama``
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"model: factors in the form of {foreign.project} for {stated!r}, an architecture that transformers has not.")
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict({**foreign.config, "model_type": kind})
    with torch.device("meta"):
        dense: PreTrainedModel = getattr(transformers, auto_class_of(config)).from_config(config)
    return dense


def foreign_config(foreign: ForeignFolder) -> PretrainedConfig:
    """Return the config of the architecture, with the keys of our plain form.

    Raises:
        ModelError: as ``dense_skeleton``; or the architecture has no linear layer of the name and shape of a pair of factors.
    """
    dense = dense_skeleton(foreign)
    layers = {name: child for name, child in dense.named_modules() if isinstance(child, nn.Linear | Conv1D)}
    for name, shape in foreign.shapes.items():
        if name not in layers:
            raise ModelError(f"model: the folder has factors of {name!r}, which is no linear layer of {type(dense).__name__}.")
        expected = tuple(weight_of(layers[name]).shape)
        if shape != expected:
            raise ModelError(f"model: the factors of {name!r} make a matrix of shape {shape}; {type(dense).__name__} has {expected} there.")
        if layers[name] is dense.get_output_embeddings():
            dense.config.tie_word_embeddings = False  # a head of two factors is not the embedding
    return dense.config


def key_mapping(foreign: ForeignFolder) -> dict[str, str]:
    """Return how ``from_pretrained`` renames the tensors: a regular expression for each name."""
    return {f"^{re.escape(old)}$": new for old, new in foreign.names.items()}
