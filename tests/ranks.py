"""Two processes on the CPU: torchrun --nproc-per-node 2 tests/ranks.py FOLDER. Run by test_processes.py."""
import csv
import importlib
import sys
from pathlib import Path

import torch
from conftest import METHODS, run_folder
from torch import distributed as dist

import common
import mean_teacher

folder, runs, grads = Path(sys.argv[1]), [], []
place, save, backward = common.Run.place, common.Run.save, common.Run.backward


def equal_on_all_ranks(tensors):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(flat, other) for other in others)


def placed(run, networks):
    runs.append(run)
    return place(run, networks)


def averaged(run, loss):
    backward(run, loss)
    grads.append([p.grad.clone() for p in run.networks["student"].parameters()])


common.Run.place = placed
shared = ["--size", "16", "--width", "4", "--labeled", "4", "--batch-size", "4", "--unlabeled-batch", "4",
          "--device", "cpu", "--val-every", "100"]
finish = common.Run.finish
for method in METHODS:  # scoring the test set takes long: once is enough
    common.Run.finish = finish if method == "cps" else lambda run: None
    out = folder / method
    argv = [*shared, "--steps", "6" if method == "ucmt" else "5", "--out", str(out)]
    results = importlib.import_module(method).main(argv)
    networks = runs[-1].networks.values()
    parameters = [p for network in networks for p in network.parameters()]
    assert equal_on_all_ranks(parameters), f"{method}: parameters differ"
    buffers = [b for network in networks for b in network.buffers() if b.is_floating_point()]
    assert equal_on_all_ranks(buffers), f"{method}: BatchNorm's statistics differ after the validation"
    if dist.get_rank():
        assert not results
    else:
        assert method != "cps" or results["headline"]["dice"] >= 0
    dist.barrier()
    assert len(list(csv.DictReader(open(run_folder(out) / "log.csv")))) == 1
    assert len(list(out.glob("*/*"))) == 1, "one run folder for both"
    drawn = runs[-1].gather(runs[-1].data.batch()[-1].tolist())
    assert len(drawn[0]) == 2 and drawn[0] != drawn[1], "each process has its own half of the batch"

# killed in step 3 and resumed, both processes as one run
argv = [*shared, "--steps", "4", "--val-every", "2", "--out"]
mean_teacher.main([*argv, str(folder / "whole")])
whole = [p.clone() for p in runs[-1].networks["student"].parameters()]


def killed(run, step):
    save(run, step)
    if step == 2:
        raise KeyboardInterrupt


common.Run.save = killed
try:
    mean_teacher.main([*argv, str(folder / "parts")])
except KeyboardInterrupt:
    pass
common.Run.save = save
dist.barrier()
mean_teacher.main([*argv, str(folder / "parts"), "--resume"])
assert all(map(torch.equal, whole, runs[-1].networks["student"].parameters())), "a resumed run differs"

# no augmentation, no noise, BatchNorm in evaluation mode: the mean of the gradients is the joined batch's
common.weak = lambda x, *maps, flip: [x, *maps]
mean_teacher.strong, mean_teacher.NOISE = (lambda x: x), 0.0
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
common.Run.backward = averaged
argv = [*shared, "--steps", "1", "--weight", "50", "--out"]
mean_teacher.main([*argv, str(folder / "two")])
world, common.world = common.world, lambda: (0, 1)
if dist.get_rank() == 0:
    mean_teacher.main([*argv, str(folder / "one")])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    print("ranks agree")
common.world = world
dist.barrier()
dist.destroy_process_group()
