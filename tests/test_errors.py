"""What a user gets wrong ends before any training: status 2, a message that says what to do."""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_of, main_of, run_folder
from PIL import Image

import common
import cps
import mean_teacher
import ucmt


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)


def save(path, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def damage_nothing(root):
    pass


def no_folder(root):
    shutil.rmtree(root)


def no_images_folder(root):
    (root / "images").rename(root / "pictures")


def no_images(root):
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".dcm"))


def mask_without_image(root):
    (root / "images" / "case03.png").unlink()


def two_of_one_name(root):
    save(root / "images" / "case03.bmp", np.zeros((32, 32)))


def no_masks(root):
    shutil.rmtree(root / "masks")


def too_few_masks(root):
    for path in sorted((root / "masks").iterdir())[1:]:
        path.unlink()


def one_patient(root):
    for part in ("images", "masks"):
        for i, path in enumerate(sorted((root / part).iterdir())):
            path.rename(path.with_name(f"scan_slice_{i}.png"))


def unknown_id(root):
    write(root / "val.txt", "case01\ncase99\n")


def overlapping_lists(root):
    write(root / "train.txt", "case01\ncase02\n")
    write(root / "val.txt", "case02\n")


def all_in_training(root):
    write(root / "train.txt", "".join(f"case{i:02d}\n" for i in range(14)))


def empty_list(root):
    write(root / "test.txt", "")


def binary_list(root):
    write(root / "test.txt", b"\xff\xfe\x00\x81")


def truncated(root):
    for name in ("case03", "case05"):
        path = root / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    write(root / "images" / "case07.png", "this is a text")


def pages(root):
    (root / "images" / "case03.png").unlink()
    frames = [Image.fromarray(np.full((32, 32), i, np.uint8)) for i in (1, 2)]
    frames[0].save(root / "images" / "case03.tif", save_all=True, append_images=frames[1:])


def pickled(root):
    (root / "images" / "case03.png").unlink()
    np.save(root / "images" / "case03.npy", np.array([{"a": 1}], object), allow_pickle=True)


def not_finite(root):
    (root / "images" / "case03.png").unlink()
    np.save(root / "images" / "case03.npy", np.full((32, 32), np.nan))


def masks_of_another_size(root):
    for path in (root / "masks").iterdir():
        save(path, np.zeros((16, 32)))


def odd_values(root):
    for path in (root / "masks").iterdir():
        save(path, np.array([[0, 85], [170, 255]]).repeat(16, 0).repeat(16, 1))


def coloured_masks(root):
    for path in (root / "masks").iterdir():
        save(path, np.random.default_rng(0).integers(0, 255, (32, 32, 3)))


def empty_masks(root):
    for path in (root / "masks").iterdir():
        save(path, np.zeros((32, 32)))


def two_ways(root):
    for i, path in enumerate(sorted((root / "masks").iterdir())):
        save(path, np.eye(32) * (255 if i % 2 else 1))


def grey_then_colour(root):
    save(root / "images" / "case05.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3)))


def ignored_pixels(root):
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[0] = 255
        save(path, mask)


def bad_list(root):
    write(root / "mine.txt", "case01\nnobody\n")


def list_of_tested(root):
    write(root / "test.txt", "case01\n")
    write(root / "mine.txt", "case01\ncase02\n")


def list_without_masks(root):
    (root / "masks" / "case02.png").unlink()
    write(root / "train.txt", "case02\ncase03\n")
    write(root / "val.txt", "case04\n")
    write(root / "test.txt", "case05\n")
    write(root / "mine.txt", "case02\n")


def image_is_a_folder(root):
    (root / "images" / "case03.png").unlink()
    (root / "images" / "case03.png").mkdir()


CASES = [  # what is wrong, further options, what the message must say
    (no_folder, [], "no folder images.*no such folder"),
    (no_images_folder, [], "no folder images.*found: masks, pictures"),
    (no_images, [], r"no images in .*case00\.dcm"),
    (mask_without_image, [], r"1 masks have no image.*case03\.png"),
    (two_of_one_name, [], r"two files for case03: case03\.bmp and case03\.png"),
    (no_masks, [], "no training units with masks are left: 0 units have masks"),
    (too_few_masks, [], "no training units with masks are left: 1 units"),
    (one_patient, [], "all 14 images belong to one patient, scan"),
    (unknown_id, [], r"val\.txt: 1 of 2 ids are not in the dataset: .*case99"),
    (overlapping_lists, [], r"case02: in train\.txt and in val\.txt"),
    (all_in_training, [], "no validation units with masks are left"),
    (empty_list, [], r"test\.txt: 0 of 0 ids.*at least one id"),
    (binary_list, [], r"test\.txt cannot be read as a text file of ids"),
    (truncated, [], r"3 bad files among the images"
     r"(.|\n)*case03\.png(.|\n)*case05\.png(.|\n)*case07\.png"),
    (pages, [], r"case03\.tif: .*2 pages in a file; expected one file a slice"),
    (pickled, [], r"case03\.npy: cannot be used.*allow_pickle"),
    (not_finite, [], r"case03\.npy: .*not finite"),
    (masks_of_another_size, [],
     r"bad files among the masks(.|\n)*16 x 32 pixels, but its image has 32 x 32"),
    (odd_values, [],
     r"mask values 0, 85, 170, 255 \(255 in case\d\d\.png\); expected class numbers"),
    (coloured_masks, [], "a mask in colours"),
    (empty_masks, [], "background only"),
    (two_ways, [], r"class numbers \(1 in case\d\d\.png\) and also 255 \(in case\d\d\.png\)"),
    (ignored_pixels, [], r"class numbers \(2 in case\d\d\.png\) and also 255 \(in case\d\d\.png\)"),
    (grey_then_colour, [], r"case05\.png: in colour"),
    (bad_list, ["--labeled", "{root}/mine.txt"], r"mine\.txt: 1 of 2 ids are not in the dataset"),
    (list_of_tested, ["--labeled", "{root}/mine.txt"],
     r"mine\.txt: not training units with masks: case01\. Expected some of case"),
    (list_without_masks, ["--labeled", "{root}/mine.txt"],
     r"mine\.txt: none of the images that it names has a mask"),
    (image_is_a_folder, [], r"case03\.png is a folder or a broken link"),
    (damage_nothing, ["--labeled", "0.1"], "did you mean 10%"),
    (damage_nothing, ["--labeled", "0"], "a number of units from 1 to 10"),
    (damage_nothing, ["--labeled", "150%"], "up to 100%"),
    (damage_nothing, ["--labeled", "0%"], "above 0%"),
    (damage_nothing, ["--labeled", "11"], "from 1 to 10"),
    (damage_nothing, ["--labeled", "ten"], "or a text file of ids"),
    (damage_nothing, ["--labeled", "ten.txt"], "a text file of ids, of which there is none of"),
    (damage_nothing, ["--size", "100"], "multiple of 16(.|\n)*Try 96 or 112"),
    (damage_nothing, ["--device", "tpu9"], "--device tpu9 cannot be used"),
    (damage_nothing, ["--precision", "fp16"], "fp16 needs a CUDA GPU"),
    (damage_nothing, ["--classes", "2"], "the masks hold class 2. Expected at least 3"),
    (damage_nothing, ["--steps", "0"], "at least 1 is needed"),
    (damage_nothing, ["--lr", "nan"], "at least 0 is needed"),
    (damage_nothing, ["--out", "{root}/train.png/x"], "--out: .* cannot be made"),
    (damage_nothing, ["--rotation", "200"], "0 to 180 is needed"),
    (damage_nothing, ["--size", "7"], "multiple of 16(.|\n)*Try 16"),
    (damage_nothing, ["--cache", "{root}/train.png/x"], "--cache FOLDER"),
]


NAMES = [f"{case[0].__name__}-{number}" for number, case in enumerate(CASES)]


def error_of(capsys, main, argv):
    """What a command says that must end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("damage, more, message", CASES, ids=NAMES)
def test_bad_input(damage, more, message, make_dataset, options, tmp_path, capsys):
    root = make_dataset()
    write(root / "train.png", "a file")
    damage(root)
    more = [word.format(root=root) for word in more]
    error = error_of(capsys, mean_teacher.main, options(*more, data=root))
    assert re.search(message, error), error
    assert not list(tmp_path.glob("runs/*/*")), "no run folder is left behind"


@pytest.mark.parametrize("method, option", [
    ("mean_teacher", "--weight"), ("cps", "--weight"), ("ucmt", "--weight"),
    ("ucmt", "--teacher-mix"), ("cdma", "--distill-weight"), ("cdma", "--entropy-weight"),
    ("mlds", "--weight"), ("contrastive_st", "--weight")])
def test_a_negative_weight_is_refused(method, option, options, capsys):
    """It would reward what its term is against."""
    error = error_of(capsys, main_of(method), options(f"{option}=-1"))
    assert f"{option}: -1 was given, " in error


def test_labeled_is_needed_where_all_images_have_masks(make_dataset, options, capsys):
    argv = options(data=make_dataset())
    cut = argv.index("--labeled")
    error = error_of(capsys, mean_teacher.main, argv[:cut] + argv[cut + 2:])
    assert "--labeled is needed" in error


def test_slices_of_a_volume_differ_in_size(make_dataset, options, capsys):
    root = make_dataset(units=6, slices=2)
    for path in root.glob("*/*_slice_01.png"):
        Image.open(path).resize((20, 20), Image.NEAREST).save(path)
    assert "differ in size" in error_of(capsys, mean_teacher.main, options(data=root))


def test_at_most_ten_bad_files_are_named(make_dataset, options, capsys):
    root = make_dataset()
    for path in (root / "images").iterdir():
        path.write_text("nothing")
    error = error_of(capsys, mean_teacher.main, options(data=root))
    assert "14 bad files" in error and len(re.findall(r"case\d+\.png:", error)) == 10


@pytest.mark.parametrize("more, message", [
    (["--labeled", "0.1"], "did you mean 10%"), (["--size", "20"], "multiple of 16"),
    (["--device", "tpu9"], "--device tpu9 cannot be used")])
def test_names_and_options_are_checked_before_anything_is_decoded(make_dataset, options, capsys,
                                                                  more, message):
    root = make_dataset()
    for path in root.glob("*/*.png"):
        path.write_text("whoever opens this has something else to say")
    error = error_of(capsys, mean_teacher.main, options(*more, data=root))
    assert message in error and "bad files" not in error


def test_commands_refuse_what_they_do_not_know(tmp_path, capsys):
    for argv in (["pedict"], ["phantom"], ["phantom", "--out", str(tmp_path)],
                 ["check", "--data", str(tmp_path)]):
        assert error_of(capsys, common.main, argv)


# --- Resume ---------------------------------------------------------------------------------------


def files_of(folder):
    """{file name: content} of a run folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resume_error(capsys, folder, *words, main=mean_teacher.main):
    """What --resume says that must be refused; it must not touch the run either."""
    before = files_of(folder)
    error = error_of(capsys, main, ["--resume", str(folder), *map(str, words)])
    assert files_of(folder) == before and len(list(folder.parent.iterdir())) == 1
    return error


@pytest.fixture(scope="module")
def finished(drawn, tmp_path_factory):
    """The folder of a finished run of mean_teacher.py, made once, which must not be changed."""
    out = tmp_path_factory.mktemp("finished")
    results = mean_teacher.main([
        "--data", str(drawn), "--labeled", "3", "--size", "32", "--width", "4", "--steps", "2",
        "--val-every", "100", "--batch-size", "2", "--unlabeled-batch", "2", "--device", "cpu",
        "--precision", "fp32", "--out", str(out / "runs"), "--cache", str(out / "cache")])
    return Path(results["folder"])


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run's folder, to be resumed or damaged by a test."""
    return shutil.copytree(finished, tmp_path / "runs" / "phantom" / finished.name)


@pytest.mark.parametrize("option, there, typed", [
    ("steps", "2", "3"), ("width", "4", "6"), ("weight", "5.0", "3"), ("size", "32", "48"),
    ("lr", "0.001", "0.1"), ("val-every", "100", "1"), ("split-seed", "0", "1"),
    ("batch-size", "2", "4"), ("classes", "None", "7")])
def test_resume_refuses_other_options(folder, capsys, option, there, typed):
    error = resume_error(capsys, folder, f"--{option}", typed)
    assert f"--{option} is {there} there, {float(typed):g}" in error and "Leave it out" in error


@pytest.mark.parametrize("typed", ["--no-flip", "--supervised"])
def test_resume_refuses_other_switches(folder, capsys, typed):
    name = typed.removeprefix("--no-").removeprefix("--")
    assert f"--{name} is" in resume_error(capsys, folder, typed)


@pytest.mark.parametrize("words", [["--seed", "0"], ["--batch-size", "8"], ["--flip"]])
def test_resume_refuses_a_typed_default_that_the_run_has_not(options, capsys, words):
    argv = options("--seed", 1, "--no-flip", steps=1)
    folder = Path(mean_teacher.main(argv)["folder"])
    assert f"{words[0]} is" in resume_error(capsys, folder, *words)


def test_resume_refuses_another_dataset(folder, make_dataset, capsys):
    assert "--data is" in resume_error(capsys, folder, "--data", make_dataset())


def test_resume_refuses_another_labelled_share(folder, capsys):
    assert "--labeled is" in resume_error(capsys, folder, "--labeled", "4")


@pytest.mark.parametrize("more", [[], ["--weight", 3, "--no-flip"], ["--supervised"]])
def test_resume_takes_its_own_options_again(options, drawn, tmp_path, capsys, more):
    folder = Path(mean_teacher.main(options(*more, steps=2))["folder"])
    again = options(*more, "--resume", folder, data=os.path.relpath(drawn), steps=2)
    results = mean_teacher.main(again)
    assert results["folder"] == str(folder) and run_folder(tmp_path / "runs") == folder
    assert "--resume: continuing at step 2" in capsys.readouterr().out


def test_resume_takes_its_own_device_and_precision_or_typed_ones(folder, capsys):
    path = folder / "args.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"device": "cuda:7", "precision": "bf16"}))
    assert "--device cuda:7 cannot be used" in resume_error(capsys, folder)
    typed = ["--device", "cpu", "--precision", "fp32"]
    results = mean_teacher.main(["--resume", str(folder), *typed])
    assert results["args"]["device"] == "cpu" and results["args"]["precision"] == "fp32"


def test_resume_before_the_first_checkpoint_starts_again(folder, capsys):
    before = last_of(folder)
    (folder / "last.pt").unlink()
    mean_teacher.main(["--resume", str(folder)])
    assert "no checkpoint yet in" in capsys.readouterr().out
    after = last_of(folder)
    assert after["step"] == 2 and after["rows"] == before["rows"]


@pytest.mark.parametrize("main", [cps.main, ucmt.main], ids=["cps", "ucmt"])
def test_resume_refuses_a_run_of_another_file(folder, capsys, main):
    error = resume_error(capsys, folder, main=main)
    assert "has other options than this file" in error


def test_resume_refuses_a_checkpoint_of_another_file(folder, capsys):
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"file": "cps"}, folder / "last.pt")
    assert "a run of cps.py. Resume it with that file" in resume_error(capsys, folder)


DAMAGES = {"missing": None, "empty": b"", "half": b'{"data": "x", "lab', "null": b"null",
           "a list": b"[1, 2]", "no options": b"{}", "bytes": b"\xff\xfe\x00\x81"}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_resume_with_damaged_options(folder, capsys, content):
    (folder / "args.json").unlink()
    if content is not None:
        (folder / "args.json").write_bytes(content)
    error = resume_error(capsys, folder)
    assert f"--resume {folder}" in error
    assert "cannot be read" in error or "has other options than this file" in error


def test_resume_without_one_option_of_this_file(folder, capsys):
    """As if the run were of an older version."""
    content = json.loads((folder / "args.json").read_text())
    del content["rotation"]
    (folder / "args.json").write_text(json.dumps(content))
    assert "has other options than this file" in resume_error(capsys, folder)


def test_resume_of_no_folder(tmp_path, capsys):
    error = error_of(capsys, mean_teacher.main, ["--resume", str(tmp_path / "nowhere")])
    assert "cannot be read" in error and "Expected a run's folder" in error


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_resume_with_a_damaged_checkpoint(folder, capsys, size):
    content = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(content[:size])
    error = resume_error(capsys, folder)
    assert "last.pt cannot be used" in error and "--resume" in error


def image_removed(root):
    (root / "images" / "p05_frame01_slice_00.png").unlink()
    (root / "masks" / "p05_frame01_slice_00.png").unlink()


def image_added(root):
    for part in ("images", "masks"):
        shutil.copy(root / part / "p05_frame01_slice_00.png", root / part / "p05_slice_9.png")


def mask_removed(root):
    (root / "masks" / "p30_frame01_slice_00.png").unlink()


def list_changed(root):
    write(root / "train.txt", "p00\np01\np02\np03\np04\n")


@pytest.mark.parametrize("change", [image_removed, image_added, mask_removed, list_changed])
def test_resume_with_a_changed_split(options, phantom, capsys, change):
    folder = Path(mean_teacher.main(options(data=phantom, steps=1))["folder"])
    split = json.loads((folder / "split.json").read_text())["digest"]
    change(phantom)
    error = resume_error(capsys, folder)
    assert f"has split {split}, the dataset now has" in error
    assert "Restore the dataset's files and lists" in error


def test_resume_with_a_changed_list_of_labelled_units(options, phantom, tmp_path, capsys):
    """The names in a row stay the same: only where the labelled ones end has changed."""
    mine = tmp_path / "mine.txt"
    mine.write_text("p00\np01\n")
    argv = options("--labeled", mine, data=phantom, steps=1)
    folder = Path(mean_teacher.main(argv)["folder"])
    mine.write_text("p00\n")
    assert "the dataset now has" in resume_error(capsys, folder)


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_resume_with_a_damaged_split(folder, capsys, content):
    (folder / "split.json").unlink()
    if content is not None:
        (folder / "split.json").write_bytes(content)
    assert "split.json" in resume_error(capsys, folder)


def class_added(root):
    for path in (root / "masks").iterdir():
        save(path, np.asarray(Image.open(path)) + np.eye(32) * 4)


def colours_added(root):
    for path in (root / "images").iterdir():
        save(path, np.stack([np.asarray(Image.open(path))] * 3, -1))


@pytest.mark.parametrize("change", [class_added, colours_added])
def test_resume_with_changed_pixels_that_the_networks_do_not_fit(options, phantom, capsys, change):
    folder = Path(mean_teacher.main(options(data=phantom, steps=1))["folder"])
    change(phantom)
    assert "--resume" in resume_error(capsys, folder)


def test_resume_from_the_start_with_a_changed_split_leaves_no_false_split_json(options, phantom):
    """Before the first checkpoint: refused, or started with the lists as they are now."""
    folder = Path(mean_teacher.main(options(data=phantom, steps=1))["folder"])
    (folder / "last.pt").unlink()
    list_changed(phantom)
    try:
        mean_teacher.main(["--resume", str(folder)])
    except SystemExit as stopped:
        assert stopped.code == 2
        return
    split = json.loads((folder / "split.json").read_text())
    assert split["digest"] == last_of(folder)["digest"]
