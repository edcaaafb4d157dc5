"""Write the first steps' losses of every method, or of those named, into tests/traces.json:

    python tests/tools/make_traces.py [METHOD ...]

Only after a commit that changes numbers on purpose.
"""
import csv
import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
from conftest import METHODS, draw_small_phantom, main_of  # noqa: E402 - after the path

TRACES = TESTS / "traces.json"


def rows_of(folder):
    """The rows of a run folder's log.csv: [{name: number}], without its empty cells."""
    with open(Path(folder, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    return [{name: float(text) for name, text in row.items() if text} for row in rows]


def trace_of(method, data, out, cache):
    """{term: its values} in log.csv: of five steps; of UCMT's six, of which two share a row."""
    steps, val_every = 5, 1
    if method == "ucmt":
        steps, val_every = 6, 2
    argv = ["--data", data, "--labeled", 3, "--size", 32, "--width", 4, "--batch-size", 2,
            "--unlabeled-batch", 2, "--steps", steps, "--val-every", val_every,
            "--device", "cpu", "--precision", "fp32", "--out", out, "--cache", cache]
    if method == "contrastive_st":
        # after one step classes are nearly tied, and one pixel's label moves a class mean. Rounding
        # (1e-7 on weak's grid) changed the contrast by 2%; with these options it does by 0.004%
        argv += ["--batch-size", 4, "--unlabeled-batch", 4, "--lr", 1e-4]
    results = main_of(method)([str(word) for word in argv])
    rows = rows_of(results["folder"])
    terms = [name for name in rows[0] if name not in ("step", "val_dice")]
    return {name: [row[name] for row in rows] for name in terms}


def main(methods):
    traces = {}
    if TRACES.exists():
        traces = json.loads(TRACES.read_text())
    with tempfile.TemporaryDirectory() as folder:
        data = draw_small_phantom(Path(folder, "phantom"))
        for method in methods:
            terms = trace_of(method, data, Path(folder, "runs"), Path(folder, "cache"))
            traces[method] = {}
            for name, values in terms.items():
                traces[method][name] = [round(value, 7) for value in values]
    TRACES.write_text(json.dumps(traces, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or METHODS)
