"""An accelerator made of a CPU: strict about devices as CUDA is, and it counts how often the host has to wait for it.

Importing this registers the device ``simulated`` with torch, for the rest of the process. Tensors on it compute on the
CPU, so that results are the same to the last bit; but they do not mix with tensors of the CPU, nor do they become numpy
arrays, and whatever would make the host wait for CUDA is noted in ``waits``. What is copied to the host without waiting
is NaN there until the host synchronizes. Inside ``without_double()`` it knows no float64, as Apple's ``mps``.
"""

import collections
import contextlib
import functools
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

# What the host has to wait for: values that decide what it does next, or the size of what it allocates.
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave"}
WAITING |= {"_unique2", "unique_consecutive", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
COPYING = {"copy_", "_to_copy"}
FACTORIES = (
    "arange", "arange.start", "arange.start_step", "empty.memory_format", "empty_strided", "eye", "eye.m", "full",
    "linspace", "ones", "rand", "rand.generator", "randint", "randint.low", "randn", "randn.generator", "randperm",
    "randperm.generator", "scalar_tensor", "zeros",
)  # fmt: skip

waits = collections.Counter()  # where in the package the host waited, and for which operation: how often
_knows_double = [True]
_pending = []  # copies to the host that are under way, and what they bring


class Remote(torch.Tensor):
    """A tensor of the simulated device; ``near`` holds its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def data_ptr(self):
        return self.near.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            fresh = Remote(self.near.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(fresh, self.requires_grad) if _is_parameter(self) else fresh
        return memo[id(self)]


def _is_parameter(tensor):
    return isinstance(tensor, torch.nn.Parameter)


def compute(func, args, kwargs):
    """Run one operation on the CPU, as the device would, or refuse what it would refuse."""
    name = func._schema.name.partition("::")[2]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
    _refuse_mixed(name, args, tensors)
    _refuse_generator(kwargs.get("generator"))
    on_host = _target(name, args, kwargs) == "cpu"
    if name in WAITING or (on_host and _copies_now(name, args, kwargs)) or _chooses(name, args):
        waits[f"{_line()} {name}"] += 1
    if name in {"div", "div_"} and not isinstance(args[1], torch.Tensor) and args[0].is_floating_point():
        # By a number CUDA multiplies with its reciprocal; the last bit is not that of a CPU.
        func, args = (torch.ops.aten.mul, torch.ops.aten.mul_)[name == "div_"].Scalar, (args[0], 1 / args[1])
    with torch.no_grad():
        result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if on_host:
        result = args[0] if name == "copy_" else result
        return _under_way(result) if name in COPYING and not _copies_now(name, args, kwargs) else result
    _refuse_double(result)
    known = {id(tensor.near): tensor for tensor in remote}
    return tree_map(functools.partial(_remote, known), result)


def _near(value):
    if isinstance(value, Remote):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _remote(known, value):
    if not isinstance(value, torch.Tensor):
        return value
    return known[id(value)] if id(value) in known else Remote(value)


def _target(name, args, kwargs):
    """Where the result goes, if the call says it."""
    device = args[0].device if name == "copy_" else kwargs.get("device")
    return None if device is None else torch.device(device).type


def _copies_now(name, args, kwargs):
    """Tell whether it is a copy that the host waits for, and not one that it will synchronize with later."""
    return name in COPYING and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _under_way(copy):
    """Let what is copied arrive when the host synchronizes, and not before."""
    _pending.append((copy, copy.clone()))
    return copy.fill_(torch.nan if copy.is_floating_point() else 0)


def synchronize(device=None):
    """Wait for the device, as ``torch.accelerator.synchronize``, which has no streams to wait for here."""
    waits[f"{_line()} synchronize"] += 1
    while _pending:
        copy, values = _pending.pop()
        copy.copy_(values)


def _chooses(name, args):
    return name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])


def _refuse_generator(generator):
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


def _refuse_mixed(name, args, tensors):
    here = [tensor for tensor in tensors if not isinstance(tensor, Remote) and tensor.dim()]
    if name in INDEXING and isinstance(args[0], Remote):  # an index of the CPU is copied over
        here = [tensor for tensor in here if not any(tensor is index for index in args[1])]
    if here and len(here) < len(tensors) and name not in COPYING:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {DEVICE} and cpu in {name}")


@contextlib.contextmanager
def without_double():
    """Refuse tensors of float64."""
    _knows_double[:] = [False]
    try:
        yield
    finally:
        _knows_double[:] = [True]


def _refuse_double(result):
    double = (torch.float64, torch.complex128)
    if not _knows_double[0] and any(getattr(value, "dtype", None) in double for value in tree_flatten(result)[0]):
        raise TypeError("Cannot convert a simulated Tensor to float64 dtype as the device doesn't support float64")


def _line():
    """The innermost line of the package, as ``file.py:12``."""
    frame = sys._getframe()
    while frame is not None and "/disparse_plugin/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _copied(source, target, non_blocking=False):
    """What ``torch.tensor(..., device=...)`` calls, where no other operation is intercepted."""
    _near(target).copy_(_near(source))
    return target


def _factory(func, *args, **kwargs):
    return compute(func, args, {**kwargs, "pin_memory": False})


_kernels = torch.library.Library("aten", "IMPL")
for _full in FACTORIES:
    _name, _, _overload = _full.partition(".")
    _operation = getattr(getattr(torch.ops.aten, _name), _overload or "default")
    _kernels.impl(_full, functools.partial(_factory, _operation), "PrivateUse1")
_kernels.impl("_copy_from", _copied, "PrivateUse1")
torch.accelerator.synchronize = synchronize
