"""A device that is not the processor, without one: finds tensors that are forgotten on the processor.

Its tensors keep their values in memory and are computed with there, but say that they are elsewhere, and an
operation refuses tensors of both places as CUDA does. Reading a value is counted: on a GPU it waits for all
work before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A device that every build of torch knows and for which it computes nothing.
DEVICE = torch.device("meta")
_aten = torch.ops.aten
# Take tensors of both places.
_COPIES = {_aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_READINGS = {_aten._local_scalar_dense.default, _aten.nonzero.default}


class _There(Tensor):
    """A tensor of the device; `here` are its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "_There":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        raise AssertionError("outside of the device's mode")

    def tolist(self) -> Any:
        """Which torch refuses for subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.here!r})"


class _Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_readings = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = tree_flatten((args, kwargs or {}))[0]
        there = [one for one in leaves if isinstance(one, _There)]
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        assert all(isinstance(one, _There) or one.device != DEVICE for one in tensors), func
        self._check(func, args, tensors)
        wanted = next((one for one in leaves if isinstance(one, torch.device)), None)
        goes_there = bool(there) if wanted is None else wanted == DEVICE
        if there and (func in _READINGS or not goes_there):
            self.num_readings += 1
        plain_args, plain_kwargs = tree_map(_as_here, (args, kwargs or {}))
        found = func(*plain_args, **plain_kwargs)
        if not goes_there:
            return found
        mutated = {id(one.here): one for one in there}

        def put_there(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return mutated[id(one)] if id(one) in mutated else _There(one)

        return tree_map(put_there, found)

    def _check(self, func: Any, args: Sequence[Any], tensors: list[Tensor]) -> None:
        if func in _COPIES or not any(isinstance(one, _There) for one in tensors):
            return
        if func in _INDEXING:  # the indices may be on the processor
            tensors = [one for one in (args[0], *args[2:3]) if isinstance(one, Tensor)]
        is_whole = func in _INDEXING and not isinstance(args[0], _There)
        if is_whole or any(one.ndim for one in tensors if not isinstance(one, _There)):
            raise RuntimeError(
                f"{func}: all tensors should be on the same device, one is on the processor"
            )


def _as_here(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.here if isinstance(leaf, _There) else leaf


class _Literals(TorchFunctionMode):
    """Lists of numbers become tensors without an operation: in torch.tensor, and as an index."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], _There):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = [torch.tensor(one) if isinstance(one, list) else one for one in places]
            args = (args[0], tuple(tensors), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def another_device() -> Iterator[_Device]:
    """Inside, `DEVICE` computes."""
    device = _Device()
    with device, _Literals():
        yield device
