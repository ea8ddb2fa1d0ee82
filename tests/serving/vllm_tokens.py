"""Greedy tokens and their log-probabilities by vLLM: ``python tests/serving/vllm_tokens.py TOKENS FOLDER ...``, a line of JSON for each.

The prompt is the tokens 0 to 23. A folder of the plain form is loaded by its own module, as a user of vLLM alone has it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def measured(folder: str, tokens: int) -> dict[str, object]:
    """Return what vLLM writes; or the error that it raises."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    config = json.loads((Path(folder) / "config.json").read_text())
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 256}
    if "_transformers" in folder:
        options["model_impl"] = "transformers"
    try:
        model = LLM(folder, trust_remote_code="lowrank_ranks" in config, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, logprobs=0)
    [result] = model.generate([{"prompt_token_ids": list(range(24))}], sampling, use_tqdm=False)
    [output] = result.outputs
    probabilities = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    del model
    cleanup_dist_env_and_memory()
    return {"tokens": list(output.token_ids), "log_probabilities": probabilities}


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        print(json.dumps({"folder": folder, **measured(folder, int(sys.argv[1]))}), flush=True)
