"""Every method on a pretended GPU, so that an operation on tensors of both devices fails here too.

torch lets a backend be written in Python (its PrivateUse1 hook). A tensor on ours, the device
"pretend", holds a CPU tensor, with which everything is computed, so values are real. But as on a
GPU, no operation may mix tensors of two devices, except for copies, CPU scalars and CPU indices.
"""
import functools

import pytest
import torch
from conftest import METHODS, equal, last_of, main_of
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import common

backend = pytest.importorskip("torch.utils.backend_registration")
if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no hook for backends in Python", allow_module_level=True)

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # read from one device, write to the other
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class DeviceModule(backend._DummyBackendModule):
    """torch.pretend, as torch.cuda is for CUDA."""

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]


backend._setup_privateuseone_for_python_backend("pretend", DeviceModule())


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `inner` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
            storage_offset=inner.storage_offset(), device="pretend:0")

    def __init__(self, inner):
        self.inner = inner

    def __reduce_ex__(self, protocol):  # for checkpoints and deep copies
        return self.inner.clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = OnDevice(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Inside it, also what takes no tensor can be made on the device: torch.rand(2, device=...)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@functools.cache
def touches_its_arguments(func):
    """Does an operation return a view of an argument, or write into one?"""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def to_inner(value):
    return value.inner if isinstance(value, OnDevice) else value


def to_device(value):
    if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
        return OnDevice(value)
    return value


def refuse_two_devices(func, tensors, first):
    """What a GPU would refuse: operands of both devices."""
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    on_cpu = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    if not ours or not on_cpu or func in COPIES:
        return
    if func in INDEXING and isinstance(first, OnDevice):
        return
    shapes = [(t.device.type, tuple(t.shape)) for t in tensors]
    raise RuntimeError(f"tensors on two devices in {func}: {shapes}")


def compute(func, args, kwargs):
    """Do an operation with the CPU tensors; what it returns is on the device if that was asked."""
    values, form = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    any_ours = any(isinstance(tensor, OnDevice) for tensor in tensors)
    refuse_two_devices(func, tensors, args[0] if args else None)
    inner_args, inner_kwargs = tree_unflatten([to_inner(value) for value in values], form)
    on_device = any_ours
    if func is aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == "pretend"
        inner_kwargs = inner_kwargs | {"device": "cpu"}
    result = func(*inner_args, **inner_kwargs)
    if on_device:
        result = tree_map(to_device, result)
    if any_ours and touches_its_arguments(func):
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def on_device(values):
    return torch.tensor(values).to("pretend")


def test_it_computes_and_stays_on_its_device():
    with Pretend():
        x = on_device([1.0, 2.0, 3.0])
        y = 2 * x + torch.tensor(1.0)  # a scalar may come from the CPU
        assert y.device.type == "pretend" and y.cpu().device.type == "cpu"
        assert y.cpu().tolist() == [3, 5, 7]
        assert x[torch.tensor([2, 0])].cpu().tolist() == [3, 1]  # and so may an index


def cpu_index(x):
    return x.gather(0, torch.tensor([0, 1]))


def cpu_mask(x):
    return x.masked_fill(torch.tensor([True, False, True]), 0.0)


def cpu_constant(x):
    return x * torch.tensor([1.0, 2.0, 3.0])


def device_index_of_a_cpu_tensor(x):
    return torch.arange(3)[x.long() - 1]


def cpu_one_hot_target(x):
    return torch.nn.functional.mse_loss(x, torch.zeros(3))


@pytest.mark.parametrize("mistake", [cpu_index, cpu_mask, cpu_constant, cpu_one_hot_target,
                                     device_index_of_a_cpu_tensor])
def test_it_refuses_what_a_gpu_refuses(mistake):
    with Pretend(), pytest.raises(RuntimeError, match="two devices"):
        mistake(on_device([1.0, 2.0, 3.0]))


class Killed(Exception):
    pass


def run_in_two_parts(method, argv, monkeypatch):
    """A run that is killed after the validation in its middle, and resumed; its folder."""
    save = common.Run.save

    def save_and_die(run, step):
        save(run, step)
        if step + 1 == 2:
            raise Killed(run.folder)
    monkeypatch.setattr(common.Run, "save", save_and_die)
    with pytest.raises(Killed) as killed:
        main_of(method)(argv)
    monkeypatch.setattr(common.Run, "save", save)
    folder = killed.value.args[0]
    main_of(method)(["--resume", str(folder)])
    return folder


ONE_FAST = [name if name == "mean_teacher" else pytest.param(name, marks=pytest.mark.slow)
            for name in METHODS]


@pytest.mark.parametrize("method", ONE_FAST)
def test_a_whole_run_mixes_no_devices(method, options, drawn, tmp_path, monkeypatch):
    """Training, validation, checkpoint, resume, pictures and predict; the numbers are the CPU's."""
    states = []
    for device in ("cpu", "pretend"):
        argv = options("--device", device, "--val-every", "2", steps=4, width=2, out=device)
        with Pretend():
            folder = run_in_two_parts(method, argv, monkeypatch)
            common.main(["predict", "--run", str(folder), "--device", device, "--images",
                         str(drawn / "images" / "p36_frame01_slice_01.png"),
                         "--out", str(tmp_path / f"{device}-masks")])
        states.append(last_of(folder))
    assert equal(states[0]["networks"], states[1]["networks"])
    masks = [(tmp_path / f"{device}-masks/masks/p36_frame01_slice_01.png").read_bytes()
             for device in ("cpu", "pretend")]
    assert masks[0] == masks[1]
