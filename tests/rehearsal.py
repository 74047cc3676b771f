"""A rehearsed accelerator: tensors that claim to be on another device, hold CPU numbers, and record what a GPU would mind.

    with Rehearsal() as seen:
        ...                     # build and run with torch.device("meta")
    seen.mixed, seen.waits      # operations between devices; those for which the host waits: {place in the code: count}
"""

import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # CUDA's own name asks for a driver, even where nothing is computed on it
SCALARS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class There(torch.Tensor):
    """A tensor on the rehearsed device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {}) if Rehearsal.active is None else Rehearsal.active.call(func, args, kwargs or {})


class Rehearsal(TorchDispatchMode):
    active = None

    def __enter__(self):
        self.mixed, self.waits, Rehearsal.active = Counter(), Counter(), self
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.tensor, torch.tensor = torch.tensor, self.made  # the one factory that asks no dispatcher
        return super().__enter__()

    def made(self, values, *, device=None, **kwargs):
        tensor = self.tensor(values, **kwargs)
        return tensor if device is None else tensor.to(device)

    def __exit__(self, *error):
        Rehearsal.active, torch.tensor = None, self.tensor
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def call(self, func, args, kwargs):
        if func is torch.ops.prim.device.default:
            return DEVICE
        name, tensors = func.overloadpacket.__name__, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, There)]
        device = kwargs.get("device")
        target = torch.device(device).type if device is not None else None
        place = next((f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_stack()) if "ppo_ldm_sr" in f.filename), "library")
        if there and name not in ("copy_", "_to_copy") and any(t.dim() for t in tensors if not isinstance(t, There)):
            self.mixed[f"{name} at {place}"] += 1
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in there[1:])
        if there and (name in SCALARS or masks or target == "cpu"):
            self.waits[f"{name} at {place}"] += 1
        inner = lambda t: t.inner if isinstance(t, There) else t  # noqa: E731
        found = func(*tree_map(inner, args), **tree_map(inner, kwargs) | ({"device": "cpu"} if target else {}))
        if isinstance(found, torch.Tensor) and args and isinstance(args[0], There) and found is args[0].inner:
            return args[0]  # in place
        goes = isinstance(args[0], There) if name == "copy_" else target == "meta" or (there and target != "cpu")
        return tree_map(lambda t: There(t) if goes and isinstance(t, torch.Tensor) else t, found)
