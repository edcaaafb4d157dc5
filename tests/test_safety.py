"""What goes wrong around a run: damaged folders, full disks, foreign files, two runs at once."""
import json
import os
import pickle
import re
import sys
import threading
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, last_of
from PIL import Image
from torch.nn import functional as F

import common
import mean_teacher
from common import Data, Run, UNet, mixed_precision, parse, parser, place, supervised_loss

# --- Damaged and hostile files --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_damaged_dataset_ends_with_0_or_2(seed):
    """python tests/tools/fuzz.py 500 does more; a traceback or a hang of a minute fails."""
    status, kinds, text = fuzz.case(seed)
    assert status in (0, 2), (kinds, text)
    assert "Traceback" not in text and (status == 0 or "error: " in text)


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def status_of(main, argv):
    """The status that a command stops with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    return stopped.value.code


def test_the_evil_pickle_is_one(tmp_path):
    torch.save({"networks": Evil(tmp_path / "made")}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "made").exists()


def test_checkpoints_run_no_pickled_code(options, tmp_path, capsys):
    evil, made = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({"networks": Evil(made), "headline": "x"}, evil)
    words = ["--run", evil, "--images", tmp_path, "--out", tmp_path / "out", "--device", "cpu"]
    assert status_of(common.main, ["predict", *words]) == 2
    folder = Path(mean_teacher.main(options(steps=1))["folder"])
    os.replace(evil, folder / "last.pt")
    assert status_of(mean_teacher.main, ["--resume", folder]) == 2
    assert "last.pt cannot be used" in capsys.readouterr().err and not made.exists()


def test_caches_run_no_pickled_code(options, tmp_path, capsys):
    made = tmp_path / "made"
    mean_teacher.main(options(steps=1))
    for path in (tmp_path / "cache").iterdir():
        torch.save({"pixels": Evil(made)}, path)
    assert status_of(mean_teacher.main, options(steps=1)) == 2
    assert "cache file" in capsys.readouterr().err and not made.exists()


def test_arrays_run_no_pickled_code(make_dataset, options, tmp_path, capsys):
    root, made = make_dataset(), tmp_path / "made"
    (root / "images" / "case00.png").unlink()
    with open(root / "images" / "case00.npy", "wb") as file:
        array = np.array([Evil(made)], object)
        np.lib.format.write_array(file, array, allow_pickle=True)
    assert status_of(mean_teacher.main, options(data=root, steps=1)) == 2
    assert "case00.npy" in capsys.readouterr().err
    (root / "images" / "case00.npy").write_bytes(pickle.dumps(Evil(made)))
    assert status_of(mean_teacher.main, options(data=root, steps=1)) == 2
    assert not made.exists()


def test_every_load_is_weights_only():
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert text.count("torch.load(") == text.count("weights_only=True") > 0
    assert text.count("np.load(") == text.count("allow_pickle=False") > 0
    assert "pickle.load" not in text


def test_decompression_bomb_is_a_clear_error(make_dataset, options, capsys):
    root = make_dataset()
    (root / "images" / "case03.png").write_bytes(fuzz.bomb(60000))
    assert status_of(mean_teacher.main, options(data=root, steps=1)) == 2
    error = capsys.readouterr().err
    assert "case03.png" in error and "DecompressionBomb" in error
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("line", ["../other/images/case00", "/etc/passwd", "images/case00.png",
                                  "..", "C:\\x"])
def test_ids_of_lists_are_names_in_the_dataset_and_no_paths(make_dataset, options, capsys, line):
    make_dataset(name="other")
    root = make_dataset()
    (root / "train.txt").write_text(f"case00\n{line}\n")
    assert status_of(mean_teacher.main, options(data=root, steps=1)) == 2
    assert "not in the dataset" in capsys.readouterr().err


# --- A plain method, of which a test is the loop's inside -----------------------------------------


def predict(networks, x):
    return {"net": networks["net"](x).softmax(1)}


def no_pictures(networks, x):
    return {}


def do_nothing(step, folder):
    pass


def train(argv, before=do_nothing):
    """One U-Net with the supervised loss; before(step, the run's folder) begins each step."""
    args = parse(parser(""), argv)
    data = Data(args)
    torch.manual_seed(args.seed)
    net = UNet(data.channels, data.classes, args.width)
    networks = place({"net": net}, args)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr)
    _, scaler = mixed_precision(args)
    run = Run("plain.py", args, data, networks, [optimizer, scaler], predict, "net", no_pictures)
    for step in run.steps():
        before(step, run.folder)
        x_l, y_l, *_ = data.batch()
        loss = supervised_loss(net(x_l), y_l)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        run.save(step)
    return run.finish()


def finished(folder):
    """A run's results.json but for what another run of the same numbers has otherwise."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("seconds", "args"):
        del results[name]
    return results


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_full_disk_leaves_the_checkpoint_before(make_dataset, options, tmp_path, capsys, device):
    """/dev/full fails when the checkpoint is written; /dev/null takes it, but cannot be synced."""
    argv = options("--val-every", 2, data=make_dataset(), steps=4)
    folders = []

    def fill_disk(step, folder):
        if step == 2:
            folders.append(folder)
            (folder / "last.pt.tmp").symlink_to(device)
    with pytest.raises(SystemExit) as stopped:
        train(argv, fill_disk)
    assert stopped.value.code == 1 and "last.pt cannot be written" in capsys.readouterr().err
    [folder] = folders
    assert last_of(folder)["step"] == 2 and not (folder / "results.json").exists()
    (folder / "last.pt.tmp").unlink()
    results = train(["--resume", str(folder)])
    assert results["folder"] == str(folder)
    whole = Path(train([*argv, "--out", str(tmp_path / "whole")])["folder"])
    assert equal(last_of(folder), last_of(whole)) and finished(folder) == finished(whole)
    assert (folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_checkpoint_is_whole_or_old(tmp_path):
    path = tmp_path / "last.pt"
    common.write_aside(path, {"step": 1}, torch.save)

    def killed(content, aside):
        aside.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_aside(path, {"step": 2}, killed)
    assert torch.load(path, weights_only=True) == {"step": 1}
    common.write_aside(path, {"step": 3}, torch.save)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def dead_run(options, *more):
    """A Run that nothing is trained in, on the small phantom."""
    args = parse(parser(""), options("--val-every", 4, *more))
    data = Data(args)
    networks = {"net": UNet(data.channels, data.classes, 4)}
    return Run("x.py", args, data, networks, [], predict, "net", no_pictures)


@pytest.mark.parametrize("value, bad_step, kept", [
    ("nan", 2, "There is no checkpoint yet"), ("inf", 2, "There is no checkpoint yet"),
    ("-inf", 5, "has the last checkpoint before that")])
def test_a_term_that_is_not_finite_stops_the_run(options, capsys, value, bad_step, kept):
    run = dead_run(options, "--steps", 8)
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            term = torch.tensor(0.0)
            if step == bad_step:
                term = torch.tensor(float(value))
            run.log(loss=1.0, cons=term)
            run.save(step)
    first = bad_step // 4 * 4
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert f"cons is {value} between steps {first} and {first + 4}" in error and kept in error
    assert (run.folder / "last.pt").exists() == (first > 0)
    if first > 0:
        assert last_of(run.folder)["step"] == first


def test_the_log_has_the_means_of_the_steps_since_the_row_before(options):
    run = dead_run(options, "--steps", 43, "--val-every", 43)
    for step in run.steps():
        run.log(loss=float(step), count=torch.tensor(1))
        run.save(step)
    rows = [line.split(",") for line in (run.folder / "log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss", "count", "val_dice"]
    assert [row[:3] for row in rows[1:]] == [["20", "9.5", "1.0"], ["40", "29.5", "1.0"],
                                             ["43", "41.0", "1.0"]]
    assert rows[1][3] == rows[2][3] == "" and float(rows[3][3]) >= 0


class Brightness(torch.nn.Module):
    """Segments make_dataset's images by their brightness, or, switched off, finds nothing."""

    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.tensor(1.0))

    def forward(self, x):
        levels = torch.tensor([40.0, 107.0, 173.0])[:, None, None]
        found = (x * 255 - levels).abs().argmin(1)
        return F.one_hot(found * self.on.long(), 3).movedim(-1, 1).float()


@pytest.mark.parametrize("good_at, scored", [(4, 1), (2, 2)])
def test_the_best_checkpoint_is_scored_unless_it_is_the_last(make_dataset, options, capsys,
                                                             good_at, scored):
    calls = []

    def predict_and_count(networks, x):
        calls.append(len(x))
        return {"net": networks["net"](x)}
    args = parse(parser(""), options("--val-every", 2, data=make_dataset(), steps=4))
    data, net = Data(args), Brightness()
    run = Run("x.py", args, data, {"net": net}, [], predict_and_count, "net", no_pictures)
    for step in run.steps():
        net.on.fill_(step + 1 == good_at)
        run.log(loss=0.0)
        run.save(step)
    results = run.finish()
    volumes = {part: len(data.volumes(part)) for part in ("val", "test")}
    assert len(calls) == 2 * volumes["val"] + 1 + scored * volumes["test"]  # 1: preview.png
    assert results["best_step"] == good_at
    best, last = results["networks"]["net"]["best"], results["networks"]["net"]["last"]
    assert best["dice"] > 90 and (best == last) == (scored == 1)
    assert results["headline"]["dice"] == last["dice"] and (last["dice"] > 90) == (scored == 1)
    assert capsys.readouterr().out.count("headline") == 1
    assert net.on.item() == (good_at == 4)  # the last weights are still in place


# --- Run folders ----------------------------------------------------------------------------------


def test_runs_started_at_once_share_the_cache_and_not_the_folder(make_dataset, options, tmp_path):
    root, found = make_dataset(), []
    gate = threading.Barrier(5)

    def start():
        args = parse(parser(""), options(data=root))
        gate.wait()
        data = Data(args)
        run = Run("mean_teacher.py", args, data, {}, [], predict, "net", no_pictures)
        labels = [data.labels[i].clone() for i in sorted(data.labels)]
        found.append((run.folder, data.images.clone(), torch.stack(labels)))
    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder for folder, *_ in found}) == 5  # each its own, and none stopped
    for folder, images, labels in found:
        assert torch.equal(images, found[0][1]) and torch.equal(labels, found[0][2])
        assert (folder / "split.json").exists() and (folder / "args.json").exists()
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 2 and not any(name.startswith("building") for name in names)


def test_two_runs_never_share_a_folder(options):
    folders = [dead_run(options).folder for _ in range(3)]
    name = "x-3-seed0-batch_size_2-precision_fp32-size_32-steps_4-unlabeled_batch_2-width_4"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]
    saved = json.loads((folders[0] / "args.json").read_text())
    assert saved["steps"] == 4 and saved["precision"] == "fp32" and saved["device"] == "cpu"


def test_runs_from_two_files_of_one_name_have_two_folders(options):
    names = set()
    for init in ("a/last.pt", "b/last.pt", "/x:y\\z"):
        args = parse(parser(""), options())
        args.options = {"init": init}
        run = Run("x.py", args, Data(args), {}, [], predict, "net", no_pictures)
        names.add(run.folder.name)
    assert names == {"x-3-seed0-init_a_last.pt", "x-3-seed0-init_b_last.pt",
                     "x-3-seed0-init__x_y_z"}


def test_split_json_has_the_names_of_every_part(options):
    run = dead_run(options)
    split = json.loads((run.folder / "split.json").read_text())
    assert re.fullmatch("[0-9a-f]{8}", split["digest"])
    for part in ("labeled", "unlabeled", "val", "test"):
        assert split[part] == [run.data.items[i].name for i in run.data.indices(part)]


def test_ctrl_c_has_a_message_and_other_errors_their_traceback(options, capsys):
    run = dead_run(options)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "to start anew: python x.py" in capsys.readouterr().out
    for step in run.steps():
        run.log(loss=0.0)
        run.save(step)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    out = capsys.readouterr().out
    assert f'after step 4, the last checkpoint: python x.py --resume "{run.folder}"' in out
    sys.excepthook(ValueError, ValueError("other"), None)
    assert "ValueError: other" in capsys.readouterr().err


def test_results_are_json_of_plain_numbers(options):
    results = mean_teacher.main(options(steps=1))
    folder = Path(results.pop("folder"))
    saved = json.loads((folder / "results.json").read_text())
    assert saved == results
    assert isinstance(saved["headline"]["dice"], float) and saved["options"]["size"] == 32
