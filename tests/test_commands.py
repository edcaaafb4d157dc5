"""common.py predict and compare, from small real runs."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import METHODS, run_folder
from PIL import Image

import common
import cps
import mean_teacher


@pytest.fixture
def trained(make_dataset, options, tmp_path):
    """A finished run of cps.py, and its dataset, of 40 x 40 colour images with class names."""
    root = make_dataset(classes=3, channels=3, size=40)
    (root / "classes.txt").write_text("background\nlung\nheart\n")
    cps.main(options(root, steps=2))
    return run_folder(tmp_path / "runs"), root


def predict(*words):
    common.main(["predict", *map(str, words), "--device", "cpu"])


def test_predict_a_folder_at_each_images_own_size(trained, tmp_path, capsys):
    folder, root = trained
    images = tmp_path / "mine"
    images.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(images / "a.png")
    Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(images / "b.jpg")
    np.save(images / "c_slice_01.npy", rng.normal(size=(24, 24)).astype(np.float32))
    Image.fromarray(rng.integers(0, 60000, (24, 26), dtype=np.uint16)).save(images / "d.tif")
    predict("--run", folder, "--images", images, "--out", tmp_path / "out")
    sizes = {"a": (50, 30), "b": (20, 20), "c_slice_01": (24, 24), "d": (26, 24)}
    for name, size in sizes.items():
        mask = Image.open(tmp_path / "out" / "masks" / f"{name}.png")
        assert mask.size == size and mask.mode == "L" and np.max(mask) < 3
        overlay = Image.open(tmp_path / "out" / "overlays" / f"{name}.png")
        assert overlay.height == size[1] + 2 * 16  # a line of legend for each of two classes
    assert "4 of 4 images segmented by network 1" in capsys.readouterr().out


def test_predict_scales_a_volume_as_a_whole(trained, tmp_path, monkeypatch):
    """Also if the names of its slices, sorted as text, have another volume between them."""
    folder, root = trained
    images, seen, read = tmp_path / "mine", [], common.read_volume
    images.mkdir()
    for name in ("p_slice_1", "p_slice_10", "p_slice_2 (copy)", "p_slice_2"):
        np.save(images / f"{name}.npy", np.random.default_rng(0).normal(size=(24, 24)))
    monkeypatch.setattr(common, "read_volume", lambda paths, bad: seen.append(paths := list(paths)) or read(paths, bad))
    predict("--run", folder, "--images", images, "--out", tmp_path / "out")
    assert sorted([path.stem for path in paths] for paths in seen) == [["p_slice_1", "p_slice_2", "p_slice_10"], ["p_slice_2 (copy)"]]


def test_predict_equals_the_networks_own_labels_and_tta_their_mean(trained, tmp_path):
    folder, root = trained
    predict("--run", folder, "--images", root, "--out", tmp_path / "out")
    predict("--run", folder, "--images", root, "--out", tmp_path / "tta", "--tta")
    predict("--run", folder, "--images", root, "--out", tmp_path / "two", "--network", "ensemble")
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 14
    state, networks, function = common.load_run(folder, "cpu")
    image = Image.open(root / "images" / "case03.png")
    x = torch.from_numpy(np.array(image.resize((32, 32), Image.BILINEAR))).movedim(-1, 0)[None] / 255
    with common.evaluating(networks):
        mirrored = [function(networks, x.flip(f))["network 1"].flip(f) for f in ((), (2,), (3,), (2, 3))]
        both = function(networks, x)["ensemble"]
    for out, probs in (("out", mirrored[0]), ("tta", sum(mirrored)), ("two", both)):
        expected = torch.nn.functional.interpolate(probs, (40, 40), mode="bilinear").argmax(1)[0]
        assert np.array_equal(np.array(Image.open(tmp_path / out / "masks" / "case03.png")), expected)


def test_predict_from_a_copied_checkpoint_alone(trained, tmp_path):
    folder, root = trained
    shutil.copy(folder / "last.pt", tmp_path / "mine.pt")
    predict("--run", tmp_path / "mine.pt", "--images", root / "images" / "case00.png", "--out", tmp_path / "copy")
    predict("--run", folder, "--images", root / "images" / "case00.png", "--out", tmp_path / "run")
    pictures = [tmp_path / out / part / "case00.png" for out in ("copy", "run") for part in ("masks", "overlays")]
    assert pictures[0].read_bytes() == pictures[2].read_bytes() and pictures[1].read_bytes() == pictures[3].read_bytes()


def test_predict_names_and_skips_what_it_cannot_read(trained, tmp_path, capsys):
    folder, root = trained
    images = tmp_path / "mine"
    shutil.copytree(root / "images", images)
    (images / "case05.png").write_bytes((images / "case05.png").read_bytes()[:200])
    (images / "text.jpg").write_text("hello")
    with pytest.raises(SystemExit) as stopped:
        predict("--run", folder, "--images", images, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and "2 files could not be read" in err
    assert "\n  case05.png: " in err and "\n  text.jpg: " in err
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 13


@pytest.mark.parametrize("words, message", [
    (["--run", "nowhere"], "nowhere cannot be used"), (["--images", "nowhere"], "no images there"),
    (["--network", "teacher"], "network 1, network 2, ensemble"), (["--run", "text.pt"], "cannot be used"),
    (["--device", "tpu9"], "cannot be used")])
def test_predict_with_wrong_words(trained, tmp_path, capsys, monkeypatch, words, message):
    folder, root = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(SystemExit) as stopped:
        common.main(["predict", "--run", str(folder), "--images", str(root), "--out", "out", *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_checkpoint_imports_no_other_module(trained, tmp_path, capsys):
    """Only files beside common.py: a checkpoint from elsewhere must not choose what is run."""
    folder, root = trained
    state = torch.load(folder / "last.pt", weights_only=True)
    for method in ("os", "tests.ranks", "../x"):
        torch.save({**state, "method": method}, tmp_path / "bad.pt")
        with pytest.raises(SystemExit) as stopped:
            predict("--run", tmp_path / "bad.pt", "--images", root, "--out", tmp_path / "out")
        assert stopped.value.code == 2 and "is not here" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_predict_knows_every_method(method, options, tmp_path):
    import importlib
    module = importlib.import_module(method)
    networks = module.build(1, 3, 4)
    reported = list(module.predict({k: n.eval() for k, n in networks.items()}, torch.rand(1, 1, 32, 32)))
    torch.save({"method": method, "step": 1, "size": 32, "width": 4, "channels": 1, "classes": 3, "reported": reported,
                "class_names": ["background", "a", "b"],
                "networks": {k: n.state_dict() for k, n in networks.items()}}, tmp_path / "best.pt")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    predict("--run", tmp_path / "best.pt", "--images", tmp_path / "a.png", "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "masks" / "a.png").size == (30, 20)


def test_supervised_predicts_with_the_student(options, tmp_path, capsys):
    mean_teacher.main(options("phantom", "--supervised", steps=2))
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    predict("--run", run_folder(tmp_path / "runs"), "--images", tmp_path / "a.png", "--out", tmp_path / "out")
    assert "segmented by student of" in capsys.readouterr().out


def fake_run(folder, method, seed, dice, labeled="10%", val=("v",), options=None, split="s"):
    """A finished run's two files: dice is (volumes, classes), None where undefined."""
    folder.mkdir(parents=True)
    volumes = {f"p{v}": {str(c + 1): None if d is None else {"dice": d} for c, d in enumerate(row)}
               for v, row in enumerate(dice)}
    head = np.mean([np.mean([d for d in column if d is not None]) for column in zip(*dice, strict=True)])
    results = {"method": method, "dataset": "hearts", "labeled": labeled, "options": options or {}, "seed": seed,
               "headline": {"network": "n", "dice": head, "jaccard": 1.0, "hd95": 2.0, "asd": 3.0},
               "networks": {"n": {"last": {"volumes": volumes}}}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "split.json").write_text(json.dumps({"hash": split + labeled, "val": list(val), "test": ["t"]}))
    return folder


def table_of(out):
    return list(csv.DictReader(open(out / "comparison.csv")))


def compare(monkeypatch, *words):
    monkeypatch.setattr(common, "save_strips", lambda *_: None)
    common.main(["compare", *map(str, words)])


def test_compare_means_order_and_gain(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(1)
    base = [rng.uniform(50, 70, (20, 2)).tolist() for _ in range(2)]
    better = [(np.array(d) + 5 + rng.normal(0, 1, (20, 2))).tolist() for d in base]
    runs = [fake_run(tmp_path / "r1", "ucmt", 0, better[0]), fake_run(tmp_path / "r2", "ucmt", 1, better[1]),
            fake_run(tmp_path / "full", "supervised", 0, [[90.0, 90.0]] * 20, labeled="100%"),
            fake_run(tmp_path / "s1", "supervised", 1, base[1]), fake_run(tmp_path / "s0", "supervised", 0, base[0])]
    compare(monkeypatch, *runs, "--out", tmp_path / "out")
    rows = table_of(tmp_path / "out")
    assert [r["method"] for r in rows] == ["supervised", "ucmt", "supervised"]
    assert [r["labelled"] for r in rows] == ["10%", "10%", "100%"] and rows[2]["Dice %"] == "90.00"
    means = [np.mean(d) for d in better]
    assert rows[1]["Dice %"] == f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"
    gain = np.mean(better) - np.mean(base)
    words = rows[1]["gain in Dice (95% interval)"].replace("(", "").replace(")", "").split()
    assert float(words[0]) == pytest.approx(gain, abs=0.01)
    difference = np.mean(np.array(better) - np.array(base), axis=(0, 2))  # paired: the volumes' differences
    spread = 1.96 * difference.std() / 20**0.5
    assert float(words[1]) == pytest.approx(gain - spread, abs=0.15) and float(words[3]) == pytest.approx(gain + spread, abs=0.15)
    assert rows[0]["gain in Dice (95% interval)"] == rows[2]["gain in Dice (95% interval)"] == ""
    text = capsys.readouterr().out
    assert text.splitlines()[:2] == (tmp_path / "out" / "comparison.md").read_text().splitlines()[:2]


def test_compare_gain_is_that_of_the_headlines_with_undefined_volumes(tmp_path, monkeypatch):
    a = fake_run(tmp_path / "a", "supervised", 0, [[50.0, None], [60.0, 40.0], [70.0, 50.0]])
    b = fake_run(tmp_path / "b", "cps", 0, [[55.0, None], [66.0, 48.0], [77.0, 50.0]])
    compare(monkeypatch, a, b, "--out", tmp_path / "out")
    rows = table_of(tmp_path / "out")
    gain = float(rows[1]["Dice %"]) - float(rows[0]["Dice %"])
    assert float(rows[1]["gain in Dice (95% interval)"].split()[0]) == pytest.approx(gain, abs=0.011)


def test_compare_interval_leaves_undefined_samples_out(tmp_path, monkeypatch):
    """One lesion in three images: samples without it say nothing, and do not say 0."""
    a = fake_run(tmp_path / "a", "supervised", 0, [[None], [None], [60.0]])
    b = fake_run(tmp_path / "b", "cps", 0, [[None], [None], [65.0]])
    compare(monkeypatch, a, b, "--out", tmp_path / "out")
    assert table_of(tmp_path / "out")[1]["gain in Dice (95% interval)"] == "+5.00 (+5.00 to +5.00)"


def test_compare_gain_over_seeds_in_which_a_class_is_undefined(tmp_path, monkeypatch):
    runs = []
    for method, base in (("supervised", 40.0), ("cps", 80.0)):
        for seed, second in ((0, None), (1, 0.0)):
            folder = fake_run(tmp_path / f"{method}{seed}", method, seed, [[base, 20.0]])
            results = json.loads((folder / "results.json").read_text())
            results["networks"]["n"]["last"]["volumes"]["p0"]["2"] = second if second is None else {"dice": second}
            results["headline"]["dice"] = base if second is None else base / 2
            (folder / "results.json").write_text(json.dumps(results))
            runs.append(folder)
    compare(monkeypatch, *runs, "--out", tmp_path / "out")
    rows = table_of(tmp_path / "out")
    gain = float(rows[1]["Dice %"].split()[0]) - float(rows[0]["Dice %"].split()[0])
    assert gain == 30 and rows[1]["gain in Dice (95% interval)"].startswith("+30.00")


def test_compare_cannot_write(tmp_path, monkeypatch, capsys):
    run, file = fake_run(tmp_path / "a", "cps", 0, [[50.0]]), tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SystemExit) as stopped:
        compare(monkeypatch, run, "--out", file)
    assert stopped.value.code == 1 and "cannot be written" in capsys.readouterr().err


def test_compare_tells_runs_apart_by_the_options_that_differ(tmp_path, monkeypatch):
    runs = [fake_run(tmp_path / str(w), "cps", 0, [[50.0]], options={"size": 96, "weight": w}) for w in (1, 2)]
    compare(monkeypatch, *runs, "--out", tmp_path / "out")
    assert [r["method"] for r in table_of(tmp_path / "out")] == ["cps weight=1", "cps weight=2"]


@pytest.mark.parametrize("other", [{"val": ("w",)}, {"split": "z"}])
def test_compare_refuses_other_splits_and_says_which(tmp_path, monkeypatch, capsys, other):
    runs = [fake_run(tmp_path / "one", "cps", 0, [[50.0]]), fake_run(tmp_path / "two", "cps", 1, [[50.0]], **other)]
    with pytest.raises(SystemExit) as stopped:
        compare(monkeypatch, *runs, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "one" in err and "two" in err and "different splits" in err


def test_compare_needs_finished_runs(tmp_path, monkeypatch, capsys):
    old = fake_run(tmp_path / "old", "cps", 0, [[50.0]])
    results = json.loads((old / "results.json").read_text())
    del results["options"]  # the layout of an earlier version
    (old / "results.json").write_text(json.dumps(results))
    for folder in (old, tmp_path / "nothing"):
        with pytest.raises(SystemExit) as stopped:
            compare(monkeypatch, folder)
        assert stopped.value.code == 2 and "not the folder of a finished run" in capsys.readouterr().err


def test_compare_draws_the_same_images_across_methods(make_dataset, options, tmp_path, monkeypatch):
    root = make_dataset()
    cps.main(options(root, steps=2))
    mean_teacher.main(options(root, "--supervised", steps=2))
    common.main(["compare", *map(str, (tmp_path / "runs" / "set").iterdir()), "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "set.png") as strip:
        assert strip.size[0] == 4 * 162 + 2  # image, truth, labelled-only, CPS
    assert [r["method"] for r in table_of(tmp_path / "out")] == ["supervised", "cps"]
