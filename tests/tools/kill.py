"""Kill runs at random moments and resume them: python tests/tools/kill.py 60

Each run, of one of the methods in turn, is a process on the small phantom that is ended by SIGKILL
at a random moment, and started again with --resume, until it has finished. Its networks, optimizer,
random state and log must equal the uninterrupted run's, bit for bit.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import METHODS, ROOT, draw_small_phantom, equal, last_of  # noqa: E402

WORDS = ("--size 32 --width 4 --steps 60 --val-every 4 --batch-size 2 --unlabeled-batch 2 "
         "--labeled 3 --device cpu --precision fp32").split()


def start(method, words):
    """A process of the method's file, with one thread and without output."""
    return subprocess.Popen([sys.executable, str(ROOT / f"{method}.py"), *words],
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_and_resume(method, argv, out, seconds, rng):
    """Run, killed at random moments until it ends by itself; its folder and the number of kills."""
    kills = 0
    while True:
        folders = sorted(out.glob("*/*/args.json"))
        words = [*argv, "--out", str(out)]
        if folders:
            words = ["--resume", str(folders[0].parent)]
        process = start(method, words)
        try:
            status = process.wait(rng.uniform(0.1, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if status != 0:
            raise RuntimeError(f"{method} ended with status {status}: {' '.join(words)}")
        return folders[0].parent if folders else next(out.glob("*/*")), kills


def main(count):
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = draw_small_phantom(folder / "phantom")
        argv = ["--data", str(data), "--cache", str(folder / "cache"), *WORDS]
        whole, seconds = {}, {}
        for method in METHODS:
            for attempt in ("first", "whole"):  # the first one fills the cache
                begin = time.time()
                out = folder / attempt / method
                if start(method, [*argv, "--out", str(out)]).wait() != 0:
                    raise RuntimeError(f"{method} does not run")
                seconds[method] = time.time() - begin
            [whole[method]] = out.glob("*/*")
        equal_runs, all_kills = 0, 0
        for k in range(count):
            method = METHODS[k % len(METHODS)]
            out = folder / f"run{k}"
            parts, kills = kill_and_resume(method, argv, out, seconds[method], rng)
            same = equal(last_of(whole[method]), last_of(parts))
            logs = [(run / "log.csv").read_bytes() for run in (whole[method], parts)]
            same = same and logs[0] == logs[1]
            equal_runs += same
            all_kills += kills
            verdict = "equal" if same else "DIFFERENT"
            print(f"{k}: {method}, killed {kills} times, {verdict}", flush=True)
    print(f"{equal_runs} of {count} runs equal, {all_kills} kills")
    sys.exit(0 if equal_runs == count else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
