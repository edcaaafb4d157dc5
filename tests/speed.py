"""What a step costs beside the bare work of its passes: python tests/speed.py [METHOD ...]

96 px, width 16, phantom. Blocks of 20 steps of the method and of bare work in turns, in one process:
the same networks, shapes, passes with and without gradient on ready tensors, the mean square of the
logits as the loss, backward, AdamW, channels-last. Prints the medians of 5 blocks and their ratio.
"""
import copy
import importlib
import statistics
import sys
import tempfile
import time

import torch
from conftest import METHODS

import common

BLOCKS, STEPS = 5, 20


def flat(outputs):
    """A network's outputs, tensors in lists and tuples -> a list of tensors."""
    return [outputs] if torch.is_tensor(outputs) else [z for part in outputs for z in flat(part)]


def bare_work(run, passes):
    """A function that does one step's passes, backward and update on copies of the run's networks."""
    copies = {id(n): copy.deepcopy(n) for n in run.networks.values()}
    trained = [p for key in {key for key, _, grad in passes if grad} for p in copies[key].parameters()]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=1e-2)
    ready = {shape: torch.rand(shape).contiguous(memory_format=torch.channels_last) for _, shape, _ in passes}

    def step():
        loss = 0
        for key, shape, grad in passes:
            with torch.set_grad_enabled(grad):
                outputs = copies[key](ready[shape])
            for logits in flat(outputs) if grad else ():
                loss = loss + logits.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def measure(method):
    passes, times = [], {"method": [], "bare": []}

    def steps(run):
        def record(module, inputs):
            if module in run.networks.values() and len(inputs[0]):
                passes.append((id(module), tuple(inputs[0].shape), torch.is_grad_enabled()))

        hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
        yield 0
        hook.remove()
        bare = bare_work(run, passes)
        for block in range(BLOCKS + 1):  # the first is a warm-up
            start = time.perf_counter()
            for step in range(STEPS):
                yield 1 + block * STEPS + step
            middle = time.perf_counter()
            for _ in range(STEPS):
                bare()
            if block:
                times["method"].append((middle - start) / STEPS)
                times["bare"].append((time.perf_counter() - middle) / STEPS)

    common.Run.steps, common.Run.save, common.Run.finish = steps, lambda *_: None, lambda *_: None
    with tempfile.TemporaryDirectory() as out:
        importlib.import_module(method).main(["--size", "96", "--steps", "1000", "--out", out])
    a, b = statistics.median(times["method"]), statistics.median(times["bare"])
    ratio = statistics.median(x / y for x, y in zip(times["method"], times["bare"], strict=True))
    print(f"{method}: {len(passes)} passes, {1000 * a:.0f} ms a step, bare {1000 * b:.0f} ms, ratio {ratio:.2f}")


for name in sys.argv[1:] or METHODS:
    measure(name)
