"""Two processes, as torchrun starts them on two GPUs, here on the CPU with gloo."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT, draw_small_phantom, run_folder

import mean_teacher


@pytest.mark.slow
def test_two_processes_are_one_run_with_mean_gradients(tmp_path, capsys):
    """tools/ranks.py has the checks."""
    phantom = draw_small_phantom(tmp_path / "phantom", 16)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(ROOT / "tests" / "tools" / "ranks.py"),
               str(phantom), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("both processes agree") == 1  # the second one prints nothing
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(["--resume", str(run_folder(tmp_path / "parts"))])
    assert stopped.value.code == 2
    assert "the run had 2 processes, now 1" in capsys.readouterr().err
