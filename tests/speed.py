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
from torch.optim.optimizer import register_optimizer_step_post_hook

import common

BLOCKS, STEPS = 5, 20


def tensors(outputs):
    """All tensors in what a network returns: a tensor, or lists and dictionaries of tensors."""
    if torch.is_tensor(outputs):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for value in values for t in tensors(value)]


def bare_work(run, passes):
    """A function that does one turn's passes, backwards and updates on copies of the run's networks."""
    copies = {id(n): copy.deepcopy(n) for n in run.networks.values()}
    trained = {key: None for step in passes for key, _, grad in step if grad}
    optimizer = torch.optim.AdamW([p for key in trained for p in copies[key].parameters()], 1e-3, weight_decay=1e-2)
    shapes = {shape for step in passes for _, shape, _ in step}
    ready = {shape: torch.rand(shape).contiguous(memory_format=torch.channels_last) for shape in shapes}

    def turn():
        for step in passes:
            loss = 0
            for key, shape, grad in step:
                with torch.set_grad_enabled(grad):
                    outputs = copies[key](ready[shape])
                for logits in tensors(outputs) if grad else ():
                    loss = loss + logits.float().square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return turn


def measure(method):
    passes, owner, times = [[]], {}, {"method": [], "bare": []}

    def record(module, inputs):  # a pass is seen at its encoder, since a file may call a network's parts
        if id(module) in owner and len(inputs[0]):
            passes[-1].append((owner[id(module)], tuple(inputs[0].shape), torch.is_grad_enabled()))

    def steps(run, stride=1):
        owner.update({id(getattr(n, "encoder", n)): id(n) for n in run.networks.values()})
        hooks = [torch.nn.modules.module.register_module_forward_pre_hook(record),
                 register_optimizer_step_post_hook(lambda *_: passes.append([]))]
        # contrastive self-training: a step of a round, the first turn labels all images
        first = run.args.steps // 2 if method == "contrastive_st" else 0
        yield first
        passes[:] = [[]]
        yield first + stride
        del passes[-1]
        for hook in hooks:
            hook.remove()
        bare = bare_work(run, passes)
        for block in range(BLOCKS + 1):  # the first is a warm-up
            start = time.perf_counter()
            for turn in range(STEPS // stride):
                yield first + stride * (2 + block * STEPS + turn)
            middle = time.perf_counter()
            for _ in range(STEPS // stride):
                bare()
            if block:
                times["method"].append((middle - start) / STEPS)
                times["bare"].append((time.perf_counter() - middle) / STEPS)

    common.Run.steps, common.Run.save, common.Run.finish = steps, lambda *_: None, lambda *_: None
    with tempfile.TemporaryDirectory() as out:
        importlib.import_module(method).main(["--size", "96", "--steps", "1000", "--out", out])
    a, b = statistics.median(times["method"]), statistics.median(times["bare"])
    ratio = statistics.median(x / y for x, y in zip(times["method"], times["bare"], strict=True))
    count = sum(map(len, passes)) / len(passes)
    print(f"{method}: {count:g} passes a step, {1000 * a:.0f} ms, bare {1000 * b:.0f} ms, ratio {ratio:.2f}")


for name in sys.argv[1:] or METHODS:
    measure(name)
