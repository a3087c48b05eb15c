"""RandomRunner: the engine's runner with random weights, and the speed of its steps."""

import argparse
import gc
import time
from itertools import product
from typing import Any

import torch

from benchmarks.device import Device
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.runner import InFlightStep
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens, mark_launched
from serve_app.engine.sequence import Sequence
from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import kv_bytes
from serve_app.model.kernels.cuda.use_kernels import use_cuda_kernels
from serve_app.model.quantization import Quantization
from tools.random_model import config_of, random_model

BLOCK_SIZE = 16
ROUND = 16
"""Steps between two looks at the clock."""
EXTRA = 320
"""Tokens that a sequence may get while it is measured."""
CPU_BLOCKS = 512
"""Number of KV blocks on a CPU, on which the benchmark is only tested."""
SPARE = 5e9
"""Bytes of a device that are left to intermediate results: 4.0e9 of a step with 8,192 prompt tokens
(`footprint.kernel_step_bytes`), and what an allocator wastes."""


def blocks_for(num_tokens: int) -> int:
    """Returns the number of KV blocks of a sequence with `num_tokens` tokens and `EXTRA` more."""
    return -(-(num_tokens + EXTRA) // BLOCK_SIZE)


class RandomRunner:
    """A model with random weights and a KV cache of random keys and values."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.device, self.options = device, options
        self.dtype = torch.bfloat16 if device.is_cuda else torch.float32
        self.config = self.config_of(options)
        is_bf16 = options.weights == "bf16"
        self.quantization = None if is_bf16 else Quantization("nf4", "bfloat16")
        self.model = random_model(self.config, self.quantization, self.dtype, device.device)
        self.kernels_note = self._choose_kernels()
        self.context = options.contexts[0]
        """The context length of everything but decode steps."""
        self.left_out: list[str] = []
        """Decode steps that the memory does not hold, with the reason."""
        self.cases = self._fitting_cases()
        """Batch sizes and context lengths of decode steps."""
        self.batches = [batch for batch, context in self.cases if context == self.context]
        """Batch sizes of everything else."""
        self.streams = [n for n in options.streams if n <= max(self.batches)]
        self.max_num_seqs = max(max(it[0] for it in self.cases), 1 + max(self.streams, default=0))
        prompts = blocks_for(max(options.prompts))
        blocks = prompts + max(batch * blocks_for(context) for batch, context in self.cases)
        made = (self.model, blocks, BLOCK_SIZE, self.dtype, device.device)
        at_once = device.experts_at_once(self.config.num_local_experts)
        self.runner = ModelRunner(*made, max_num_seqs=self.max_num_seqs, experts_at_once=at_once)
        for pages in (*self.runner.cache.keys, *self.runner.cache.values):
            pages.normal_()

    def _choose_kernels(self) -> str:
        """Prepares the CUDA kernels in the way of a server, if they are requested."""
        if self.options.kernels == "triton":
            return "4-bit products run in Triton kernels: --kernels triton"
        return use_cuda_kernels(self.model, None)

    @staticmethod
    def config_of(options: argparse.Namespace) -> MixtralConfig:
        """Returns the model's sizes that the options ask for."""
        return config_of(tiny=options.tiny, layers=options.layers)

    def _fitting_cases(self) -> list[tuple[int, int]]:
        """Returns the cases whose KV cache fits beside that of the longest prompt, and records the
        others.

        Raises `ValueError` if no case fits at the first context length.
        """
        cases = []
        num_blocks = self._max_blocks() - blocks_for(max(self.options.prompts))
        longest = self.config.max_position_embeddings - EXTRA
        for context, batch in product(self.options.contexts, self.options.batches):
            needed = batch * blocks_for(context)
            gb = kv_bytes(self.config, needed * BLOCK_SIZE, self.dtype.itemsize) / 1e9
            if context <= longest and needed <= num_blocks:
                cases.append((batch, context))
                continue
            reason = f"a KV cache of {gb:.1f} GB does not fit"
            if context > longest:
                reason = f"the model takes up to {longest} tokens and {EXTRA} new ones"
            self.left_out.append(f"batch {batch} at context {context}: {reason}")
        if self.context not in [context for _, context in cases]:
            raise ValueError(f"nothing fits: {self.left_out}")
        return cases

    def _max_blocks(self) -> int:
        """Returns the number of KV blocks for which the device has memory, less `SPARE`."""
        if not self.device.is_cuda:
            return CPU_BLOCKS
        block_bytes = kv_bytes(self.config, BLOCK_SIZE, self.dtype.itemsize)
        return int((self.device.free_bytes() - SPARE) / block_bytes)

    @property
    def lacks_kernels(self) -> bool:
        """Whether a GPU computes without the CUDA kernels although they were asked for."""
        is_asked = self.quantization is not None and self.options.kernels == "cuda"
        return is_asked and self.device.is_cuda and self.model.products is None

    @property
    def note(self) -> str:
        """The way in which the runner computes steps; see `ModelRunner.notes`."""
        return "; ".join(self.runner.notes)

    def engine_config(self) -> EngineConfig:
        """Returns the limits of an engine around the runner, as a server on this device has
        them."""
        num_blocks = self.runner.cache.num_blocks
        return EngineConfig(
            max_model_len=min(self.config.max_position_embeddings, num_blocks * BLOCK_SIZE),
            max_num_seqs=self.max_num_seqs,
            max_waiting=self.max_num_seqs,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_batched_tokens=max(self.device.batched_tokens(), self.max_num_seqs),
            eos_token_ids=frozenset(),
        )

    def release(self) -> None:
        """Frees the model's memory."""
        del self.model, self.runner
        gc.collect()  # a model and what unpacks its weights know each other
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def sequences(self, count: int, num_tokens: int, **how: Any) -> list[Sequence]:
        """Returns `count` sequences with their own blocks, whose tokens except the last are
        computed."""
        blocks = blocks_for(num_tokens)
        params = SamplingParams(512, ignore_eos=True, **how)
        made = []
        for i in range(count):
            ids = torch.randint(self.config.vocab_size, (num_tokens,)).tolist()
            sequence = Sequence(ids, params, seed=i, stop_ids=frozenset())
            sequence.block_table = list(range(i * blocks, (i + 1) * blocks))
            sequence.num_computed_tokens = num_tokens - 1
            made.append(sequence)
        return made

    @torch.inference_mode()
    def graph_error(self) -> float | None:
        """Returns the relative error of the logits of a replayed step compared with the same step
        launched kernel by kernel; None if nothing is captured."""
        graphs, step = self.runner._graphs, self.runner._gpu_step
        if graphs is None or step is None:
            return None
        sequences = self.sequences(max(self.batches), self.context)
        last = self.context - 1
        decodes = [ScheduledTokens(s, last, last + 1, True) for s in sequences]
        launched = step.decode(self.runner._batch(decodes))
        replayed, _ = graphs.run(decodes, None, self.runner._tables.of(decodes))
        return float((replayed - launched).norm() / launched.norm())

    def decode(self, batch: int, context: int, temperature: float) -> tuple[float, int]:
        """Returns the tokens per second of `batch` sequences, one step after the other, and how
        many different tokens the last step gave.

        Sequences with the same token choose nearly the same experts, so a step with few different
        tokens reads less than its limit counts.
        """
        sequences = self.sequences(batch, context, temperature=temperature)
        decode(self.runner, sequences, 2)
        steps, began = 0, time.perf_counter()
        while steps < ROUND or (steps < 256 and time.perf_counter() - began < self.options.seconds):
            decode(self.runner, sequences, ROUND)
            steps += ROUND
        self.device.wait()
        speed = float(batch * steps / (time.perf_counter() - began))
        return speed, len({sequence.token_ids[-1] for sequence in sequences})


def decode(runner: ModelRunner, sequences: list[Sequence], num_steps: int) -> None:
    """Runs steps in which every sequence gets a token. As in the engine, a step is launched before
    the last one's tokens are read, where the device can overlap steps."""
    last: Launched | None = None
    for _ in range(num_steps):
        if not runner.can_overlap_steps:
            collect(last)
            last = None
        ends = [(sequence, len(sequence.token_ids)) for sequence in sequences]
        decodes = [ScheduledTokens(sequence, end - 1, end, True) for sequence, end in ends]
        launched = (decodes, runner.launch(decodes))
        mark_launched(decodes)
        collect(last)
        last = launched
    collect(last)


Launched = tuple[list[ScheduledTokens], InFlightStep]


def collect(launched: Launched | None) -> None:
    """Waits for a step and appends its tokens to the sequences."""
    if launched is not None:
        decodes, step = launched
        for part, token_id in zip(decodes, step.wait().token_ids, strict=True):
            part.sequence.token_ids[part.end] = token_id
