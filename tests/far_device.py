"""A device beside the CPU, on machines without one, that is as strict as a GPU.

Tensors of the device "far" hold their values in an ordinary tensor that only this file reaches. As with a GPU, it is an
error to compute with tensors of both devices, to make a NumPy array of them, or to draw on one device with a generator
of the other. What makes the process wait for a GPU is noted: values that are read, shapes that depend on values, and
copies to and from the device that block.

It takes PyTorch's place for devices of others (PrivateUse1), so it is to be installed in a process of its own, which
has to leave by `os._exit`. `torch.inference_mode` is not supported.
"""

import contextlib
import functools
import gc
import traceback
from collections import Counter

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "far"
WAITS = Counter()
"""How often the process has waited for the device, by place."""

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.equal.default,
}


class Far(torch.Tensor):
    """A tensor of the device.

    Args:
        near: the same on the CPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Far({self.near!r})"

    def __getitem__(self, index):
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(_as_tensors(index), value)

    def tolist(self):
        _wait("tolist")
        return self.near.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu()")
        return self.cpu().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def untyped_storage(self):
        return self.near.untyped_storage()

    def storage(self):
        return self.near.storage()

    def data_ptr(self):
        return self.near.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = Far(self.near.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)]._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        near = self.near.detach()
        if isinstance(self, torch.nn.Parameter):
            near = torch.nn.Parameter(near, self.requires_grad)
        return near.__reduce_ex__(protocol)


class _Mode(TorchDispatchMode):
    """Takes part where no tensor of the device does: where one is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_GENERATORS = {}
"""Those of the device by address; they stay, so that no other one gets it."""


class _Generator(torch.Generator):
    """Generators of the device draw what those of the CPU draw."""

    def __new__(cls, device="cpu"):
        new = super().__new__(cls, "cpu")
        new.far = torch.device(device).type == NAME
        if new.far:
            _GENERATORS[new._cdata] = new
        return new

    @property
    def device(self):
        return torch.device(NAME, 0) if self.far else torch.device("cpu")


class _Backend(_DummyBackendModule):
    def device_count(self):
        return 1

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class FarAccelerator(Accelerator):
    """The device for the Trainer, as `accelerator="far"`."""

    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


# -- operations --------------------------------------------------------------------------------------------------------


def _near(value):
    return value.near if isinstance(value, Far) else value


def _far(value):
    plain = isinstance(value, torch.Tensor) and not isinstance(value, Far) and value.device.type == "cpu"
    return Far(value) if plain else value


def _is_far(device):
    return device is not None and torch.device(device).type == NAME


def _as_tensors(index):
    """An index in which lists are tensors of the device, which PyTorch makes of them without asking this file."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.tensor(index, device=NAME) if isinstance(index, list) else index


@functools.cache
def _written(func):
    """Numbers and names of the arguments that an operation writes to, with their marks in its schema."""
    arguments = enumerate(func._schema.arguments)
    return [(n, a.name, a.alias_info.before_set) for n, a in arguments if a.alias_info and a.alias_info.is_write]


def _run(func, args, kwargs):
    """An operation of any devices, on the CPU, after a look at where its tensors are."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    far = any(isinstance(value, Far) for value in tensors)
    asked = kwargs.get("device")
    to_far = far if asked is None else _is_far(asked)
    if far and func not in MOVES:
        _check_devices(func, args, tensors)
    _check_generator(func, args, kwargs, far or to_far)
    if far or to_far:
        _note_waits(func, args, kwargs, far, to_far)
    given = kwargs | {"device": torch.device("cpu")} if asked is not None and to_far else kwargs
    near_args, near_kwargs = tree_map(_near, (args, given))
    out = func(*near_args, **near_kwargs)
    written = _written(func)
    if not written or out is None:
        return tree_map(_far, out) if to_far else out
    values = {name: args[n] if n < len(args) else kwargs.get(name) for n, name, _ in written}
    for value in values.values():
        if isinstance(value, Far) and value.shape != value.near.shape:
            raise NotImplementedError(f"{func} changed a shape in place")
    if len(func._schema.returns) == 1:
        return next(iter(values.values()))
    outs = []
    for result, value in zip(func._schema.returns, out, strict=True):
        marks = result.alias_info.before_set if result.alias_info else set()
        own = next((values[name] for _, name, before in written if before & marks), None)
        outs.append(own if own is not None else _far(value) if to_far else value)
    return tuple(outs)


def _check_devices(func, args, tensors):
    lists = {id(part) for value in args if isinstance(value, (list, tuple)) for part in value if func not in INDEXED}
    # A number on the CPU may take part, but not as one of several tensors that are put together.
    others = [value for value in tensors if not isinstance(value, Far) and (value.ndim > 0 or id(value) in lists)]
    if func in INDEXED:  # an index may lie on the CPU, if what it is for does not
        others = [value for value in (args[0], *args[2:3]) if any(value is other for other in others)]
    if others:
        found = ", ".join(f"{value.device} {tuple(value.shape)} {value.dtype}" for value in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")


def _check_generator(func, args, kwargs, far):
    generator = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch._C.Generator)), None)
    if generator is not None and (generator._cdata in _GENERATORS) != far:
        raise RuntimeError(f"{func}: expected a generator of the device on which it draws")


def _note_waits(func, args, kwargs, far, to_far):
    index = args[1] if func in INDEXED else ()
    if func in READS or any(isinstance(v, torch.Tensor) and v.dtype == torch.bool for v in index):
        _wait(func.name())
    if func is aten._to_copy.default and far != to_far and not kwargs.get("non_blocking"):
        _wait("to the device" if to_far else "to the CPU")
    if func is aten.copy_.default and isinstance(args[0], Far) != isinstance(args[1], Far) and not any(args[2:3]):
        _wait("copy")


def _wait(what):
    """Note who waits: the innermost place that belongs neither to PyTorch nor to this file."""
    frames = (f for f in reversed(traceback.extract_stack()) if "/torch/" not in f.filename and f.filename != __file__)
    frame = next(frames)
    WAITS[f"{frame.filename.rpartition('/site-packages/')[2]}:{frame.lineno} {frame.line} ({what})"] += 1


# -- installation ------------------------------------------------------------------------------------------------------


def _made_here(make):
    """One of PyTorch's functions that make a tensor of data, which would not ask this file."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        device = kwargs.get("device")
        if device is None and not (args and isinstance(args[0], torch.Tensor)):
            contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
            device = contexts[-1].device if contexts else None
        if not _is_far(device) or (args and isinstance(args[0], Far)):
            return make(*args, **kwargs)
        needs_grad = kwargs.pop("requires_grad", False)
        return make(*args, **kwargs | {"device": "cpu"}).to(device).requires_grad_(needs_grad)

    return made


def _new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
    device = self.device if device is None else device
    return torch.tensor(data, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)


def _stft(stft):
    """`torch.stft` in single steps; its own code changes the shape of a tensor in place, behind this file's back."""

    @functools.wraps(stft)
    def stepwise(input, n_fft, hop_length=None, win_length=None, window=None, center=True, pad_mode="reflect", **more):
        if not isinstance(input, Far):
            return stft(input, n_fft, hop_length, win_length, window, center, pad_mode, **more)
        assert win_length in (None, n_fft)
        assert more == {"return_complex": True}
        rows = input if input.ndim == 2 else input[None]
        if center:
            rows = torch.nn.functional.pad(rows[:, None], (n_fft // 2, n_fft // 2), mode=pad_mode)[:, 0]
        frames = rows.unfold(-1, n_fft, hop_length or n_fft // 4)
        spectrum = torch.fft.rfft(frames if window is None else frames * window).mT
        return spectrum if input.ndim == 2 else spectrum[0]

    return stepwise


def install():
    """Have the device in this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch.autograd.set_multithreading_enabled(False)  # no thread of its own for the device, in which Python might abort
    torch.__future__.set_swap_module_params_on_conversion(True)  # else parameters that are tied would part
    torch.Generator = _Generator
    torch.Tensor.new_tensor = _new_tensor
    torch.stft = _stft(torch.stft)
    for name in ("tensor", "as_tensor", "asarray", "scalar_tensor"):
        setattr(torch, name, _made_here(getattr(torch, name)))
    apply, inside = torch.nn.Module._apply, []

    def collected(self, fn, recurse=True):
        if not inside:
            gc.collect()  # graphs and tensors of this kind refer to each other, and so outlive their use
        inside.append(self)
        try:
            return apply(self, fn, recurse)
        finally:
            inside.pop()

    torch.nn.Module._apply = collected
    AcceleratorRegistry.register(NAME, FarAccelerator)
    choose = _AcceleratorConnector._choose_strategy

    def chosen(self):
        return SingleDeviceStrategy(torch.device(NAME, 0)) if self._accelerator_flag == NAME else choose(self)

    _AcceleratorConnector._choose_strategy = chosen
    _Mode().__enter__()


@contextlib.contextmanager
def watched(waits):
    """Add what the process waits for meanwhile to a counter."""
    before = Counter(WAITS)
    try:
        yield
    finally:
        waits.update(WAITS - before)
