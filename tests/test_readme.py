"""README: its tables are those of tests/results, its options exist, its homework grades itself."""
import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark
import numpy as np
import pytest
from conftest import METHODS, ROOT, main_of
from PIL import Image

import common

README = (ROOT / "README.md").read_text(encoding="utf-8")
HOMEWORK = re.findall(r"`(\w+)\.py` Eq\. \((\d+)\)", README.partition("## In a course")[2])


def test_tables_are_those_of_the_results():
    assert benchmark.tables_in(README) == README
    for name in benchmark.SETS:
        assert (benchmark.RESULTS / f"{name}.csv").exists() == (f"<!-- table {name} -->" in README)


def test_the_diff_is_that_of_the_two_files():
    lines = README.partition("```diff\n")[2].partition("```")[0].splitlines()
    for file, sign in (("mean_teacher.py", "-"), ("cps.py", "+")):
        shown = [line[1:] for line in lines if line[0] in (" ", sign)]
        assert len(shown) > 5
        assert "\n".join(shown) in (ROOT / file).read_text(encoding="utf-8")


def csv_line(row, seed, a, b):
    """A results line: a run with these Dice of the units a and b."""
    return {"row": row, "seed": seed, "headline": "yes", "last_dice": (a + b) / 2,
            "last_hd95": 5, "seconds": 120, "dice_by_unit": f"a:{a} b:{b}"}


def test_what_stands_around_a_table_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.write_csv(tmp_path / "phantom.csv", [csv_line(benchmark.BASE, 0, 60, 61)])
    for old in ("", "| old |\n"):
        text = benchmark.tables_in(f"a\n<!-- table phantom -->\n{old}<!-- end -->\nb\n")
        assert text.startswith("a\n<!-- table phantom -->\n| test Dice |")
        assert text.endswith("|\n<!-- end -->\nb\n") and "old" not in text


def test_the_dice_that_a_run_names_for_comparison_is_that_of_the_table():
    lines = benchmark.read_csv(benchmark.RESULTS / "phantom.csv")
    named = {benchmark.BASE: common.LABELED_ONLY_DICE, benchmark.FULL: common.ALL_LABELS_DICE}
    for row, value in named.items():
        dice = [float(line["last_dice"]) for line in lines
                if line["row"] == row and line["headline"] == "yes"]
        assert len(dice) == 3 and abs(sum(dice) / 3 - value) < 0.05


def test_a_real_set_takes_its_labelled_patients_from_its_folder(tmp_path, monkeypatch):
    commands = []

    def run(words, **options):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    out = tmp_path / "DATA" / "out"  # DATA stands for the folder in the set's own options alone
    benchmark.train("acdc3", "CPS", 0, tmp_path / "acdc", out)
    [words] = commands
    assert words[words.index("--out") + 1] == str(out)
    assert words[words.index("--labeled") + 1] == str(tmp_path / "acdc" / "labeled_3.txt")
    assert words[words.index("--data") + 1] == str(tmp_path / "acdc")


def test_a_real_set_without_its_folder_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["isic"])
    assert refused.value.code == 2
    assert "isic needs --data" in capsys.readouterr().err


def test_benchmark_ends_with_status_1_if_a_run_failed_after_the_others(tmp_path, monkeypatch):
    tried = []

    def run(words, **options):
        tried.append(Path(words[1]).name)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text("no table\n")
    options = ["--seeds", "0", "--rows", "CPS", "UCMT", "--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as failed:
        benchmark.main(["phantom", *options])
    assert failed.value.code == 1
    assert sorted(tried) == ["cps.py", "ucmt.py"]


def test_ucmt_with_as_many_batches_has_twice_the_steps():
    """It takes two steps on a batch."""
    assert benchmark.options_of("phantom", "UCMT, as many batches") == ["--steps", "1600"]
    assert benchmark.options_of("acdc3", "UCMT, as many batches") == ["--steps", "6000"]
    assert benchmark.options_of("acdc3", "CPS") == []


def test_a_table_with_a_seed_that_was_not_run_has_an_empty_cell(tmp_path, monkeypatch):
    runs = {(benchmark.BASE, 0): (60, 61), (benchmark.BASE, 1): (62, 63), ("CPS", 0): (70, 71),
            ("CPS", 1): (72, 73), ("UCMT", 1): (62, 65)}  # Dice of the units a and b
    lines = []
    for (row, seed), (a, b) in runs.items():
        lines.append(csv_line(row, seed, a, b))
    benchmark.write_csv(tmp_path / "phantom.csv", lines)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    titles, _, base, cps, ucmt = benchmark.table_of("phantom").splitlines()
    assert "| seed 0 | seed 1 | mean ± sd |" in titles
    assert "| 60.5 | 62.5 | 61.5 ± 1.4 |  | 5.0 |" in base
    assert "| 70.5 | 72.5 | 71.5 ± 1.4 | +10.0 (+10.0 to +10.0) | 5.0 |" in cps
    assert "|  | 63.5 | 63.5 | +1.0 (+0.0 to +2.0) | 5.0 |" in ucmt and ucmt.endswith("| 2 |")


def test_gain_is_that_of_compare():
    """Where every volume has every class, and every patient as many volumes."""
    rng, runs = np.random.default_rng(0), []
    for _ in range(4):
        volumes = {}
        for volume in "abcdefgh":
            volumes[volume] = {c: {"dice": rng.uniform(50, 90)} for c in "12"}
        units = {volume: f"p{number // 2}" for number, volume in enumerate(volumes)}
        runs.append({"units": units, "headline": {"network": "n"},
                     "networks": {"n": {"last": {"volumes": volumes}}}})
    lines = []
    for k, run in enumerate(runs):
        lines.append({"seed": k % 2, "dice_by_unit": benchmark.dice_by_unit(run, "n")})
    expected = common.gain_of(runs[:2], runs[2:])
    numbers = [float(word) for word in re.findall(r"[+-][\d.]+", expected)]
    ours = re.findall(r"[+-][\d.]+", benchmark.gain_of(lines[:2], lines[2:]))
    assert [float(word) for word in ours] == pytest.approx(numbers, abs=0.3)


def test_what_another_machine_ran_stays_in_the_results(tmp_path, monkeypatch):
    lines = [{"row": "CPS", "seed": "7", "headline": "yes", "network": "network 1"}]
    benchmark.write_csv(tmp_path / "phantom.csv", lines)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.collect("phantom", tmp_path / "no runs")
    [line] = benchmark.read_csv(tmp_path / "phantom.csv")
    assert (line["row"], line["seed"], line["network"]) == ("CPS", "7", "network 1")


def commands():
    """The commands that README shows: [words], without comments."""
    found = []
    for line in README.splitlines():
        match = re.match(r"    (?:\$ )?(?:.*&& )?((?:python \w+\.py|pytest).*)", line)
        if match:
            found += [shlex.split(part, comments=True) for part in match[1].split("&&")]
    return found


def test_commands_have_only_options_that_exist(capsys):
    assert len(commands()) > 8
    for words in commands():
        if words[0] == "pytest":
            continue
        file, options = words[1], [word for word in words[2:] if word.startswith("--")]
        if file == "hard_teacher.py":  # the reader's copy
            file = "mean_teacher.py"
        with pytest.raises(SystemExit):
            if file == "common.py":
                common.main([words[2], "--help"])
            else:
                main_of(file.removesuffix(".py"))(["--help"])
        given = capsys.readouterr().out
        for option in options:
            assert re.search(rf"{option}\b", given), f"{' '.join(words)}: no {option}"


def test_every_method_has_a_homework():
    assert sorted(method for method, _ in HOMEWORK) == sorted(METHODS)


def blanked(text, number):
    """A method file's text with the body of an equation's function taken out."""
    for function in ast.parse(text).body:
        doc = ast.get_docstring(function) if isinstance(function, ast.FunctionDef) else None
        if doc and doc.startswith(f"Eq. ({number}):"):
            lines = text.splitlines(keepends=True)
            first, last = function.body[1].lineno, function.body[-1].end_lineno
            body = '    raise NotImplementedError("your turn")\n'
            return "".join([*lines[:first - 1], body, *lines[last:]])
    raise AssertionError(f"no Eq. ({number})")


@pytest.mark.slow
def test_homework_grades_itself(tmp_path):
    """With the bodies blanked, the equations' tests fail and say so; that they pass, CI shows."""
    shutil.copytree(ROOT, tmp_path / "copy",
                    ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    chosen = []
    for method, number in HOMEWORK:
        file = tmp_path / "copy" / f"{method}.py"
        file.write_text(blanked(file.read_text(encoding="utf-8"), number), encoding="utf-8")
        chosen.append(f"(test_{method} and eq{number}_)")
    command = [sys.executable, "-m", "pytest", "-q", "-k", " or ".join(chosen), "-p",
               "no:cacheprovider", *[f"tests/test_{method}.py" for method, _ in HOMEWORK]]
    done = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 1 and "NotImplementedError: your turn" in done.stdout
    for method, number in HOMEWORK:
        assert f"FAILED tests/test_{method}.py::test_eq{number}_" in done.stdout


# --- Recipes --------------------------------------------------------------------------------------

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def draw_hdf5(masks):
    h5py = pytest.importorskip("h5py")
    Path("slices").mkdir()
    for k, mask in enumerate(masks):
        with h5py.File(f"slices/patient001_frame01_slice_{k}.h5", "w") as file:
            file["image"], file["label"] = mask * 1000.0, mask


def draw_nifti(masks):
    nibabel = pytest.importorskip("nibabel")
    Path("nii").mkdir()
    volume = np.stack([mask.T for mask in masks], 2)  # (x, y, slices)
    for name, values in (("case0", volume * 1000.0), ("case0_gt", volume)):
        nibabel.save(nibabel.Nifti1Image(values.astype("int16"), np.eye(4)), f"nii/{name}.nii.gz")


def draw_instances(masks):
    """The two classes are the two objects: in a file each, and as numbers in one file."""
    for k, mask in enumerate(masks):
        save(Path(f"inst/n{k}/images/n{k}.png"), mask * 100)
        for number in (1, 2):
            save(Path(f"inst/n{k}/masks/{number}.png"), (mask == number) * np.uint8(255))
        save(Path(f"num/images/n{k}.png"), mask * 100)
        save(Path(f"num/labels/n{k}.png"), mask)


def draw_classes(masks):
    for k, mask in enumerate(masks):
        save(Path(f"pc/images/n{k}.png"), mask * 100)
        for number, name in ((1, "lung"), (2, "heart")):
            save(Path(f"pc/labels/n{k}_{name}.png"), (mask == number) * np.uint8(255))


def draw_colours(masks):
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)
    for k, mask in enumerate(masks):
        save(Path(f"colour/images/n{k}.png"), mask * 100)
        save(Path(f"colour/labels/n{k}.png"), colours[mask])


RECIPES = {  # what the recipe's summary begins with: sources, made dataset, classes in masks
    "HDF5": (draw_hdf5, ["acdc"], [0, 1, 2]), "NIfTI": (draw_nifti, ["mri"], [0, 1, 2]),
    "Instance numbers": (draw_instances, ["cells", "num"], [0, 255]),
    "One file per class": (draw_classes, ["pc"], [0, 1, 2]),
    "Grey levels": (draw_colours, ["colour"], [0, 1, 2])}


def code_of(summary):
    """The Python code of the fold whose summary begins so."""
    [code] = re.findall(rf"<summary>{summary}.*?```python\n(.*?)```", README, re.DOTALL)[:1]
    return code


@pytest.mark.parametrize("summary", RECIPES)
def test_recipes_make_a_dataset(summary, tmp_path, monkeypatch):
    """Masks come out as they were, or as 0 and 255 where all objects are one class."""
    monkeypatch.chdir(tmp_path)
    draw, folders, values = RECIPES[summary]
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (20, 30), dtype=np.uint8) for _ in range(3)]
    draw(masks)
    exec(code_of(summary), {})
    for folder in folders:
        images = common.list_files(Path(folder, "images"))
        made = common.pair_masks(images, common.list_files(Path(folder, "masks")))
        assert len(images) == len(made) == 3
        for name, mask in zip(images, masks, strict=True):
            expected = mask
            if values == [0, 255]:
                expected = (mask > 0) * 255
            assert np.array_equal(common.read_mask(made[name]), expected)
            assert common.read_pixels(images[name]).shape == mask.shape


def test_recipe_for_sub_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for group in "ab":
        save(Path(f"sub/{group}/n.jpg"), np.zeros((8, 8), np.uint8))
    exec(code_of("Images in sub-folders"), {})
    names = [item.name for item in common.find_items(tmp_path / "polyps")]
    assert names == ["a_n", "b_n"]
