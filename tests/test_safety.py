"""What goes wrong outside: damaged folders, full disks, foreign checkpoints, two runs at once."""
import json
import os
import pickle
import threading

import fuzz
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, run_folder
from PIL import Image

import common
import mean_teacher


@pytest.mark.parametrize("seed", range(50))
def test_damaged_dataset_ends_with_0_or_2(seed):
    """python tests/fuzz.py 500 does more of them; a traceback or a hang of a minute fails."""
    status, kinds, text = fuzz.case(seed)
    assert status in (0, 2), (kinds, text)
    assert "Traceback" not in text and (status == 0 or "error: " in text)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-was-run-from-a-pickle",)


def test_checkpoints_and_arrays_run_no_pickled_code(make_dataset, options, tmp_path, capsys):
    evil = tmp_path / "evil.pt"
    torch.save({"networks": Evil()}, evil)
    with pytest.raises(SystemExit) as stopped:
        common.main(["predict", "--run", str(evil), "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert stopped.value.code == 2
    root = make_dataset()
    (root / "images" / "case00.png").unlink()
    with open(root / "images" / "case00.npy", "wb") as file:
        np.lib.format.write_array(file, np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(options(root, steps=1))
    assert stopped.value.code == 2 and "case00.npy" in capsys.readouterr().err
    (root / "images" / "case00.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SystemExit):
        mean_teacher.main(options(root, steps=1))
    assert not os.path.exists("/tmp/this-was-run-from-a-pickle")


def test_every_load_is_weights_only():
    text = (ROOT / "common.py").read_text()
    assert text.count("torch.load(") == text.count("weights_only=True") > 0
    assert text.count("np.load(") == text.count("allow_pickle=False") > 0


def test_decompression_bomb_is_a_clear_error(make_dataset, options, capsys):
    root = make_dataset()
    (root / "images" / "case03.png").write_bytes(fuzz.bomb(60000))
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(options(root, steps=1))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "case03.png" in err and "DecompressionBomb" in err
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("line", ["../other/images/case00", "/etc/passwd", "images/case00.png", "..", "C:\\x"])
def test_ids_of_lists_are_names_in_the_dataset_and_no_paths(make_dataset, options, tmp_path, capsys, line):
    make_dataset(name="other")
    root = make_dataset()
    (root / "train.txt").write_text(f"case00\n{line}\n")
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(options(root, steps=1))
    assert stopped.value.code == 2 and "not in the dataset" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["save", "fsync"])
def test_full_disk_leaves_the_checkpoint_before(make_dataset, options, tmp_path, monkeypatch, capsys, failing):
    argv = options(make_dataset(), "--val-every", "2", steps=4)
    count = {"last": 0}
    save, fsync = torch.save, os.fsync

    def full(state, path):
        if "last.pt" in str(path):
            count["last"] += 1
            if count["last"] == 2:
                open(path, "wb").write(b"half of a che")
                raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(state, path)

    def full_at_last(number):
        if "last.pt" in os.readlink(f"/proc/self/fd/{number}"):
            count["last"] += 1
            if count["last"] == 2:
                raise OSError(28, "No space left on device")
        fsync(number)
    monkeypatch.setattr(*((torch, "save", full) if failing == "save" else (os, "fsync", full_at_last)))
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(argv)
    assert stopped.value.code == 1 and "last.pt cannot be written" in capsys.readouterr().err
    folder = run_folder(tmp_path / "runs")
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    mean_teacher.main([*argv, "--resume"])
    mean_teacher.main([*argv, "--out", str(tmp_path / "whole")])
    whole = torch.load(run_folder(tmp_path / "whole") / "last.pt", weights_only=True)
    assert equal(torch.load(folder / "last.pt", weights_only=True), whole)


def test_runs_started_at_once_share_the_cache_and_not_the_folder(make_dataset, options, tmp_path):
    root, found = make_dataset(), []

    def start():
        args = common.parse(common.parser(""), options(root))
        run = common.Run("mean_teacher", args, common.Data(args))
        found.append((run.folder, np.array(run.data.images), np.array(run.data.labels)))
    threads = [threading.Thread(target=start) for _ in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({folder for folder, *_ in found}) == 5  # each its own, and none stopped
    assert all(np.array_equal(found[0][k], other[k]) for other in found for k in (1, 2))
    assert all((folder / "split.json").exists() for folder, *_ in found)
    assert not [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith("building")]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_says_what_to_lower(error, capsys):
    common.explain(type(error), error, None)
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory. Lower --batch-size") and "Traceback" not in err
    common.explain(ValueError, ValueError("other"), None)
    assert "ValueError: other" in capsys.readouterr().err


def test_results_are_json_of_plain_numbers(options, tmp_path):
    mean_teacher.main(options("phantom", steps=1))
    results = json.loads((run_folder(tmp_path / "runs") / "results.json").read_text())
    assert isinstance(results["headline"]["dice"], float) and results["options"]["size"] == 32
