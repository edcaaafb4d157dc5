"""What every method file owes its reader: card, equations, skeleton, copyable core, exact runs."""
import ast
import csv
import importlib
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, equal, run_folder

import common

SKELETON = """\
    # options
    options = parser(__doc__)
    args = parse(options, argv)
    # data, run, networks, optimizer
    data = Data(args)
    networks = run.place(build(data.channels, data.classes, args.width))
    for step in run.steps(
        # 1 batch
        # 2 views
        # 3 targets
        # 4 losses
        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss)
        run.update(optimizer)
        # 6 teacher
        # 7 log, validate, save
        run.save(step)
    return run.finish()""".splitlines()

methods = pytest.mark.parametrize("method", METHODS)


def source(method):
    return (ROOT / f"{method}.py").read_text()


def sections(method):
    """{title: text} of the file's sections."""
    parts = re.split(r"^# -{20,} (\w+)$", source(method), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@methods
def test_equations_functions_and_tests_match_one_to_one(method):
    card = ast.get_docstring(ast.parse(source(method)))
    listed = re.findall(r"^\s+Eq\. \((\d+)\)\s+(\w+)\s+\S", card, flags=re.M)
    functions = [f for f in ast.parse(sections(method)["Equations"]).body if isinstance(f, ast.FunctionDef)]
    defined = [(re.match(r"Eq\. \((\d+)\): .*[=←]", ast.get_docstring(f)), f.name) for f in functions]
    assert all(found for found, _ in defined), "an equation's docstring begins with 'Eq. (n): formula'"
    assert [(found[1], name) for found, name in defined] == [(n, name) for n, name in listed if name != "main"]
    assert [int(n) for n, _ in listed] == list(range(1, len(listed) + 1))
    main = [n for n, name in listed if name == "main"]
    assert len(main) == 1 and f"# Eq. ({main[0]})" in source(method).split("def main")[1]
    tests = set(re.findall(r"^def test_eq(\d+)_(\w+)", (ROOT / "tests" / f"test_{method}.py").read_text(), flags=re.M))
    for n, name in listed:
        assert any(k == n and test.startswith(name) for k, test in tests), f"no test of Eq. ({n}) {name}"
    assert {n for n, _ in tests} == {n for n, _ in listed}
    for f in functions:
        body = f.body[1:]
        assert body[-1].end_lineno - body[0].lineno < 16 and not re.search(r"\bargs\b", ast.unparse(f))


@methods
def test_skeleton_is_identical(method):
    lines = source(method).split("def main")[1].splitlines()
    if method == "contrastive_st":  # its learning rate decays anew in every round
        lines = [line.replace("poly_decay(step - start, end - start)", "poly_decay(step, args.steps)") for line in lines]
    places = []
    for line in SKELETON:
        found = [i for i, x in enumerate(lines) if x == line or line.endswith("(") and x.startswith(line)]
        assert found, f"missing or changed: {line}"
        places.append(found[0])
    assert places == sorted(places)


@methods
def test_file_fits_a_lecture(method):
    text = source(method)
    assert 120 <= len(text.splitlines()) <= 285 and max(map(len, text.splitlines())) <= 100
    card = ast.get_docstring(ast.parse(text))
    assert len(card.splitlines()) <= 45
    for part in ("https://arxiv.org/abs/", "Idea\n", "Run\n", "Equations", "Differences\n"):
        assert part in card
    for line in text.splitlines():  # every constant has its source
        if re.match(r"[A-Z_]+ = ", line):
            assert re.search(r"# \[(paper|code|ours)\]", line), line


@methods
def test_modules_and_equations_run_without_common(method):
    parts = sections(method)
    code = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n" + parts["Modules"] + parts["Equations"]
    saved = sys.modules.pop("common")
    sys.modules["common"] = None  # an import of common would raise
    try:
        exec(compile(code, method, "exec"), {})
    finally:
        sys.modules["common"] = saved
    undefined = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)} & set(dir(common)) - set(dir(__builtins__))
    assert undefined <= {"torch", "nn", "F", "math"}, f"needs common's {undefined}"


@methods
def test_help_is_the_card(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(method).main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "Differences" in out and "--labeled" in out and "10%" in out


def test_nothing_beyond_the_allowed_packages_is_imported():
    allowed = {"torch", "torchvision", "numpy", "PIL", "tqdm", "pytest", "common", "conftest", "fuzz", *METHODS}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed | set(sys.stdlib_module_names), f"{path.name} imports {name}"


@methods
@pytest.mark.parametrize("classes, channels", [(2, 3), (3, 1), (5, 3)])
def test_smoke(method, classes, channels, make_dataset, options, tmp_path):
    root = make_dataset(classes=classes, channels=channels, scale=255 if classes == 2 else 1, size=40)
    results = importlib.import_module(method).main(options(root, steps=2, width=8))
    assert results["headline"]["dice"] >= 0
    folder = run_folder(tmp_path / "runs")
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["args.json", "split.json", "log.csv", "last.pt", "best.pt", "results.json", "preview.png"])
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert saved["classes"] == classes and saved["channels"] == channels and saved["size"] == 32


@methods
def test_same_seed_same_run_and_hidden_masks_stay_hidden(method, make_dataset, options, tmp_path):
    root, main = make_dataset(), importlib.import_module(method).main
    traces = []
    for name, garbage, seed in (("a", 0, "0"), ("b", 1, "0"), ("c", 0, "1")):
        if garbage:
            split = json.loads((run_folder(tmp_path / "a") / "split.json").read_text())
            for i, unit in enumerate(split["unlabeled"]):
                path = root / "masks" / f"{unit}.png"
                path.write_bytes(b"garbage") if i % 2 else path.unlink()
                if not i % 2:
                    np.save(path.with_suffix(".npy"), np.full((32, 32), 2))
        main(options(root, "--val-every", "2", "--seed", seed, out=name))
        folder = run_folder(tmp_path / name)
        weights = torch.load(folder / "last.pt", weights_only=True)["networks"]
        traces.append(((folder / "log.csv").read_bytes(), weights))
    assert traces[0][0] == traces[1][0] != traces[2][0]
    assert equal(traces[0][1], traces[1][1])


@methods
def test_interrupted_and_resumed_equals_uninterrupted(method, options, tmp_path, monkeypatch, capsys):
    main = importlib.import_module(method).main
    argv = options("phantom", "--val-every", "6", steps=12)
    main([*argv, "--out", str(tmp_path / "whole")])

    log = common.Run.log

    def ctrl_c(run, **terms):  # the signal comes in the middle of a turn, which is still finished
        log(run, **terms)
        if run.count == 2 and ctrl_c.armed:
            ctrl_c.armed = False
            os.kill(os.getpid(), signal.SIGINT)
    ctrl_c.armed = False
    save = common.Run.save

    def arm_after_6(run, step):
        ctrl_c.armed = ctrl_c.armed or step in (4, 5)
        save(run, step)
    monkeypatch.setattr(common.Run, "log", ctrl_c)
    monkeypatch.setattr(common.Run, "save", arm_after_6)
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--out", str(tmp_path / "parts")])
    done = 6 + 2 * (2 if method == "ucmt" else 1)
    assert stopped.value.code == 130 and f"saved at step {done}" in capsys.readouterr().out
    monkeypatch.undo()
    with open(run_folder(tmp_path / "parts") / "log.csv", "a") as file:
        file.write(f"{done + 1},0.5")  # as a kill in the middle of a row leaves it
    main([*argv, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = run_folder(tmp_path / "whole"), run_folder(tmp_path / "parts")
    assert whole.name == parts.name and len(list(parts.parent.iterdir())) == 1
    assert (whole / "log.csv").read_bytes() == (parts / "log.csv").read_bytes()
    assert equal(*(torch.load(f / "last.pt", weights_only=True) for f in (whole, parts)))
    assert equal(*(torch.load(f / "best.pt", weights_only=True) for f in (whole, parts)))


def test_killed_while_saving_resumes_from_the_checkpoint_before(options, tmp_path, monkeypatch, capsys):
    """As kill -9 leaves it: last.pt.tmp half written, last.pt the one before."""
    main = importlib.import_module("mean_teacher").main
    argv = options("phantom", "--val-every", "5", steps=15)
    main([*argv, "--out", str(tmp_path / "whole")])
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("last.pt") and os.path.exists(target):
            raise SystemExit(137)
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        main([*argv, "--out", str(tmp_path / "parts")])
    monkeypatch.undo()
    assert list(run_folder(tmp_path / "parts").glob("*.tmp"))
    main([*argv, "--out", str(tmp_path / "parts"), "--resume"])
    assert "continuing at step 5" in capsys.readouterr().out
    whole, parts = run_folder(tmp_path / "whole"), run_folder(tmp_path / "parts")
    assert (whole / "log.csv").read_bytes() == (parts / "log.csv").read_bytes()
    assert equal(*(torch.load(f / "last.pt", weights_only=True) for f in (whole, parts)))


def test_rows_after_the_checkpoint_are_cut(options, tmp_path, monkeypatch):
    """Rows to step 80, a checkpoint of 60; resumed, and stopped by Ctrl-C before the next row."""
    main, save = importlib.import_module("mean_teacher").main, common.Run.save
    argv = options("phantom", "--val-every", "60", "--supervised", steps=120)

    def stopping_at(last, how):
        def stop_there(run, step):
            run.interrupted = how == "Ctrl-C" and step == last
            save(run, step)
            if step == last:
                raise KeyboardInterrupt
        monkeypatch.setattr(common.Run, "save", stop_there)
    stopping_at(84, "kill")
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    log = run_folder(tmp_path / "runs") / "log.csv"
    assert [row["step"] for row in csv.DictReader(open(log))] == ["20", "40", "60", "80"]
    stopping_at(64, "Ctrl-C")
    with pytest.raises(SystemExit):
        main([*argv, "--resume"])
    assert [row["step"] for row in csv.DictReader(open(log))] == ["20", "40", "60"]


def test_resume_from_a_damaged_checkpoint(options, tmp_path, capsys):
    main, argv = importlib.import_module("mean_teacher").main, options("phantom", steps=2)
    main(argv)
    last = run_folder(tmp_path / "runs") / "last.pt"
    last.write_bytes(content := last.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--resume"])
    assert stopped.value.code == 2 and "last.pt cannot be used" in capsys.readouterr().err
    assert last.read_bytes() == content


def test_resume_without_a_checkpoint_starts_at_0_and_says_so(options, capsys):
    importlib.import_module("mean_teacher").main(options("phantom", "--resume", steps=2))
    assert "no checkpoint yet, starting at step 0" in capsys.readouterr().out


@methods
def test_committed_trace(method, options, tmp_path):
    """The losses of 5 steps, to 1e-3. After a numbers-changing commit: python tests/make_traces.py"""
    importlib.import_module(method).main(options("phantom", "--val-every", "1", steps=6 if method == "ucmt" else 5))
    rows = list(csv.DictReader(open(run_folder(tmp_path / "runs") / "log.csv")))
    committed = json.loads((ROOT / "tests" / "traces.json").read_text())[method]
    for key, values in committed.items():
        # an agreement counts pixels: another machine's rounding moves a few of 4096
        pixels = 3e-3 if key in ("agreement", "trusted") else 0
        assert [float(r[key]) for r in rows] == pytest.approx(values, rel=1e-3, abs=pixels), key
    assert set(committed) == set(rows[0]) - {"step", "val_dice"}


@methods
def test_everything_labelled_streams_the_labelled_images(method, make_dataset, options):
    results = importlib.import_module(method).main(options(make_dataset(), "--labeled", "100%", steps=2))
    assert results["labeled"] == "100%"
