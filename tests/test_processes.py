"""Two processes, as torchrun starts them on two GPUs, here on the CPU with gloo."""
import os
import subprocess
import sys

from conftest import ROOT


def test_two_processes_hold_the_same_parameters_and_average_gradients(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "tests" / "ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks agree" in done.stdout
