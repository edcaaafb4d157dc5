"""What every method file owes its reader: card, equations, skeleton, copyable core, exact runs."""
import ast
import builtins
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, equal, last_of, main_of, run_folder
from make_traces import TRACES, rows_of, trace_of

import common

# Lines of all methods' main, in this order; "..." stands for what may differ.
SKELETON = """\
    # options
    options = parser(__doc__)
    args = parse(options, argv)
    # data, networks, optimizer, run
    data = Data(args)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    autocast, scaler = mixed_precision(args)
    run = Run(__file__, args, data, networks, [optimizer, scaler], ...
    for step in run.steps():
        # 1 batch...
        # 2 views
        # 3 targets
        # 4 losses
        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # 6 teacher
        # 7 log, validate, save
        run.save(step)
    return run.finish()""".splitlines()
MOST_LINES = {"mlds": 500, "ucmt": 350, "contrastive_st": 330}  # boxes; two ways to mix; rounds
RUN_FILES = ["args.json", "best.pt", "last.pt", "log.csv", "preview.png", "results.json",
             "split.json"]

methods = pytest.mark.parametrize("method", METHODS)


# --- The files as texts ---------------------------------------------------------------------------

def source(method):
    return (ROOT / f"{method}.py").read_text(encoding="utf-8")


def sections(method):
    """{title: text} of the file's sections."""
    parts = re.split(r"^# -{20,} (\w+)$", source(method), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def functions_in(text):
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]


def names_in(tree, context):
    """The names that code reads (ast.Load) or sets (ast.Store)."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, context)}


@methods
def test_equations_functions_and_tests_match_one_to_one(method):
    card = ast.get_docstring(ast.parse(source(method)))
    listed = re.findall(r"^\s+Eq\. \((\d+)\)\s+(\w+)\s+\S", card, flags=re.M)
    assert [int(n) for n, _ in listed] == list(range(1, len(listed) + 1))
    functions = functions_in(sections(method)["Equations"])
    defined = []
    for function in functions:
        found = re.match(r"Eq\. \((\d+)\): .*[=←]", ast.get_docstring(function))
        assert found, f"the docstring of {function.name} begins with 'Eq. (n): formula'"
        defined.append((found[1], function.name))
        body = function.body[1:]
        assert body[-1].end_lineno - body[0].lineno < 16
        assert "args" not in names_in(function, ast.Load)
    assert defined == [(n, name) for n, name in listed if name != "main"]
    main = [n for n, name in listed if name == "main"]
    assert len(main) == 1 and f"# Eq. ({main[0]})" in source(method).split("def main")[1]
    text = (ROOT / "tests" / f"test_{method}.py").read_text(encoding="utf-8")
    tests = set(re.findall(r"^def test_eq(\d+)_(\w+)", text, flags=re.M))
    for n, name in listed:
        of_n = [test for k, test in tests if k == n]
        assert any(test.startswith(name) for test in of_n), f"no test of Eq. ({n}) {name}"
    assert {n for n, _ in tests} == {n for n, _ in listed}


@methods
def test_skeleton_is_identical(method):
    lines = source(method).split("def main")[1].splitlines()
    if method == "contrastive_st":  # its learning rate decays anew in every round
        theirs, shared = "poly_decay(step - start, end - start)", "poly_decay(step, args.steps)"
        lines = [line.replace(theirs, shared) for line in lines]
    places = []
    for line in SKELETON:
        start = line.removesuffix("...")
        found = [i for i, text in enumerate(lines) if text.startswith(start)]
        if start == line:
            found = [i for i in found if lines[i] == line]
        assert len(found) == 1, f"missing, changed or twice: {line}"
        places += found
    assert places == sorted(places)


@methods
def test_a_method_calls_steps_log_save_and_finish_of_run_and_nothing_else(method):
    tree = ast.parse(source(method))
    used, alone = set(), 0  # alone: `run` itself, given to a function, say
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ("run", "Run"):
            used.add(node.attr)
            alone -= 1
        if isinstance(node, ast.Name) and node.id == "run" and isinstance(node.ctx, ast.Load):
            alone += 1
    assert used == {"steps", "log", "save", "finish"}
    assert alone == 0


def test_common_names_no_method():
    """Only docstrings, comments and messages (texts of several words) may, as examples."""
    tree = ast.parse((ROOT / "common.py").read_text(encoding="utf-8"))
    words = set()
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):  # names, attributes, imports, constants, ...
            if isinstance(value, str) and " " not in value.strip():
                words.add(value)
    assert {"UNet", "supervised", "networks"} <= words
    for method in METHODS:
        assert not [word for word in words if method in word.lower()]


@methods
def test_file_fits_a_lecture(method):
    lines = source(method).splitlines()
    assert 120 <= len(lines) <= MOST_LINES.get(method, 320)
    assert max(map(len, lines)) <= 100
    card = ast.get_docstring(ast.parse(source(method)))
    assert len(card.splitlines()) <= 75
    for part in ("https://arxiv.org/abs/", "Idea\n", "Run\n", "Equations", "Differences\n"):
        assert part in card
    for line in lines:  # every constant has its source
        if re.match(r"[A-Z_]+ = ", line):
            assert re.search(r"# \[(paper|code|ours)\]", line), line


@methods
def test_modules_and_equations_need_torch_alone(method):
    """They can be copied into another project: nothing of common.py, no option, no constant."""
    parts = sections(method)
    tree = ast.parse(parts["Modules"] + parts["Equations"])
    bound = names_in(tree, ast.Store)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Import | ast.ImportFrom)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        if isinstance(node, ast.arg):
            bound.add(node.arg)
    needed = names_in(tree, ast.Load) - bound - set(dir(builtins))
    assert needed <= {"torch", "nn", "F", "math"}
    from_outside = {name: importlib.import_module(name) for name in ("torch", "math")}
    from_outside |= {"nn": torch.nn, "F": torch.nn.functional}
    exec(compile(tree, method, "exec"), from_outside)
    for function in functions_in(parts["Equations"]):
        assert callable(from_outside[function.name])


@methods
def test_help_is_the_card(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        main_of(method)(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "Differences" in out and "--labeled" in out and "10%" in out


def test_nothing_beyond_the_allowed_packages_is_imported():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]
    allowed = {"torch", "torchvision", "numpy", "PIL", "tqdm", "pytest", *sys.stdlib_module_names}
    allowed |= {path.stem for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


# --- Runs -----------------------------------------------------------------------------------------

def assert_same_runs(one, other):
    """Two run folders whose log and checkpoints are equal bit for bit."""
    one, other = Path(one), Path(other)
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    assert equal(last_of(one), last_of(other))
    best = [torch.load(folder / "best.pt", weights_only=True) for folder in (one, other)]
    assert equal(*best)


def interrupt(method, argv, call, monkeypatch):
    """Run a method, with Ctrl-C in the middle of a step: at the `call`-th call of set_lr."""
    calls = itertools.count(1)

    def set_lr(optimizer, lr):
        if next(calls) == call:
            raise KeyboardInterrupt
        return common.set_lr(optimizer, lr)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(method), "set_lr", set_lr)
        with pytest.raises(KeyboardInterrupt):
            main_of(method)(argv)


def farewell(capsys):
    """What is printed after Ctrl-C, as Python does it when the exception reaches the top."""
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    return capsys.readouterr().out


def steps_logged(folder):
    return [row["step"] for row in rows_of(folder)]


@methods
@pytest.mark.parametrize("classes, channels, labeled", [(2, 3, "3"), (3, 1, "100%"), (5, 3, "3")])
def test_smoke(method, classes, channels, labeled, make_dataset, options):
    """Any number of classes, grey or colour, also without an unlabelled image."""
    scale = 255 if classes == 2 else 1
    root = make_dataset(classes=classes, channels=channels, scale=scale, size=40)
    results = main_of(method)(options("--labeled", labeled, data=root, steps=2))
    assert results["headline"]["dice"] >= 0 and results["labeled"] == labeled
    folder = Path(results["folder"])
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert saved["classes"] == classes and saved["channels"] == channels and saved["size"] == 32


@methods
def test_same_seed_same_run_and_hidden_masks_stay_hidden(method, make_dataset, options, tmp_path):
    root, main = make_dataset(), main_of(method)
    argv = options("--val-every", "2", data=root, steps=2)
    first = Path(main([*argv, "--out", str(tmp_path / "a")])["folder"])
    hidden = json.loads((first / "split.json").read_text())["unlabeled"]
    for i, name in enumerate(hidden):  # garbage, or wrong class numbers, in their place
        path = root / "masks" / f"{name}.png"
        if i % 2:
            path.write_bytes(b"garbage")
        else:
            path.unlink()
            np.save(path.with_suffix(".npy"), np.full((32, 32), 2))
    second = Path(main([*argv, "--out", str(tmp_path / "b")])["folder"])
    other_seed = Path(main([*argv, "--out", str(tmp_path / "c"), "--seed", "1"])["folder"])
    assert_same_runs(first, second)
    assert (first / "log.csv").read_bytes() != (other_seed / "log.csv").read_bytes()


@methods
def test_interrupted_and_resumed_equals_uninterrupted(method, options, tmp_path, monkeypatch,
                                                      capsys):
    """Interrupted twice: in the 6th step, after a checkpoint of 4, and in the 10th, after one of 8.

    Each time log.csv gets what a kill in the middle of a row would leave.
    """
    main = main_of(method)
    argv = options("--val-every", "4", steps=10)
    whole = main([*argv, "--out", str(tmp_path / "whole")])
    interrupt(method, [*argv, "--out", str(tmp_path / "parts")], 6, monkeypatch)
    folder = run_folder(tmp_path / "parts")
    for checkpoint in (4, 8):
        assert steps_logged(folder)[-1] == checkpoint == last_of(folder)["step"]
        message = f"after step {checkpoint}, the last checkpoint: python {method}.py --resume"
        assert f'{message} "{folder}"\n' in farewell(capsys)
        with open(folder / "log.csv", "a") as file:
            file.write(f"{checkpoint + 1},0.5")
        if checkpoint == 4:
            interrupt(method, ["--resume", str(folder)], 6, monkeypatch)
    parts = main(["--resume", str(folder)])
    assert list(folder.parent.iterdir()) == [folder] and parts["folder"] == str(folder)
    assert_same_runs(whole["folder"], folder)
    for name in ("networks", "headline", "best_step", "units", "split"):
        assert whole[name] == parts[name]


def test_killed_while_saving_resumes_from_the_checkpoint_before(options, tmp_path, monkeypatch,
                                                                capsys):
    """As kill -9 leaves it: last.pt.tmp half written, last.pt the one before."""
    main = main_of("mean_teacher")
    argv = options("--val-every", "5", steps=15)
    whole = main([*argv, "--out", str(tmp_path / "whole")])
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("last.pt") and os.path.exists(target):
            raise SystemExit(137)
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            main([*argv, "--out", str(tmp_path / "parts")])
    folder = run_folder(tmp_path / "parts")
    [half] = folder.glob("*.tmp")
    half.write_bytes(half.read_bytes()[:1000])
    main(["--resume", str(folder)])
    assert "continuing at step 5" in capsys.readouterr().out
    assert_same_runs(whole["folder"], folder)


def test_rows_after_the_checkpoint_are_written_anew(options, tmp_path, monkeypatch, capsys):
    """A checkpoint of 24, then a row of 40, which the resumed run must not write a second time."""
    main = main_of("mean_teacher")
    argv = options("--val-every", "24", "--supervised", steps=44)
    whole = main([*argv, "--out", str(tmp_path / "whole")])
    assert steps_logged(Path(whole["folder"])) == [20, 24, 40, 44]
    interrupt("mean_teacher", [*argv, "--out", str(tmp_path / "parts")], 43, monkeypatch)
    folder = run_folder(tmp_path / "parts")
    assert steps_logged(folder) == [20, 24, 40]
    assert "To continue after step 24, the last checkpoint" in farewell(capsys)
    interrupt("mean_teacher", ["--resume", str(folder)], 18, monkeypatch)  # in the 42nd step
    assert "To continue after step 24, the last checkpoint" in farewell(capsys)
    assert steps_logged(folder) == [20, 24, 40]
    main(["--resume", str(folder)])
    assert_same_runs(whole["folder"], folder)


def test_resume_from_a_damaged_checkpoint(options, capsys):
    results = main_of("mean_teacher")(options(steps=2))
    last = Path(results["folder"], "last.pt")
    content = last.read_bytes()[:1000]
    last.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main_of("mean_teacher")(["--resume", results["folder"]])
    assert stopped.value.code == 2 and "last.pt cannot be used" in capsys.readouterr().err
    assert last.read_bytes() == content


def test_a_run_on_the_phantom_resumes_after_its_cache_was_deleted(tmp_path):
    """--help says that it may be deleted at any time."""
    argv = ["--size", "16", "--width", "4", "--steps", "1", "--device", "cpu",
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs")]
    folder = main_of("mean_teacher")(argv)["folder"]
    shutil.rmtree(tmp_path / "cache")
    assert main_of("mean_teacher")(["--resume", folder])["folder"] == folder


def test_resume_without_a_checkpoint_starts_at_0_and_says_so(options, tmp_path, monkeypatch,
                                                             capsys):
    argv = options("--val-every", "2")
    interrupt("mean_teacher", [*argv, "--out", str(tmp_path / "parts")], 1, monkeypatch)
    folder = run_folder(tmp_path / "parts")
    message = farewell(capsys)
    assert "interrupted before the first checkpoint; to start anew: " in message
    assert f'mean_teacher.py --resume "{folder}"' in message
    main_of("mean_teacher")(["--resume", str(folder)])
    assert f"no checkpoint yet in {folder}, starting at step 0" in capsys.readouterr().out
    whole = main_of("mean_teacher")([*argv, "--out", str(tmp_path / "whole")])
    assert_same_runs(whole["folder"], folder)


def test_other_errors_keep_their_traceback(options, capsys):
    main_of("mean_teacher")(options(steps=1))
    try:
        raise ValueError("a mistake")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err and "ValueError: a mistake" in err


@pytest.mark.slow
def test_ctrl_c_names_the_folder_to_resume(options, tmp_path):
    """A real process and a real SIGINT, after the first of its checkpoints."""
    argv = options("--supervised", "--val-every", "20", steps=60)
    whole = main_of("mean_teacher")([*argv, "--out", str(tmp_path / "whole")])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored after a shell's &
    process = subprocess.Popen(
        [sys.executable, "mean_teacher.py", *argv, "--out", str(tmp_path / "parts")], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    end = time.time() + 60
    while not list(tmp_path.glob("parts/*/*/last.pt")):
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    folder = run_folder(tmp_path / "parts")
    step = last_of(folder)["step"]
    assert step < 60 and process.returncode != 0
    assert f"interrupted. To continue after step {step}, the last checkpoint:" in out
    assert out.rstrip().endswith(f': python mean_teacher.py --resume "{folder}"')
    assert "Traceback" not in out + err and "KeyboardInterrupt" not in out + err
    main_of("mean_teacher")(["--resume", str(folder)])
    assert_same_runs(whole["folder"], folder)


# Trains the copy, interrupts it, resumes it and predicts: words are an image, --out, more options.
LIFE_OF_A_COPY = """
import importlib, pathlib, sys
import common
my_method = importlib.import_module("my-method")
image, out, *argv = sys.argv[1:]

def interrupted(step, steps):
    if step == 3:
        raise KeyboardInterrupt
    return common.poly_decay(step, steps)

my_method.poly_decay = interrupted
try:
    my_method.main([*argv, "--out", out])
except KeyboardInterrupt:
    my_method.poly_decay = common.poly_decay
[folder] = pathlib.Path(out).glob("*/*")
my_method.main(["--resume", str(folder)])
common.main(["predict", "--run", str(folder), "--images", image, "--device", "cpu",
             "--out", out + "/predicted"])
"""


@pytest.mark.slow
def test_a_method_copied_under_another_name_trains_resumes_and_predicts(options, drawn, tmp_path):
    argv = options("--val-every", "2")
    original = main_of("cps")(argv)
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(ROOT / "common.py", copied)
    shutil.copy(ROOT / "cps.py", copied / "my-method.py")
    image = max(drawn.glob("images/*"))
    done = subprocess.run(
        [sys.executable, "-c", LIFE_OF_A_COPY, str(image), str(copied / "runs"), *argv],
        cwd=copied, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing at step 2" in done.stdout
    [folder] = copied.glob("runs/phantom/*")
    assert folder.name.startswith("my-method-3-seed0")
    results = json.loads((folder / "results.json").read_text())
    assert results["file"] == results["method"] == "my-method"
    assert results["networks"] == original["networks"]
    ours, theirs = last_of(folder), last_of(Path(original["folder"]))
    assert ours["file"] == "my-method" and equal(ours["networks"], theirs["networks"])
    [predicted] = copied.glob("runs/predicted/masks/*")
    assert predicted.name == image.name


@methods
def test_committed_trace(method, drawn, tmp_path):
    """The losses of 5 steps, to 1e-3. After a numbers-changing commit: tools/make_traces.py."""
    trace = trace_of(method, drawn, tmp_path / "runs", tmp_path / "cache")
    committed = json.loads(TRACES.read_text())[method]
    assert list(trace) == list(committed)
    for term, values in committed.items():
        # an agreement counts pixels: another machine's rounding moves a few of 4096
        pixels = 3e-3 if term in ("agreement", "trusted") else 0
        assert trace[term] == pytest.approx(values, rel=1e-3, abs=pixels), term
