"""Every method on a real GPU, in each precision; skipped where there is none.

When a GPU can be had: pytest tests/test_gpu.py; python tests/tools/speed.py --device cuda
"""
import pytest
import torch
from conftest import METHODS, equal, last_of, main_of

import common

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def precisions():
    """fp32 and fp16 everywhere, bf16 where the GPU has it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
        return ["fp32", "fp16", "bf16"]
    return ["fp32", "fp16"]


@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run_and_its_resume(method, precision, options, drawn, tmp_path, monkeypatch):
    """Killed in the middle and resumed: the same steps, losses that are finite, masks predicted."""
    main, save = main_of(method), common.Run.save
    words = ["--device", "cuda", "--precision", precision, "--val-every", "20"]
    whole = main(options(*words, steps=40, width=8, out="whole"))

    def killed(run, step):
        save(run, step)
        if step + 1 == 20:
            raise KeyboardInterrupt
    monkeypatch.setattr(common.Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        main(options(*words, steps=40, width=8, out="parts"))
    monkeypatch.setattr(common.Run, "save", save)
    [folder] = (tmp_path / "parts").glob("*/*")
    parts = main(["--resume", str(folder)])
    a, b = last_of(tmp_path / whole["folder"]), last_of(folder)
    assert a["step"] == b["step"] == 40 and a["drawn"] == b["drawn"]
    assert equal(a["random"], b["random"])  # the same random numbers were drawn
    assert [row["step"] for row in a["rows"]] == [row["step"] for row in b["rows"]] == [20, 40]
    assert parts["args"]["precision"] == precision
    image = drawn / "images" / "p36_frame01_slice_01.png"
    common.main(["predict", "--run", str(folder), "--device", "cuda", "--images", str(image),
                 "--out", str(tmp_path / "out")])


def test_gpu_and_cpu_agree_at_first(options):
    """The first steps' losses, in fp32: the same batches and weights, other random views."""
    main, losses = main_of("mean_teacher"), []
    for device in ("cpu", "cuda"):
        results = main(options("--supervised", "--device", device, "--val-every", "1", steps=3,
                               out=device))
        rows = last_of(common.Path(results["folder"]))["rows"]
        losses.append([row["sup"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
