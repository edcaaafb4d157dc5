"""Whatever a user gets wrong ends before any training: exit status 2, a message that says what to do."""
import re
import shutil

import numpy as np
import pytest
from conftest import run_folder
from PIL import Image

import common
import mean_teacher


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


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


def bad_list(root):
    write(root / "mine.txt", "case01\nnobody\n")


CASES = [  # what is wrong, further options, what the message must say
    (no_folder, [], "no folder images.*no such folder"),
    (no_images_folder, [], "no folder images.*found: masks, pictures"),
    (no_images, [], r"no images in .*case00\.dcm"),
    (mask_without_image, [], r"1 masks have no image.*case03\.png"),
    (two_of_one_name, [], r"two files for case03: case03\.bmp and case03\.png"),
    (no_masks, [], "no validation units with masks are left: 0 units have masks"),
    (too_few_masks, [], "no test units with masks are left: 1 units"),
    (one_patient, [], "all 14 images belong to one patient, scan"),
    (unknown_id, [], r"val\.txt: 1 of 2 ids are not in the dataset: .*case99"),
    (overlapping_lists, [], r"case02: in train\.txt and in val\.txt"),
    (all_in_training, [], "no validation units with masks are left"),
    (empty_list, [], r"test\.txt: 0 of 0 ids.*at least one id"),
    (binary_list, [], r"test\.txt cannot be read as a text file of ids"),
    (truncated, [], r"3 bad files among the images(.|\n)*case03\.png(.|\n)*case05\.png(.|\n)*case07\.png"),
    (pages, [], r"case03\.tif: .*2 pages in a file; expected one file a slice"),
    (pickled, [], r"case03\.npy: cannot be used.*allow_pickle"),
    (not_finite, [], r"case03\.npy: .*not finite"),
    (masks_of_another_size, [], r"bad files among the masks(.|\n)*16 x 32 pixels, but its image has 32 x 32"),
    (odd_values, [], "mask values 0, 85, 170, 255; expected class numbers"),
    (coloured_masks, [], "a mask in colours"),
    (empty_masks, [], "background only"),
    (two_ways, [], "some masks are binary 0/255 .*others hold class numbers"),
    (grey_then_colour, [], r"case05\.png: in colour"),
    (bad_list, ["--labeled", "{root}/mine.txt"], r"mine\.txt: 1 of 2 ids are not in the dataset"),
    (damage_nothing, ["--labeled", "0.1"], "did you mean 10%"),
    (damage_nothing, ["--labeled", "0"], "a number of units from 1 to 10"),
    (damage_nothing, ["--labeled", "150%"], "up to 100%"),
    (damage_nothing, ["--labeled", "0%"], "above 0%"),
    (damage_nothing, ["--labeled", "11"], "from 1 to 10"),
    (damage_nothing, ["--labeled", "ten"], "or a text file of ids"),
    (damage_nothing, ["--size", "100"], "multiple of 16(.|\n)*Try 96 or 112"),
    (damage_nothing, ["--device", "tpu9"], "--device tpu9 cannot be used"),
    (damage_nothing, ["--precision", "fp16"], "fp16 needs a CUDA GPU"),
    (damage_nothing, ["--classes", "2"], "the masks hold class 2. Expected at least 3"),
    (damage_nothing, ["--steps", "0"], "at least 1 is needed"),
    (damage_nothing, ["--lr", "nan"], "at least 0 is needed"),
    (damage_nothing, ["--out", "{root}/train.png/x"], "cannot be written"),
    (damage_nothing, ["--cache", "{root}/train.png/x"], "--cache FOLDER"),
]


@pytest.mark.parametrize("damage, more, message", CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)])
def test_bad_input(damage, more, message, make_dataset, options, tmp_path, capsys):
    root = make_dataset()
    write(root / "train.png", "a file")
    damage(root)
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(options(root, *(m.format(root=root) for m in more)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error), error
    assert not list(tmp_path.glob("runs/*/*")), "no run folder is left behind"


def test_labeled_is_needed_where_all_images_have_masks(make_dataset, options, capsys):
    argv = options(make_dataset())
    cut = argv.index("--labeled")
    with pytest.raises(SystemExit):
        mean_teacher.main(argv[:cut] + argv[cut + 2:])
    assert "--labeled is needed" in capsys.readouterr().err


def test_resume_with_another_configuration(options, tmp_path, capsys):
    argv = options("phantom", steps=2)
    mean_teacher.main(argv)
    for change in (["--steps", "3"], ["--width", "6"], ["--weight", "3"]):
        with pytest.raises(SystemExit) as stopped:
            mean_teacher.main([*argv, *change, "--resume"])
        assert stopped.value.code == 2 and "there is mean_teacher-3-seed0" in capsys.readouterr().err
    (run_folder(tmp_path / "runs") / "split.json").write_text('{"hash": "other"}')
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main([*argv, "--resume"])
    assert stopped.value.code == 2 and "has split other" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1


def test_resume_of_seed_1_does_not_look_at_seed_10(options, capsys):
    mean_teacher.main(options("phantom", "--seed", "10", steps=2))
    mean_teacher.main(options("phantom", "--seed", "1", "--resume", steps=2))
    assert "no checkpoint yet, starting at step 0" in capsys.readouterr().out


def test_slices_of_a_volume_differ_in_size(make_dataset, options, capsys):
    root = make_dataset(units=6, slices=2)
    for path in root.glob("*/*_slice_01.png"):
        Image.open(path).resize((20, 20), Image.NEAREST).save(path)
    with pytest.raises(SystemExit) as stopped:
        mean_teacher.main(options(root))
    assert stopped.value.code == 2 and "differ in size" in capsys.readouterr().err


def test_at_most_ten_bad_files_are_named(make_dataset, options, capsys):
    root = make_dataset()
    for path in (root / "images").iterdir():
        path.write_text("nothing")
    with pytest.raises(SystemExit):
        mean_teacher.main(options(root))
    error = capsys.readouterr().err
    assert "14 bad files" in error and len(re.findall(r"case\d+\.png:", error)) == 10


def test_names_and_options_are_checked_before_anything_is_decoded(make_dataset, options, monkeypatch, capsys):
    monkeypatch.setattr(common, "read_pixels", lambda *a, **k: pytest.fail("an image was opened"))
    for more in (["--labeled", "0.1"], ["--size", "20"], ["--device", "tpu9"]):
        with pytest.raises(SystemExit):
            mean_teacher.main(options(make_dataset(name=more[1]), *more))


def test_commands_refuse_what_they_do_not_know(tmp_path, capsys):
    for argv in (["pedict"], ["phantom"], ["phantom", "--out", str(tmp_path)], ["check", "--data", str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            common.main(argv)
        assert stopped.value.code == 2
