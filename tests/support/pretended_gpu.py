"""A GPU that is pretended: tensors that say `cuda` and hold their values on the CPU, so that device paths run anywhere.

Torch's FakeTensorMode carries devices without values: it cannot go through `.item()`, loops that end on data, or numpy,
and gives nothing to compare. Here every operator is run for real on the held values, after the check that a GPU would
make: two devices do not meet, but for scalars and indices that torch itself takes across. So a path on the pretended
GPU has to end with the values that it has on the CPU. Gradients do not flow through (autograd wants a real device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# What torch lets cross: copies, and indices on the CPU of what lies on a GPU.
_CROSSING = {"_to_copy", "copy_", "copy", "index", "index_put", "index_put_", "_index_put_impl_"}


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device("cuda", 0), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # what has parts is swapped by Module.to, not written into a CPU parameter

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], _: None, size: Any, stride: Any) -> OnGpu:
        return OnGpu(parts["held"])

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy; use Tensor.cpu() to copy it to host first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # under it CUDA is not started when a tensor names it

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode leaves it whole; its parts are what a device runs
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, OnGpu) for t in tensors)
    name = func.__name__.split(".")[0]
    here = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if there and here and name not in _CROSSING:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, got cuda beside cpu {[tuple(t.shape) for t in here]}"
        )
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name in ("copy_", "index_put_", "_index_put_impl_", "index", "index_put"):
        there = isinstance(args[0], OnGpu)
    wrappers = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
            return value
        return wrappers[id(value)] if id(value) in wrappers else OnGpu(value) if there else value

    plain_args, plain_kwargs = tree_map(lambda t: t.held if isinstance(t, OnGpu) else t, (args, kwargs))
    return tree_map(wrap, _ONLY_ON_GPU.get(func, func)(*plain_args, **plain_kwargs))


_ONLY_ON_GPU: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
}


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """`device="cuda"` works in the block, also where there is none."""
    torch._C._ensureCUDADeviceGuardSet()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here and then moved
    try:
        with torch.backends.cudnn.flags(enabled=False), _Gpu():  # its kernels have no counterpart on the CPU
            yield torch.device("cuda", 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
