"""Stands for a GPU where there is none: tensors on it have a shape, a type and a device, and no
numbers.

    python benchmarks/fake_gpu.py -m pytest benchmarks/fake_cuda.py

It runs Python with such a GPU, and needs the CUDA build of PyTorch.

`FakeTensorMode` says what each operation of the CUDA build returns, and refuses those whose tensors
are on two devices. Autograd and autocast ask CUDA for a device and its streams first:
fixtures/fake_cuda.c answers. There is memory without end and there are no kernels, so that nothing
is said of what these compute, or when.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CHECKOUT = Path(__file__).resolve().parents[1]
LIBRARY = "libcuda.so.1"  # by which name PyTorch looks for the driver
GPU = torch.device("cuda", 0)
DEFAULT = "_default_to_fused_or_foreach"  # of PyTorch's optimizers
aten = torch.ops.aten
# Of optimizers and the gradient scaler: they change what they are given, and PyTorch does not know
# what they return.
CHANGING = (
    aten._fused_sgd_.default,
    aten._fused_adam_.default,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
    aten._amp_update_scale_.default,
)

# openings of names, beside views
NO_KERNEL = ("empty", "new_empty", "detach", "_reshape_alias", "_unsafe_view")


def is_there() -> bool:
    """Tell whether this process has the fake GPU."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


def main(arguments: list[str]) -> int:
    """Run Python with these arguments and the fake GPU; return its exit code.

    It needs the CUDA build of PyTorch for Linux, whose Triton brings CUDA's headers, and a C
    compiler.
    """
    if torch.version.cuda is None:
        sys.exit("error: this needs the CUDA build of PyTorch, see benchmarks/fake_cuda.py")
    headers = (
        Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / LIBRARY
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{headers}"]
        source = CHECKOUT / "benchmarks" / "fake_cuda.c"
        subprocess.run([*command, "-o", library, source], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, *arguments], env=environment).returncode


@dataclass(frozen=True)
class Wait:
    """What the host waits for the GPU for, and the lines of ours, the outermost first, that led
    there.
    """

    what: str
    lines: tuple[str, ...]


@dataclass
class Gpu(TorchDispatchMode):
    """Computes what is on the CPU, and of what is on the GPU only shapes.

    Attributes:
        answer: what every number is that comes to the host.
        launches: how many kernels the operations there are at the least.
        waits: in their order.
    """

    fake: FakeTensorMode
    answer: float = 1.0
    launches: int = 0
    waits: list[Wait] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def forget(self) -> None:
        """Count from 0 again."""
        self.launches = 0
        self.waits.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if function is torch.ops.prim.device.default:
            return function(*args)
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in tensors) or GPU.type in {
            leaf.type for leaf in leaves if isinstance(leaf, torch.device)
        }
        if not on_gpu:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        self._note_waiting(function, args, kwargs)
        if function is aten._local_scalar_dense.default:
            return self.answer
        if (
            function is aten._to_copy.default
            and torch.device(kwargs.get("device") or GPU).type == "cpu"
        ):
            with unset_fake_temporarily():
                return torch.full(
                    args[0].shape, self.answer, dtype=kwargs.get("dtype") or args[0].dtype
                )
        if function in CHANGING:
            assert {tensor.device for tensor in tensors} == {GPU}, (
                f"{function}: {[t.device for t in tensors]}"
            )
            results = args[0] if function is aten._amp_update_scale_.default else None
        else:
            results = function(*tree_map_only(torch.Tensor, self._faked, args), **kwargs)
        if not (function.is_view or function.__name__.startswith(NO_KERNEL)):
            # of image, weight and bias
            self.launches += sum(args[-1]) if function is aten.convolution_backward.default else 1
        return results

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _note_waiting(self, function, args, kwargs) -> None:
        if function is aten._local_scalar_dense.default:
            what = "a number"
        elif function is aten.copy_.default:
            what = _waiting_copy(
                args[1].device, args[0].device, args[2] if len(args) > 2 else False
            )
        elif function is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            what = _waiting_copy(args[0].device, target, kwargs.get("non_blocking", False))
        # how large their results are, is a number
        elif function in (aten.nonzero.default, aten.bincount.default):
            what = f"the size of {function.__name__.split('.')[0]}"
        else:
            return
        if what:
            places = ((Path(frame.filename), frame.lineno) for frame in traceback.extract_stack())
            ours = (
                f"{path.relative_to(CHECKOUT)}:{number}"
                for path, number in places
                if path.is_relative_to(CHECKOUT)
                and not path.is_relative_to(CHECKOUT / "benchmarks")
            )
            self.waits.append(Wait(what, tuple(ours)))


def _waiting_copy(source: torch.device, target: torch.device, non_blocking: bool) -> str | None:
    """Name a copy that the host waits for: to the host, or from it where it was not allowed to go
    on.
    """
    if source.type == target.type or (source.type == "cpu" and non_blocking):
        return None
    return f"a copy to the {'host' if target.type == 'cpu' else 'GPU'}"


class FromHost(TorchFunctionMode):
    """Brings Python's numbers to the GPU by way of tensors on the CPU, and not directly: those of
    lists.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (
            function is torch.Tensor.__getitem__
            and isinstance(args[0], FakeTensor)
            and isinstance(args[1], tuple)
        ):
            tensor, index = args
            places = (
                torch.tensor(place).to(GPU) if isinstance(place, list) else place for place in index
            )
            args = tensor, tuple(places)
        if function is torch.tensor and (device := (kwargs or {}).pop("device", None)):
            return torch.tensor(*args, **kwargs).to(device)
        return function(*args, **(kwargs or {}))


def _moved(network: nn.Module, device: torch.device) -> nn.Module:
    """Do `nn.Module.to` with new parameters: one with numbers cannot turn into one without."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device != device:
                new = made.get(id(weight)) or nn.Parameter(
                    weight.detach().to(device), weight.requires_grad
                )
                made[id(weight)] = module._parameters[name] = new
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    return network


@contextmanager
def a_gpu(answer: float = 1.0, free: int = 2**40) -> Iterator[Gpu]:
    """Let what asks for CUDA have the fake GPU, which says that it has ``free`` bytes."""
    # not as this file is run, from outside the checkout's path
    from dints.network.fast import layers

    fake, own = FakeTensorMode(allow_non_fake_inputs=True), torch.Generator()
    layers._doubling.cache_clear()  # of the fake GPU before
    with (
        mock.patch.object(torch.cuda, "_initialized", True),
        mock.patch.object(torch.cuda, "default_generators", (own,)),
        # CUDA's has its state on the GPU
        mock.patch.object(torch, "Generator", lambda _device=None: own),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (free, free)),
        mock.patch.object(nn.Module, "to", _moved),
        # What they choose on a GPU, for tensors of PyTorch's own kind.
        mock.patch.object(sys.modules["torch.optim.sgd"], DEFAULT, lambda *_, **__: (False, True)),
        mock.patch.object(sys.modules["torch.optim.adam"], DEFAULT, lambda *_, **__: (False, True)),
        fake,
        Gpu(fake, answer) as gpu,
        FromHost(),
    ):
        yield gpu


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
