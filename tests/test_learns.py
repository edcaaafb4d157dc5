"""Every method learns: 300 steps on the small phantom. Slow: pytest --slow tests/test_learns.py"""
import pytest
from conftest import METHODS, main_of

FLOOR = 30  # test Dice; an untrained network has 5 to 10, the methods 42 to 52 on seed 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_learns(method, options):
    argv = options("--val-every", "300", "--lr", "0.003", steps=300, width=8)
    results = main_of(method)([*argv, "--batch-size", "4", "--unlabeled-batch", "4"])
    for name, scores in results["networks"].items():
        if method != "cdma" or name == "CSA":  # another branch of CDMA may find no class at all
            assert scores["last"]["dice"] > FLOOR, name
