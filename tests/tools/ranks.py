"""What two processes must have in common, on the CPU; run by test_processes.py:

    torchrun --nproc-per-node 2 tests/tools/ranks.py PHANTOM FOLDER

PHANTOM: the small phantom; FOLDER: for runs and the cache. A failure ends both with a traceback.
"""
import importlib
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import METHODS, main_of, run_folder  # noqa: E402 - after the path
from make_traces import rows_of  # noqa: E402

import common  # noqa: E402
import mean_teacher  # noqa: E402

PHANTOM, FOLDER = sys.argv[1], Path(sys.argv[2])
SHARED = ["--data", PHANTOM, "--labeled", "4", "--size", "16", "--width", "4",
          "--batch-size", "4", "--unlabeled-batch", "4", "--device", "cpu", "--precision", "fp32",
          "--cache", str(FOLDER / "cache")]


class Watched(common.Run):
    """A Run that shows its networks and data afterwards, and may be killed in its last step."""

    newest = None
    killed = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Watched.newest = self

    def save(self, step):
        if self.killed and step == self.args.steps - 1:
            raise KeyboardInterrupt
        super().save(step)


def train(method, argv):
    """Run a method -> its results and the Run."""
    importlib.import_module(method).Run = Watched
    results = main_of(method)(argv)
    return results, Watched.newest


def assert_equal_on_both(tensors, what):
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    assert flat.isfinite().all() and flat.any()
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others), f"{what} differ"


def forbidden(source, target):
    raise AssertionError(f"the second process writes {target}")


def check_gradients(args, data):
    """The mean of both halves' gradients is the gradient of the joined batch.

    The loss is Mean Teacher's, in evaluation mode, since BatchNorm normalises within a process.
    """
    torch.manual_seed(dist.get_rank())  # so that the processes' weights differ before place
    networks = common.place(mean_teacher.build(data.channels, data.classes, args.width), args)
    joined = mean_teacher.build(data.channels, data.classes, args.width)
    for name, network in networks.items():
        joined[name].load_state_dict(network.state_dict())
    assert_equal_on_both(networks["student"].parameters(), "weights at the start")
    index_l, index_u = data.draw()
    mine = loss_gradients(networks, data, common.my_share(index_l), common.my_share(index_u))
    alone = loss_gradients(joined, data, index_l, index_u)
    for name, gradient in mine.items():
        tolerance = 1e-5 * alone[name].abs().max().item()
        torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=tolerance)
    assert_equal_on_both(mine.values(), "gradients")


def loss_gradients(networks, data, index_l, index_u):
    """{parameter: gradient} of the student for these labelled and unlabelled images."""
    student, teacher = networks["student"].eval(), networks["teacher"].eval()
    x_l, x_u = data.load_images(index_l), data.load_images(index_u)
    logits_l = student(x_l)
    probs_s = torch.cat([logits_l, student(x_u)]).softmax(1)
    probs_t = teacher(torch.cat([x_l, x_u]).flip(3)).softmax(1)
    loss_sup = common.supervised_loss(logits_l, data.load_labels(index_l))
    loss = loss_sup + 50 * mean_teacher.consistency_loss(probs_s, probs_t)
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def check_method(method):
    """Some steps: equal networks, another half of the batch each, one folder, one writer."""
    steps, val_every, rows = "3", "100", [3]
    if method == "ucmt":
        steps, rows = "4", [4]
    if method == "mean_teacher":  # its run is also check_resume's
        steps, val_every, rows = "5", "4", [4, 5]
    out = FOLDER / method
    argv = [*SHARED, "--steps", steps, "--val-every", val_every, "--out", str(out)]
    results, run = train(method, argv)
    for name, network in run.networks.items():
        assert_equal_on_both(network.parameters(), f"{method}: parameters of {name}")
        statistics = [b for b in network.buffers() if b.is_floating_point()]
        assert_equal_on_both(statistics, f"{method}: BatchNorm's statistics of {name}")
    if dist.get_rank():
        assert results == {}
    else:
        assert results["headline"]["dice"] >= 0
    dist.barrier()
    assert len(list(out.glob("*/*"))) == 1, "one run folder for both"
    assert [row["step"] for row in rows_of(run_folder(out))] == rows
    drawn = common.gather(run.data.batch()[-1].tolist())
    assert len(drawn[0]) == len(drawn[1]) == 2
    assert not set(drawn[0]) & set(drawn[1]), "each process has its own half of the batch"
    return run


def check_resume(whole):
    """Killed in the fifth step and resumed, both processes as one run."""
    Watched.killed = True
    argv = [*SHARED, "--steps", "5", "--val-every", "4", "--out", str(FOLDER / "parts")]
    try:
        train("mean_teacher", argv)
        raise AssertionError("it was not killed")
    except KeyboardInterrupt:
        Watched.killed = False
    dist.barrier()
    folder = run_folder(FOLDER / "parts")
    _, parts = train("mean_teacher", ["--resume", str(folder)])
    assert parts.first_step == 4
    for one, other in zip(whole.networks.values(), parts.networks.values(), strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), f"resumed: {name} differs"
    dist.barrier()
    logs = [Path(run.folder, "log.csv").read_bytes() for run in (whole, parts)]
    assert logs[0] == logs[1]


def check_odd_batch():
    """Three images are refused, since they cannot be shared alike."""
    try:
        main_of("mean_teacher")([*SHARED, "--batch-size", "3", "--out", str(FOLDER / "odd")])
    except SystemExit as stopped:
        assert stopped.code == 2
    assert not (FOLDER / "odd").exists()


def main():
    args = common.parse(common.parser(__doc__), SHARED)
    data = common.Data(args)  # the cache is written here, by both
    check_gradients(args, data)
    dist.barrier()
    if dist.get_rank():
        os.replace = forbidden  # what writes files in place
    runs = {method: check_method(method) for method in METHODS}
    check_resume(runs["mean_teacher"])
    check_odd_batch()
    dist.barrier()
    print("both processes agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
