"""All six methods on a GPU: python tests/gpu.py [OPTION ...], such as --size 128 --width 16.

Of each a short whole run and its --resume, then seconds per optimizer step in bf16 and fp32, with and
without --compile, at 256 px and width 32 on the phantom, and the largest memory. On a machine without
a GPU, `python tests/gpu.py --device cpu --size 32 --width 4` tries the script itself.
"""
import importlib
import sys
import tempfile
import time

import torch
from conftest import METHODS

import common

WARM, TIMED = 10, 40  # turns of the loop before the clock starts, and with it
whole, marks = (common.Run.steps, common.Run.save, common.Run.finish), []
options = ["--size", "256", "--width", "32", *sys.argv[1:]]
cuda = torch.cuda.is_available() and "cpu" not in options


def timed(run, stride=1):
    for turn in range(WARM + TIMED + 1):
        if turn in (WARM, WARM + TIMED):
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter() / stride)
        yield run.args.steps // 2 + stride * turn  # contrastive self-training: within a round


for method in METHODS:
    main = importlib.import_module(method).main
    with tempfile.TemporaryDirectory() as out:
        common.Run.steps, common.Run.save, common.Run.finish = whole
        argv = [*options, "--steps", "40", "--val-every", "20", "--out", out]
        dice = main(argv)["headline"]["dice"]
        main([*argv, "--resume"])
        print(f"{method}: a whole run and --resume, test Dice {dice:.1f}", flush=True)
        common.Run.steps, common.Run.save, common.Run.finish = timed, lambda *_: None, lambda *_: None
        for precision in ("bf16", "fp32") if cuda else ("fp32",):
            for more in ([], ["--compile"]) if cuda else ([],):
                marks.clear()
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                name = " ".join([method, precision, *more])
                try:
                    main([*options, "--precision", precision, *more, "--steps", "1000", "--out", out])
                except Exception as error:  # the others are still tried
                    print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
                memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
                print(f"{name}: {(marks[1] - marks[0]) / TIMED:.4f} s a step, {memory:.1f} GiB", flush=True)
