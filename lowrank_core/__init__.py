"""lowrank_core: see where a language model is low-rank, search how to spend a parameter budget, keep a smaller model.

The stages, each a function from a value to a value, are imported from their modules::

    from lowrank_core.models import load_model
    from lowrank_core.text import load_text
    from lowrank_core.calibration import collect_statistics
    from lowrank_core.metrics import BASES, factorize
    from lowrank_core.allocation import allocate
    from lowrank_core.compression import compress
    from lowrank_core.evaluation import evaluate
    from lowrank_core.export import export

Importing this package alone imports neither torch nor transformers: the dashboard depends on that. It is enough for
``AutoModelForCausalLM.from_pretrained`` to read the folders that ``export`` writes.
"""

from lowrank_core.registration import announce

__all__ = ["__version__"]

__version__ = "0.1.0"

announce()
