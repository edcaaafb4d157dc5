"""Write tests/traces.json, the first 5 steps' losses of every method: python tests/make_traces.py

Only after a commit that changes numbers on purpose.
"""
import csv
import importlib
import json
import tempfile
from pathlib import Path

from conftest import METHODS, ROOT, run_folder

traces = {}
for method in METHODS:
    with tempfile.TemporaryDirectory() as folder:
        steps = 6 if method == "ucmt" else 5
        argv = f"--data phantom --size 32 --width 4 --steps {steps} --device cpu --batch-size 2 --unlabeled-batch 2 --labeled 3"
        importlib.import_module(method).main([*argv.split(), "--val-every", "1", "--out", folder])
        rows = list(csv.DictReader(open(run_folder(Path(folder)) / "log.csv")))
    traces[method] = {k: [round(float(r[k]), 7) for r in rows] for k in rows[0] if k not in ("step", "val_dice")}
(ROOT / "tests" / "traces.json").write_text(json.dumps(traces, indent=1) + "\n")
