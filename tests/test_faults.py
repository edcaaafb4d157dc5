"""Faults around a run, what it says in plain words, and its defaults without a GPU."""
import codecs
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, draw_case, main_of
from PIL import Image, ImageDraw
from test_commands import GAIN, compare, fake_run

import common
import mean_teacher
import mlds
from common import Data, Run, parse, parser

pytestmark = pytest.mark.slow


def draw_set(root, units=8):
    """A dataset folder of photographs, 32 x 32, with three classes."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for u in range(units):
        image, mask = draw_case(rng, 32, 3, 1)
        Image.fromarray(image).save(root / "images" / f"case{u:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"case{u:02d}.png")
    return root


TINY = ["--labeled", "3", "--size", "32", "--width", "4", "--steps", "2", "--val-every", "1",
        "--batch-size", "2", "--unlabeled-batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def everyone():
    """A folder that any user may read and write, with a dataset and a finished run in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    draw_set(folder / "set")
    argv = ["--data", folder / "set", "--out", folder / "runs", "--cache", folder / "cache"]
    mean_teacher.main([*map(str, argv), *TINY, "--lr", "0.02", "--supervised"])
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished(everyone):
    """The folder of a finished labelled-only run, for all tests, which must not change it."""
    [folder] = everyone.glob("runs/set/*")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's folder, to be damaged by a test."""
    return shutil.copytree(finished, tmp_path / "copied" / "run")


@pytest.fixture
def hook(monkeypatch):
    """Python's own sys.excepthook at the start, and again after the test."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def data_of(argv):
    return Data(parse(parser(""), argv))


def stopped(capsys, main, *words):
    """The message of a command that must stop with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(word) for word in words])
    assert error.value.code == 2
    return capsys.readouterr().err


def predict(*words):
    common.main(["predict", "--device", "cpu", *map(str, words)])


def resume(folder):
    return mean_teacher.main(["--resume", str(folder)])


def find_background(networks, x):
    """A predict that never finds anything."""
    probs = torch.zeros(len(x), 3, *x.shape[2:])
    probs[:, 0] = 1
    return {"net": probs}


def no_pictures(networks, x):
    return {}


def run_of(argv, predict=find_background):
    """A Run without networks and training."""
    args = parse(parser(""), argv)
    return Run("x.py", args, Data(args), {}, [], predict, "net", no_pictures)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupt(*_, **__):
    raise KeyboardInterrupt


def said_by_the_hook(capsys):
    """What Python would print of the KeyboardInterrupt that is being handled."""
    capsys.readouterr()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and "KeyboardInterrupt" not in out + err
    return out + err


@pytest.mark.parametrize("module, name", [
    (common, "read_pixels"), (common, "read_mask"), (os, "replace")],
    ids=["images", "masks", "cache"])
def test_ctrl_c_while_decoding(make_dataset, options, tmp_path, capsys, monkeypatch, hook, module,
                               name):
    """A word, and nothing half built stays in the cache."""
    argv = options(data=make_dataset())
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            data_of(argv)
    assert "interrupted" in said_by_the_hook(capsys)
    assert not list(tmp_path.glob("cache/building-*"))
    assert len(data_of(argv).items) == 14


def test_ctrl_c_while_the_phantom_is_drawn(tmp_path, capsys, monkeypatch, hook):
    argv = ["--size", "16", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(common, "draw_slice", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parse(parser(""), argv)
    assert "interrupted" in said_by_the_hook(capsys)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_while_scoring(make_dataset, options, capsys, hook, saved):
    """It says how to go on; both times there is a run folder."""
    calls = []

    def be_interrupted(networks, x):
        calls.append(len(x))
        if len(calls) == 1 + saved:
            raise KeyboardInterrupt
        return find_background(networks, x)
    run = run_of(options("--val-every", 1, data=make_dataset(), steps=1), be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps():
            run.log(loss=1.0)
            run.save(step)
        run.finish()
    message = said_by_the_hook(capsys)
    assert "interrupted" in message and f'--resume "{run.folder}"' in message
    assert ("after step 1, the last checkpoint" in message) == saved


@pytest.mark.parametrize("command", ["predict", "compare"])
def test_ctrl_c_in_commands(finished, everyone, tmp_path, capsys, hook, command):
    words = [finished, "--out", tmp_path / "out"]
    if command == "predict":
        image = everyone / "set" / "images" / "case00.png"
        words = ["--run", *words, "--images", image, "--device", "cpu"]
    common.main([command, *map(str, words)])
    assert "interrupted" in said_by_the_hook(capsys)


# --- Consoles: a closed pipe, ASCII, no home ------------------------------------------------------


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """`python common.py compare RUN | head`, where head has seen enough."""
    folder = fake_run(tmp_path / "run", "cps", 0, [[50.0]])
    words = ["compare", str(folder), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, str(ROOT / "common.py"), *words],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.wait()
    assert "Traceback" not in error and "Exception ignored" not in error
    assert len(error.splitlines()) <= 1


def ascii_console(monkeypatch):
    """stdout and stderr that take ASCII alone, as with PYTHONIOENCODING=ascii: stdout's bytes."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    return written


def test_plus_minus_on_a_console_of_ascii(tmp_path, monkeypatch, hook):
    runs = [fake_run(tmp_path / str(seed), "cps", seed, [[50.0 + seed]]) for seed in (0, 1)]
    written = ascii_console(monkeypatch)
    common.main(["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    assert b"50.50 ? 0.71" in written.getvalue()
    assert "50.50 ± 0.71" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_greek_letters_of_help_on_a_console_of_ascii(method, monkeypatch, hook):
    written = ascii_console(monkeypatch)
    with pytest.raises(SystemExit) as error:
        main_of(method)(["--help"])
    assert error.value.code == 0
    assert b"--labeled" in written.getvalue()


def no_home():
    raise RuntimeError("Could not determine home directory.")  # as Path.home does


def test_without_a_home(make_dataset, options, capsys, monkeypatch, hook):
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for main, words in ((mean_teacher.main, []), (common.main, ["check"])):
        with pytest.raises(SystemExit) as error:
            main([*words, "--help"])
        assert error.value.code == 0
    assert Path(tempfile.gettempdir()).name in capsys.readouterr().out
    assert len(data_of(options(data=make_dataset())).items) == 14


# --- Files that may not be read -------------------------------------------------------------------


@contextlib.contextmanager
def without_rights(path, rights):
    """Nobody may use the path; for root, who always may, the process is nobody for a while."""
    if not hasattr(os, "seteuid"):
        pytest.skip("no rights of this kind")
    codecs.lookup("utf-8-sig")  # Python itself may lie where nobody can read
    before, user = path.stat().st_mode, os.geteuid()
    path.chmod(rights)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(before)
        importlib.invalidate_caches()


@pytest.mark.parametrize("rights", [0, 0o444], ids=["nothing", "names alone"])
@pytest.mark.parametrize("name", [
    ".", "images", "masks", "boxes", "tags", "classes.txt", "train.txt", "images/case03.png",
    "masks/case03.png", "boxes/case03.txt", "mine.txt"])
def test_what_may_not_be_read_in_a_dataset(everyone, capsys, name, rights):
    """Of folders: not even their files' names, or these alone."""
    root = everyone / f"unreadable-{name.replace('/', '-')}-{rights}"
    shutil.copytree(everyone / "set", root)
    for part in ("boxes", "tags"):
        (root / part).mkdir()
    (root / "classes.txt").write_text("background\nlung\nheart\n")
    (root / "train.txt").write_text("".join(f"case{u:02d}\n" for u in range(5)))
    (root / "boxes" / "case03.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    (root / "tags" / "case04.txt").write_text("1\n")
    (root / "mine.txt").write_text("case00\ncase01\ncase03\n")
    path = root / name
    if path.is_file() and rights:
        path.chmod(0o666)
        rights = 0o222
    out = everyone / f"out-of-{root.name}"
    words = ["--data", root, *TINY, "--labeled", root / "mine.txt", "--out", out,
             "--cache", everyone / f"cache-of-{root.name}"]
    with without_rights(path, rights):
        message = stopped(capsys, main_of("mlds"), *words)
    assert Path(name).name in message and "ermission" in message
    assert not out.exists()


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_where_nothing_may_be_written(everyone, capsys, option):
    locked = everyone / f"locked{option}"
    locked.mkdir()
    where = {"--out": everyone / "out", "--cache": everyone / "cache"}
    where[option] = locked / "new"
    words = ["--data", everyone / "set", *TINY]
    for name, folder in where.items():
        words += [name, folder]
    with without_rights(locked, 0o555):
        message = stopped(capsys, mean_teacher.main, *words)
    assert option in message and "ermission" in message


@pytest.mark.parametrize("rights", [0, 0o444])
@pytest.mark.parametrize("name", [".", "args.json", "split.json", "last.pt"])
def test_what_may_not_be_read_in_a_run(everyone, finished, capsys, name, rights):
    if name != "." and rights:
        pytest.skip("may be read")
    folder = shutil.copytree(finished, everyone / f"locked-run-{name}-{rights}")
    with without_rights(folder / name, rights):
        message = stopped(capsys, mean_teacher.main, "--resume", folder)
        assert str(folder) in message and "ermission" in message
        if name in (".", "last.pt"):
            words = ["--images", everyone / "set", "--out", everyone / "out", "--device", "cpu"]
            message = stopped(capsys, common.main, "predict", "--run", folder, *words)
            assert str(folder) in message and "ermission" in message


def test_results_that_may_not_be_read_are_left_out(everyone, capsys):
    good, bad = (fake_run(everyone / name, "cps", 0, [[50.0]]) for name in ("good", "bad"))
    with without_rights(bad, 0):
        rows = compare(everyone / "compared", good, bad)
    assert len(rows) == 1 and f"{bad}: left out" in capsys.readouterr().out


# --- Full disks and files that are left behind ----------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("write, content, name", [
    (common.write_tensors, {"weights": torch.zeros(100)}, "last.pt"),
    (common.write_json, {}, "args.json")])
def test_a_full_disk_is_called_one(tmp_path, capsys, write, content, name):
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as error:
        common.write_aside(tmp_path / name, content, write)
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert name in message and "No space left on device" in message


@pytest.mark.parametrize("age, kept", [(2 * 86400, False), (60, True)])
def test_what_a_killed_run_left_in_the_cache_is_deleted(make_dataset, options, tmp_path, age, kept):
    """After kill -9, which no program sees; but not what a run beside this one is writing."""
    cache = tmp_path / "cache"
    (cache / "building-1.tmp" / "images").mkdir(parents=True)
    (cache / "building-2.tmp").write_text("half of a file")
    for path in cache.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))
    data_of(options(data=make_dataset()))
    assert len(list(cache.glob("building-*"))) == 2 * kept


# --- Names and images -----------------------------------------------------------------------------


def test_a_folder_called_phantom_is_not_the_built_in_one(make_dataset, options, monkeypatch):
    root = make_dataset(name="phantom")
    monkeypatch.chdir(root.parent)
    data = data_of(options(data="phantom"))
    assert Path(data.args.data) == root and data.classes == 3
    assert [item.name for item in data.items][:2] == ["case00", "case01"]


def test_data_phantom_without_such_a_folder_is_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = stopped(capsys, mean_teacher.main, *options(data="phantom"))
    assert "--data" in message and "phantom" in message
    assert not (tmp_path / "cache").exists()


def rename_to(path, name):
    """Rename a file, its ending apart; skips the test where the file system knows no such name."""
    try:
        path.rename(path.with_name(name + path.suffix))
    except OSError:
        pytest.skip("no such names here")


@pytest.mark.parametrize("what", ["the dataset", "an image in training", "an image in test"])
def test_names_that_are_not_utf_8(make_dataset, options, tmp_path, capsys, what):
    """As zip files from elsewhere have them: all is done, and the results can be read."""
    root = make_dataset()
    name = os.fsdecode(b"caf\xe9")
    if what == "the dataset":
        rename_to(root, name)
        root = root.with_name(name)
    else:
        for part in ("images", "masks"):
            rename_to(root / part / "case00.png", name)
        listed = [f"case{u:02d}\n" for u in range(1, 14)]  # what is in no list is left for a part
        if what == "an image in training":
            (root / "test.txt").write_text("".join(listed[:4]))
            (root / "val.txt").write_text("".join(listed[4:6]))
        else:
            (root / "train.txt").write_text("".join(listed[:10]))
            (root / "val.txt").write_text("".join(listed[10:]))
    results = run_of(options(data=root)).finish()
    folder = Path(results["folder"])
    assert json.loads((folder / "results.json").read_text())["dataset"] == results["dataset"]
    common.main(["check", *options(data=root)])
    rows = compare(tmp_path / "compared", folder)
    assert len(rows) == 1


def other_forms():
    """One name in two Unicode forms, as macOS and others write it."""
    return [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("form", [0, 1])
def test_a_mask_and_its_image_in_two_unicode_forms(make_dataset, options, capsys, form):
    """They are a pair, or the message says why they are none: they look the same."""
    root = make_dataset()
    forms = other_forms()
    rename_to(root / "images" / "case00.png", forms[form])
    rename_to(root / "masks" / "case00.png", forms[1 - form])
    try:
        data = data_of(options(data=root))
    except SystemExit:
        assert "Unicode" in capsys.readouterr().err
        return
    [item] = [item for item in data.items if not item.name.startswith("case")]
    assert item.mask is not None


def test_boxes_in_another_unicode_form(make_dataset, options):
    root = make_dataset()
    for part in ("images", "masks"):
        rename_to(root / part / "case00.png", other_forms()[0])
    (root / "boxes").mkdir()
    (root / "boxes" / f"{other_forms()[1]}.txt").write_text("1 0.5 0.5 1 1")
    data = data_of(options(data=root))
    [number] = mlds.annotations(data, "boxes", None)
    assert data.items[number].name == other_forms()[0]


def test_an_id_in_another_unicode_form(make_dataset, options, capsys):
    root = make_dataset()
    for part in ("images", "masks"):
        rename_to(root / part / "case00.png", other_forms()[0])
    (root / "test.txt").write_text(other_forms()[1], encoding="utf-8")
    try:
        data = data_of(options(data=root))
    except SystemExit:
        assert "Unicode" in capsys.readouterr().err
        return
    assert len(data.indices("test")) == 1


def test_two_images_in_two_unicode_forms_of_one_name(make_dataset, options, capsys):
    """Refused, or named at the start: nobody means two patients by them."""
    root = make_dataset()
    for name, form in zip(("case00", "case01"), other_forms(), strict=True):
        for part in ("images", "masks"):
            rename_to(root / part / f"{name}.png", form)
    with contextlib.suppress(SystemExit):
        run_of(options(data=root))
    out, err = capsys.readouterr()
    assert "Unicode form" in out or "two files for" in err


def png(pixels, rows):
    """A PNG of grey pixels (H, W) uint8 whose compressed data ends after so many rows."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in pixels[:rows])
    return (b"\x89PNG\r\n\x1a\n" + fuzz.chunk(b"IHDR", header)
            + fuzz.chunk(b"IDAT", zlib.compress(lines)) + fuzz.chunk(b"IEND", b""))


@pytest.mark.parametrize("rows", [0, 1, 16, 31, 32])
def test_a_png_whose_data_ends_early_is_refused(tmp_path, rows):
    pixels = np.full((32, 32), 7, np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png(pixels, rows))
    if rows == 32:
        assert np.array_equal(common.read_pixels(path), pixels)
        return
    with pytest.raises(ValueError, match=r"a\.png"):
        common.read_pixels(path)


def test_a_png_that_is_cut_anywhere_is_refused_or_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    path = tmp_path / "a.png"
    whole = png(pixels, 16)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(common.read_pixels(path), pixels), length
        except ValueError as error:
            assert "a.png" in str(error)


@pytest.mark.parametrize("kind, text", [
    ("boxes", "1 0.5 0.5 0.1 " + "x" * 9000), ("tags", "x" * 9000), ("tags", "9" * 4000),
    ("boxes", "9" * 4000 + " 0.5 0.5 0.1 0.1")])
def test_a_quoted_box_or_tag_is_cut(make_dataset, options, capsys, kind, text):
    root = make_dataset()
    (root / kind).mkdir()
    (root / kind / "case00.txt").write_text(text)
    message = stopped(capsys, main_of("mlds"), *options(data=root))
    path = root / kind / "case00.txt"
    assert f"{path}, line 1: {text[:80]!r}" in message
    assert len(message) < len(str(path)) + 400


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", ["--batch-size", "--unlabeled-batch"])
def test_batchnorm_with_one_value_is_refused_at_once(options, tmp_path, capsys, method, batch):
    message = stopped(capsys, main_of(method), *options("--size", "16", batch, "1"))
    assert "--size 16" in message and "BatchNorm" in message and "larger --size" in message
    assert not list(tmp_path.iterdir())


def test_batchnorm_with_one_value_in_each_process_is_refused(options, capsys, monkeypatch):
    """Two processes share batches of two images."""
    monkeypatch.setattr(common, "processes", lambda: (0, 2))
    message = stopped(capsys, data_of, *options("--size", "16"))
    assert "--size 16" in message and "BatchNorm" in message


@pytest.mark.parametrize("size, batch", [("16", "2"), ("32", "1")])
def test_batchnorm_with_more_than_one_value_is_fine(make_dataset, options, size, batch):
    words = ["--size", size, "--batch-size", batch, "--unlabeled-batch", batch]
    results = mean_teacher.main(options(*words, data=make_dataset(), steps=1))
    assert results["args"]["size"] == int(size)


# --- Checkpoints ----------------------------------------------------------------------------------


def change_checkpoint(folder, name="last.pt", *, without=None, **changes):
    """Take an entry out of a checkpoint, or put in others."""
    state = torch.load(folder / name, weights_only=True)
    state.pop(without, None)
    torch.save(state | changes, folder / name)


FOR_RESUME = ["file", "step", "channels", "classes", "networks", "parts", "random", "drawn", "rows",
              "best", "seconds"]
FOR_PREDICT = ["file", "method", "step", "headline", "predict", "size", "width", "channels",
               "classes", "class_names", "networks"]


@pytest.mark.parametrize("changes", [
    {"channels": -1}, {"classes": -2}, {"width": -4}, {"width": "4"}, {"classes": None},
    {"width": 10**12}], ids=str)
def test_predict_with_numbers_that_build_no_network(run, everyone, tmp_path, capsys, changes):
    change_checkpoint(run, **changes)
    words = ["--run", run, "--images", everyone / "set", "--out", tmp_path / "out"]
    message = stopped(capsys, common.main, "predict", *words, "--device", "cpu")
    assert f"{run / 'last.pt'} cannot be used" in message and len(message) < 600


@pytest.mark.parametrize("changes", [
    {"width": -4}, {"width": None}, {"width": "4"}, {"size": 32.5}, {"data": True}, {"data": 5},
    {"data": None}, {"labeled": False}, {"flip": "yes"}, {"seed": [1]}, {"lr": {}},
    {"val_every": 0}, {"device": None}, {"cache": 3}], ids=str)
def test_resume_of_options_that_are_damaged(run, capsys, changes):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    message = stopped(capsys, mean_teacher.main, "--resume", run)
    assert next(iter(changes)).replace("_", "-") in message.replace("_", "-")


@pytest.mark.parametrize("key", FOR_RESUME)
def test_resume_of_a_checkpoint_that_lacks_something(run, capsys, key):
    change_checkpoint(run, without=key)
    message = stopped(capsys, mean_teacher.main, "--resume", run)
    assert f"{run / 'last.pt'} cannot be used" in message and "Expected" in message


@pytest.mark.parametrize("key", FOR_PREDICT)
def test_predict_of_a_checkpoint_that_lacks_something(run, everyone, tmp_path, capsys, key):
    change_checkpoint(run, without=key)
    words = ["--run", run, "--images", everyone / "set", "--out", tmp_path / "out"]
    message = stopped(capsys, common.main, "predict", *words, "--device", "cpu")
    assert f"{run / 'last.pt'} cannot be used" in message and "Expected" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no network", "another network", "a tensor less",
                                    "another shape", "another width", "a text"])
def test_checkpoints_whose_networks_do_not_fit(run, everyone, tmp_path, capsys, damage):
    networks = torch.load(run / "last.pt", weights_only=True)["networks"]
    changes = {"networks": networks}
    if damage == "no network":
        networks.clear()
    elif damage == "another network":
        networks["other"] = networks.pop("student")
    elif damage == "a tensor less":
        del networks["student"]["head.bias"]
    elif damage == "another shape":
        networks["student"]["head.bias"] = torch.zeros(7)
    elif damage == "another width":
        networks["student"] = common.UNet(1, 3, 6).state_dict()
    else:
        networks["student"]["head.bias"] = "text"
    change_checkpoint(run, **changes)
    message = stopped(capsys, mean_teacher.main, "--resume", run)
    assert f"{run}" in message and len(message) < 600
    words = ["--run", run, "--images", everyone / "set", "--out", tmp_path / "out"]
    message = stopped(capsys, common.main, "predict", *words, "--device", "cpu")
    assert f"{run / 'last.pt'} cannot be used" in message and len(message) < 600


def test_the_predict_of_a_checkpoint_that_the_method_has_not(run, capsys):
    """A checkpoint chooses among the functions of a method's file that are called predict."""
    for name in ("predict_nothing", "main", "predict.__globals__"):
        change_checkpoint(run, predict=name)
        with pytest.raises(SystemExit) as error:
            common.load_run(run)
        assert error.value.code == 2 and f"{run / 'last.pt'}" in capsys.readouterr().err


class Folder:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_checkpoint_gets_no_advice_to_run_what_it_holds(tmp_path, capsys, zipped):
    path = tmp_path / "foreign.pt"
    torch.save({"networks": Folder(tmp_path / "made")}, path, _use_new_zipfile_serialization=zipped)
    for function, words in ((common.load_run, [path]), (common.load_checkpoint, [path, "--init"])):
        with pytest.raises(SystemExit) as error:
            function(*words)
        message = capsys.readouterr().err
        assert error.value.code == 2 and f"{path} cannot be used" in message
        assert not re.search("weights_only|Weights only|trust|arbitrary|allowlist|safe_globals",
                             message)
        assert "Expected a run folder" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", ["missing", "no step", "no networks", "half"])
def test_a_damaged_best_checkpoint_at_the_end_of_a_run(run, capsys, damage):
    """Validation was best at step 1 of 2; scores of the last step must not pass as the best."""
    best = run / "best.pt"
    change_checkpoint(run, best=200.0)  # step 2 was not better
    change_checkpoint(run, "best.pt", step=1)
    if damage == "missing":
        best.unlink()
    elif damage == "half":
        best.write_bytes(best.read_bytes()[:3000])
    else:
        change_checkpoint(run, "best.pt", without=damage.removeprefix("no "))
    (run / "results.json").unlink()
    try:
        results = resume(run)
    except SystemExit as error:
        assert error.code == 2 and "best.pt" in capsys.readouterr().err
        return
    assert damage == "missing" and results["best_step"] != 2
    assert "best on val (2)" not in capsys.readouterr().out


def test_the_step_of_the_best_checkpoint(run):
    """The same run undamaged."""
    change_checkpoint(run, best=200.0)
    change_checkpoint(run, "best.pt", step=1)
    assert resume(run)["best_step"] == 1


# --- compare --------------------------------------------------------------------------------------

MALFORMED = [
    ("headline.dice", "x"), ("headline.hd95", None), ("headline.network", []),
    ("headline", [1]), ("split.val", None), ("split.labeled", None), ("split.labeled", [1]),
    ("split", "x"), ("dataset", [1]), ("dataset", 3), ("labeled", None), ("labeled", {}),
    ("seed", "a"), ("seed", [0]), ("method", ["x"]), ("options", []), ("args.steps", [2]),
    ("args", 3), ("units", {}), ("units", []), ("units.v00", [1]), ("units.v00", None),
    ("networks.n.last.volumes.v00", {}), ("networks.n.last.volumes.v00.1", 3),
    ("networks.n.last.volumes.v00.1.dice", "x"), ("networks.n.last.volumes", [])]


def change_results(folder, place, value):
    """Put a value at a place such as "split.val" of results.json; None takes away what is there."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    inner = results
    *keys, last = place.split(".")
    for key in keys:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(results))


@pytest.mark.parametrize("method", ["cps", "supervised"])
@pytest.mark.parametrize("place, value", MALFORMED)
def test_compare_leaves_malformed_results_out(tmp_path, capsys, place, value, method):
    good = fake_run(tmp_path / "good", "cps", 0, [[50.0], [60.0]])
    bad = fake_run(tmp_path / "bad", method, 1, [[90.0], [90.0]])
    change_results(bad, place, value)
    rows = compare(tmp_path / "out", good, bad)
    assert [row["Dice %"] for row in rows] == ["55.00"]
    assert f"{bad}: left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a|b", "a\nb", "x" * 300])
def test_a_datasets_name_leads_nothing_out_of_the_folder(tmp_path, name):
    folder = fake_run(tmp_path / "run", "cps", 0, [[50.0]], dataset=name)
    [row] = compare(tmp_path / "out", folder)
    assert row["dataset"] == name
    files = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert files == ["comparison.csv", "comparison.md", "comparison.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("order", [1, -1])
def test_compare_names_the_option_of_the_run_that_is_nearest(tmp_path, order):
    """Of two labelled-only runs one differs in its steps alone, one in the labelled units, too."""
    near = fake_run(tmp_path / "a", "supervised", 0, [[50.0]], args={"steps": 20})
    far = fake_run(tmp_path / "b", "supervised", 0, [[50.0]], labeled="5%",
                   split={"unlabeled": "x"}, args={"steps": 20})
    run = fake_run(tmp_path / "c", "cps", 0, [[60.0]])
    rows = compare(tmp_path / "out", *[near, far][::order], run)
    [row] = [row for row in rows if row["method"].startswith("cps")]
    assert row[GAIN] == "labelled-only: other steps"


def test_compare_keeps_gains_where_other_rows_differ(tmp_path):
    """In a method's own option, in another dataset, in another width."""
    runs = [fake_run(tmp_path / "base", "supervised", 0, [[50.0]]),
            fake_run(tmp_path / "plain", "cps", 0, [[60.0]]),
            fake_run(tmp_path / "own", "cps", 0, [[61.0]], options={"weight": 2.0}),
            fake_run(tmp_path / "wide", "cps", 0, [[62.0]], args={"width": 32}),
            fake_run(tmp_path / "wide-base", "supervised", 0, [[55.0]], args={"width": 32}),
            fake_run(tmp_path / "lungs", "cps", 0, [[63.0]], dataset="lungs", args={"steps": 20})]
    gains = {row["Dice %"]: row[GAIN] for row in compare(tmp_path / "out", *runs)}
    assert "(" not in gains.pop("63.00")
    assert gains.pop("50.00") == gains.pop("55.00") == ""
    assert {dice: gain.split()[0] for dice, gain in gains.items()} == {
        "60.00": "+10.00", "61.00": "+11.00", "62.00": "+7.00"}


# --- From Python, and predict ---------------------------------------------------------------------


def test_the_lines_in_readme_give_what_predict_writes(finished, everyone, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
               if "load_run" in code]
    assert len(block.splitlines()) <= 3
    code = re.sub(r'load_run\(".*?"', "load_run(folder", block)
    path = everyone / "set" / "images" / "case03.png"
    names = {"folder": finished, "image": np.array(Image.open(path))}
    exec(code, names)
    predict("--run", finished, "--images", path, "--out", tmp_path)
    written = np.array(Image.open(tmp_path / "masks" / "case03.png"))
    assert np.array_equal(names["labels"], written)
    assert written.any()


def test_main_returns_the_runs_folder_with_the_scores(run):
    results = resume(run)
    assert results.pop("folder") == str(run)
    assert results == json.loads((run / "results.json").read_text())
    assert results["headline"]["dice"] == results["networks"]["student"]["last"]["dice"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (40, 50, 3), (3, 3, 3)])
def test_segment_takes_any_size(finished, shape):
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    labels = common.segment(common.load_run(finished), image)
    assert labels.shape == shape[:2] and labels.dtype == np.uint8


@pytest.mark.parametrize("image", [
    np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 2), np.uint8), np.zeros((3, 9, 9), np.uint8),
    np.zeros((0, 5), np.uint8), np.full((9, 9), np.nan), np.full((9, 9), np.inf),
    np.zeros((9, 9), complex), np.zeros(9)],
    ids=["4 channels", "2 channels", "channels first", "empty", "nan", "inf", "complex", "a row"])
def test_segment_refuses_what_predict_refuses(finished, image):
    with pytest.raises((ValueError, TypeError, SystemExit)):
        common.segment(common.load_run(finished), image)


def test_predict_refuses_a_mask_that_came_after_its_own(finished, everyone, tmp_path, capsys):
    """A folder of predictions, to which someone has added a mask of their own."""
    images, out = tmp_path / "mine", tmp_path / "out"
    images.mkdir()
    shutil.copy(everyone / "set" / "images" / "case00.png", images)
    predict("--run", finished, "--images", images, "--out", out)
    own = out / "masks" / "case01.png"
    Image.fromarray(np.full((32, 32), 2, np.uint8)).save(own)
    before = own.read_bytes()
    shutil.copy(everyone / "set" / "images" / "case01.png", images)
    message = stopped(capsys, common.main, "predict", "--run", finished, "--images", images,
                      "--out", out, "--device", "cpu")
    assert f"--out {out}" in message and own.read_bytes() == before


def test_supervised_calls_its_networks_student_and_ema(finished, everyone, tmp_path, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["networks"]) == ["student", "its EMA"]
    run = common.load_run(finished)
    assert list(run.predict(run.networks, torch.zeros(1, 1, 32, 32))) == ["student", "its EMA"]
    image = everyone / "set" / "images" / "case00.png"
    predict("--run", finished, "--images", image, "--out", tmp_path, "--network", "its EMA")
    assert "segmented by its EMA of" in capsys.readouterr().out
    labels = common.segment(run, np.array(Image.open(image)), "its EMA")
    assert np.array_equal(labels, np.array(Image.open(tmp_path / "masks" / "case00.png")))


# --- Without a GPU --------------------------------------------------------------------------------


def chosen(argv):
    args = parse(parser(""), argv)
    return args.size, args.width, args.steps


def test_defaults_are_small_without_a_gpu_and_the_first_line_says_so(everyone, capsys):
    argv = ["--data", str(everyone / "set"), "--labeled", "3", "--device"]
    assert chosen([*argv, "cpu"]) == (96, 16, 2000)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == ("no GPU: small defaults, --size 96 --width 16 --steps 2000 (with one 256, 32, "
                     "10000)")
    assert chosen([*argv, "meta"]) == (256, 32, 10000)  # a device of torch that is no CPU
    assert "GPU" not in capsys.readouterr().out
    assert chosen([*argv, "cpu", "--steps", "50", "--size", "128"]) == (128, 16, 50)
    printed = capsys.readouterr().out
    assert printed == "no GPU: small defaults, --width 16 (with one 32)\n"  # not what was typed
    chosen([*argv, "cpu", "--steps", "50", "--size", "128", "--width", "8"])
    assert capsys.readouterr().out == ""  # nothing was left to choose


def test_the_small_defaults_are_no_options_of_a_run(everyone):
    """Its folder is not named after them, but after what is typed."""
    argv = ["--data", str(everyone / "set"), "--labeled", "3", "--device", "cpu"]
    assert parse(parser(""), argv).options == {}
    assert parse(parser(""), [*argv, "--steps", "2000", "--size", "256"]).options == {"size": 256}


def test_a_run_is_compared_with_the_table_if_it_has_its_settings(make_dataset, options, capsys):
    run = run_of(options(data=make_dataset()))
    run.args.options = {"weight": 2.0, "seed": 5}  # settings of a method are its own affair

    def printed():
        capsys.readouterr()
        run.print_comparison()
        return capsys.readouterr().out

    assert printed() == ""  # another dataset
    run.data.name, run.labeled = "phantom-48", "10%"
    assert printed().startswith("for comparison")
    for option in ("steps", "size", "lr", "split_seed"):  # split_seed: other patients are labelled
        run.args.options = {option: 1}
        assert printed() == ""
    run.args.options, run.labeled = {}, "20%"
    assert printed() == ""


def test_a_run_says_how_long_it_takes(make_dataset, options, capsys):
    """After the first steps, a resumed one again; on stdout, so in a log too."""
    root = make_dataset()
    for first, total, minutes in ((0, 14, "1 minute"), (100, 30100, "minutes")):
        run = run_of(options(data=root, steps=total))
        run.first_step = first
        capsys.readouterr()
        for step in run.steps():
            time.sleep(0.005)
            if step == first + 13:
                break
        [line] = capsys.readouterr().out.splitlines()
        seconds, left = re.fullmatch(r"(\S+) seconds a step, about (.*) left", line).groups()
        assert 0.005 <= float(seconds) < 0.1 and left.endswith(minutes)
        if total > 14:
            expected = float(seconds) * (total - first) / 60
            assert int(left.split()[0]) == pytest.approx(expected, rel=0.1, abs=1)


class Terminal(io.StringIO):
    """A stream on which progress bars are drawn."""

    def isatty(self):
        return True


def test_scoring_has_a_progress_bar_on_a_terminal(make_dataset, options, monkeypatch):
    run = run_of(options(data=make_dataset()))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run.finish()
    assert re.search(r"test:.*\d/3", terminal.getvalue())


def seconds_of(prediction, truth):
    """The least processor time of three scorings."""
    times = []
    for _ in range(3):
        start = time.process_time()
        common.mask_scores(prediction, truth)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("kind", ["the same", "missed but for a slice", "with specks far away"])
def test_scoring_takes_time_in_proportion_to_slices(kind):
    """Of a disk in all slices, which training finds more or less of.

    (For a speck as many slices are searched as it is pixels away, at most.)
    """
    y, x = np.mgrid[:64, :64]
    disk = (y - 20) ** 2 + (x - 20) ** 2 < 100
    seconds = {}
    for slices in (60, 240):
        truth = np.stack([disk] * slices)
        prediction = truth.copy()
        if kind == "missed but for a slice":
            prediction[1:] = False
        elif kind == "with specks far away":
            prediction[:, 60, 60] = True
        seconds[slices] = seconds_of(prediction, truth)
    assert seconds[240] < 3 * 4 * seconds[60]  # each slice with each: 16 times as much


# --- Plain words ----------------------------------------------------------------------------------


def test_units_in_plain_words(make_dataset, options, capsys):
    """Photographs are images; slices belong to volumes of patients."""
    run_of(options(data=make_dataset())).finish()
    out = capsys.readouterr().out
    assert re.search(r"\nlabeled: 3 images: case\d\d, ", out)
    assert re.search(r"\nval: 1 image: case\d\d\n", out) and "\nTest: 3 images\n" in out
    assert not re.search(r"\b1 (units|images|volumes)\b", out)
    run_of(options(data=make_dataset(units=6, slices=2, name="slices"))).finish()
    out = capsys.readouterr().out
    assert "\nlabeled: 6 images in 3 volumes of 3 units: p" in out
    assert "\nTest: 2 images in 1 volume of 1 unit\n" in out


@pytest.mark.parametrize("slices, word", [(2, "2 of 2 volumes"), (0, "2 of 2 images")])
def test_a_class_that_was_never_found_is_said_plainly(make_dataset, options, capsys, slices, word):
    root = make_dataset(units=8, slices=slices)
    (root / "classes.txt").write_text("background\nlung\nheart\n")
    run_of(options(data=root)).finish()
    out = capsys.readouterr().out
    assert f"\nheart: Dice 0.00; not found in {word}" in out


def test_sentences_on_classes_that_are_not_in_all_test_images(make_dataset, options, capsys):
    """Class 1 is in none and found in one; class 2 is in one, and found there."""
    root = make_dataset(units=8, slices=2)
    for path in (root / "masks").glob("p0[01]*"):
        mask = np.zeros((32, 32), np.uint8)
        if path.name.startswith("p01"):
            mask[:8] = 2
        Image.fromarray(mask).save(path)
        Image.fromarray(mask * np.uint8(100)).save(root / "images" / path.name)
    (root / "test.txt").write_text("p00\np01\n")

    def by_brightness(networks, x):
        bright = (x[:, 0] > 0.5).float()
        dark = 1 - bright
        first = torch.zeros_like(bright)
        first[:, 20:24] = 2 * (x.amax((1, 2, 3)) > 0.5).float()[:, None, None]
        return {"net": torch.stack([dark, first, bright], 1)}
    run_of(options(data=root), by_brightness).finish()
    out = capsys.readouterr().out
    assert "class 1: Dice 0.00; found in 1 of 2 volumes without it\n" in out
    assert "\nclass 2: Dice 100.00\n" in out


def test_four_digit_distances_do_not_run_together(options, tmp_path, capsys):
    root = tmp_path / "large"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
        for u in range(6):
            array = np.zeros((900, 1300), np.uint8)
            array[:20, :20] = 2
            np.save(root / part / f"case{u}.npy", array)
    run_of(options("--labeled", "1", data=root)).finish()
    lines = capsys.readouterr().out.splitlines()
    [first] = [i for i, line in enumerate(lines) if line.startswith("network, checkpoint")]
    titles, *rows = [re.split("  +", line) for line in lines[first:first + 3]]
    assert titles == ["network, checkpoint", "Dice %", "Jaccard %", "HD95 px", "ASD px"]
    for row in rows:
        assert row[1:5] == ["0.00", "0.00", "1581.14", "1581.14"]


def test_results_say_when_where_and_how_long(finished):
    results = json.loads((finished / "results.json").read_text())
    assert 0 <= results["seconds"] < 60 and results["torch"] == torch.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", results["date"]) and results["device"]
    assert results["device"] == common.device_name("cpu")


def test_the_cache_is_named_when_something_is_put_there(make_dataset, options, tmp_path, capsys):
    argv = options(data=make_dataset())
    data_of(argv)
    [images, masks] = re.findall(r"(.*) MiB", capsys.readouterr().out)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) / 2**20
    for line in (images, masks):
        assert line.startswith(f"decoded images are kept in {tmp_path / 'cache'} (")
    numbers = [float(line.rpartition("(")[2]) for line in (images, masks)]
    assert sum(numbers) == pytest.approx(size, abs=0.1)
    data_of(argv)
    assert "cache" not in capsys.readouterr().out


def test_the_line_on_the_cache_says_that_it_may_be_deleted(make_dataset, options, capsys):
    data_of(options(data=make_dataset()))
    assert "may be deleted" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["pedict", "Check", "train", "--version"])
def test_unknown_commands_say_so(capsys, command):
    message = stopped(capsys, common.main, command)
    assert f"unknown command {command}" in message and "check, phantom, predict" in message


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mean_teacher"])
def test_supervised_elsewhere_names_the_file_that_has_it(method, options, tmp_path, capsys):
    message = stopped(capsys, main_of(method), *options("--supervised"))
    assert "mean_teacher.py --supervised" in message
    assert not list(tmp_path.iterdir())


SHARED = {
    "--data": "the phantom", "--labeled": "10% on the phantom",
    "--size": "256; without a GPU 96; phantom: 48",
    "--width": "32; without a GPU, or on the phantom, 16",
    "--steps": "10000; without a GPU 2000; phantom: 800", "--batch-size": "8",
    "--unlabeled-batch": "8", "--lr": "0.001", "--flip": "yes", "--rotation": "180.0",
    "--seed": "0", "--split-seed": "0", "--device": "auto", "--precision": "auto",
    "--out": "runs", "--val-every": "a tenth of --steps", "--cache": "ssl-segmentation"}
OWN = {
    "mean_teacher": {"--weight": "5.0"}, "cps": {"--weight": "0.3", "--cutmix": "yes"},
    "ucmt": {"--weight": "0.1", "--teacher-mix": "0.99", "--grid": "16", "--top-k": "2",
             "--mix": "umix", "--mix-labeled": "yes"},
    "cdma": {"--distill-weight": "0.1", "--entropy-weight": "0.1", "--temperature": "10.0"},
    "mlds": {"--variant": "mean", "--weight": "0.3"},
    "contrastive_st": {"--weight": "0.1", "--matching": "inter", "--agreement": "0"}}


def help_of(main, capsys, *words):
    """{option: its help in one line}."""
    with pytest.raises(SystemExit) as error:
        main([*words, "--help"])
    assert error.value.code == 0
    options = {}
    for entry in re.split(r"\n  (?=-)", capsys.readouterr().out):
        words = entry.split()
        options[words[0].rstrip(",")] = " ".join(words)
    return options


@pytest.mark.parametrize("method, option, default", [
    (method, option, default) for method in METHODS for option, default in OWN[method].items()])
def test_help_shows_the_default_of_a_methods_choices(method, option, default, capsys):
    words = help_of(main_of(method), capsys)[option]
    assert re.search(rf"\((default: )?{re.escape(default)}[):;]", words), words


@pytest.mark.parametrize("option, default", SHARED.items())
def test_help_shows_the_default_of_every_shared_choice(option, default, capsys):
    words = help_of(mean_teacher.main, capsys)[option]
    assert re.search(rf"\(.*{re.escape(default)}.*\)", words), words


def test_no_other_option_is_a_choice_with_a_default(capsys):
    options = help_of(mean_teacher.main, capsys)
    listed = {option for option in options if option.startswith("--")}
    assert listed - set(SHARED) == {"--weight", "--supervised", "--classes", "--resume"}


def test_help_says_what_a_unit_is_and_what_the_split_seed_moves(capsys):
    for main, words in ((mean_teacher.main, []), (common.main, ["check"])):
        options = help_of(main, capsys, *words)
        assert "a unit is a patient, or an image" in options["--labeled"]
        assert "which units are labelled" in options["--split-seed"]
        assert "validated and tested" in options["--split-seed"]


# --- Pictures -------------------------------------------------------------------------------------


@pytest.fixture
def drawn_words(monkeypatch):
    """All texts that are drawn into pictures."""
    words = []
    draw = ImageDraw.ImageDraw.text

    def draw_and_note(self, xy, text, *more, **options):
        words.append(text)
        draw(self, xy, text, *more, **options)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", draw_and_note)
    return words


def colours_in(picture):
    """The colours of a picture's pixels."""
    return {tuple(colour) for colour in np.array(picture.convert("RGB")).reshape(-1, 3).tolist()}


CYAN, LIME, RED = (0, 229, 255), (166, 255, 0), (230, 25, 75)


def test_preview_has_titles_and_a_legend(run, everyone, drawn_words):
    shutil.copytree(everyone / "set", run.parent / "set")
    (run.parent / "set" / "classes.txt").write_text("background\nlung\nheart\n")
    args = json.loads((run / "args.json").read_text()) | {"data": str(run.parent / "set")}
    (run / "args.json").write_text(json.dumps(args))
    resume(run)
    with Image.open(run / "preview.png") as sheet:
        assert sheet.width == 6 * 162 + 2  # six pictures in a row
        assert sheet.height > 162 + 2 * 16
        legend = sheet.crop((0, sheet.height - 2 * 16 - 16, sheet.width, sheet.height))
        assert {CYAN, LIME} <= colours_in(legend) and RED not in colours_in(legend)
    for title in ("image", "truth", "student", "lung", "heart"):
        assert [words for words in drawn_words if title in words], title
    assert "background" not in drawn_words
    assert not [words for words in drawn_words if "teacher" == words]


def test_preview_names_its_images_with_their_dice(run, drawn_words):
    resume(run)
    names = json.loads((run / "split.json").read_text())["val"]
    words = "\n".join(drawn_words)
    assert [name for name in names if name in words]
    assert re.search(r"Dice|\d+\.\d", words)


def test_heat_maps_have_their_maximum(run, drawn_words):
    resume(run)
    [title] = [words for words in drawn_words if "squared difference" in words]
    assert re.search(r"\d", title)


@pytest.mark.parametrize("labeled, rows", [("1", 1), ("5", 5)])
def test_check_draws_images_beside_their_masks_with_a_legend(make_dataset, options, tmp_path,
                                                             drawn_words, labeled, rows):
    common.main(["check", *options("--labeled", labeled, data=make_dataset())])
    with Image.open(tmp_path / "runs" / "set" / "check.png") as sheet:
        assert sheet.width == 2 * 162 + 2
        assert rows * 162 < sheet.height < rows * 162 + 162
        assert {CYAN, LIME} <= colours_in(sheet)
    assert drawn_words.count("class 1") == drawn_words.count("class 2") == 1
    assert {"image", "mask"} <= set(drawn_words)


def test_overlays_of_predict_have_a_legend_in_the_classes_colours(finished, everyone, tmp_path):
    image = everyone / "set" / "images" / "case00.png"
    predict("--run", finished, "--images", image, "--out", tmp_path)
    with Image.open(tmp_path / "overlays" / "case00.png") as picture:
        lines = [picture.crop((0, 32 + 16 * i, picture.width, 48 + 16 * i)) for i in (0, 1)]
        assert picture.height == 32 + 2 * 16
    for line, colour in zip(lines, (CYAN, LIME), strict=True):
        assert colour in colours_in(line)
