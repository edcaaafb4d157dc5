"""What a step costs beside the bare work of its passes: python tests/tools/speed.py [OPTION ...]

Options are the methods' own, such as --device cuda --size 256 --width 32 (here: 96 px, width 16).
Blocks of 20 steps of the method and of bare work in turns, in one process: the same networks,
shapes, passes with and without gradient on ready tensors, the mean square of the logits as the
loss, backward, AdamW, channels-last. Prints the medians of 5 blocks, their ratio, peak GPU memory.
"""
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import METHODS, main_of  # noqa: E402 - after the path

import common  # noqa: E402

BLOCKS, STEPS = 5, 20


def tensors_in(outputs):
    """All tensors in what a network returns: a tensor, or lists and dictionaries of tensors."""
    if torch.is_tensor(outputs):
        return [outputs]
    values = outputs
    if isinstance(outputs, dict):
        values = outputs.values()
    found = []
    for value in values:
        found += tensors_in(value)
    return found


def clock(device):
    """Seconds, after the GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class Recorder:
    """Writes down the passes of two optimizer steps: [(network, shape, with gradient)] each."""

    def __init__(self, networks):
        self.steps = [[]]
        self.network_of = {}  # a pass is seen at its encoder, since a file may call a part alone
        for name, network in networks.items():
            self.network_of[getattr(network, "encoder", network)] = name
        self.hooks = [torch.nn.modules.module.register_module_forward_pre_hook(self.see_pass),
                      register_optimizer_step_post_hook(self.see_step)]

    def see_pass(self, module, inputs):
        if module in self.network_of and len(inputs[0]) > 0:
            passed = self.network_of[module], tuple(inputs[0].shape), torch.is_grad_enabled()
            self.steps[-1].append(passed)

    def see_step(self, *_):
        self.steps.append([])

    def stop(self):
        for hook in self.hooks:
            hook.remove()
        return self.steps[:-1]


class BareWork:
    """The recorded passes, backward and optimizer step, on copies of the networks."""

    def __init__(self, networks, steps, device):
        self.networks, self.steps = copy.deepcopy(networks), steps
        trained = {name for step in steps for name, _, gradient in step if gradient}
        parameters = [p for name in sorted(trained) for p in self.networks[name].parameters()]
        self.optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-2)
        self.ready = {}
        for step in steps:
            for _, shape, _ in step:
                x = torch.rand(shape, device=device)
                self.ready[shape] = x.contiguous(memory_format=torch.channels_last)

    def do(self, autocast):
        for step in self.steps:
            loss = 0
            for name, shape, gradient in step:
                with torch.set_grad_enabled(gradient), autocast():
                    outputs = self.networks[name](self.ready[shape])
                if gradient:
                    for logits in tensors_in(outputs):
                        loss = loss + logits.float().square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()


def timed_steps(run):
    """In place of Run.steps: two steps recorded, then blocks of steps and of bare work in turns."""
    device = run.args.device
    autocast, _ = common.mixed_precision(run.args)
    first = run.args.steps // 2 // 2 * 2  # contrastive_st.py: within a round; ucmt.py: even
    if run.file == "contrastive_st":
        first = run.args.steps // 4  # where its first round begins
    yield first
    yield first + 1
    recorder = Recorder(run.networks)
    yield first + 2
    yield first + 3
    steps = recorder.stop()
    bare = BareWork(run.networks, steps, device)
    own, bare_times = [], []
    for block in range(BLOCKS + 1):
        start = clock(device)
        for k in range(STEPS):
            yield first + 4 + block * STEPS + k
        middle = clock(device)
        for _ in range(STEPS // 2):  # the recorded steps are two
            bare.do(autocast)
        end = clock(device)
        if block > 0:  # the first is a warm-up
            own.append((middle - start) / STEPS)
            bare_times.append((end - middle) / STEPS)
    ratios = [a / b for a, b in zip(own, bare_times, strict=True)]
    memory = ""
    if device.startswith("cuda"):
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    count = (len(steps[0]) + len(steps[1])) / 2
    print(f"{run.file}: {count:g} passes a step, {1000 * statistics.median(own):.0f} ms, bare "
          f"{1000 * statistics.median(bare_times):.0f} ms, ratio {statistics.median(ratios):.2f}"
          f"{memory}", flush=True)


def nothing(*_):
    return {}


if __name__ == "__main__":
    common.Run.steps, common.Run.save, common.Run.finish = timed_steps, nothing, nothing
    for method in METHODS:
        with tempfile.TemporaryDirectory() as out:
            main_of(method)(["--size", "96", "--steps", "1000", "--out", out, *sys.argv[1:]])
