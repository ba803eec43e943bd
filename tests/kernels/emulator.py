"""As much of CuPy as `gpu.py` uses, on NumPy, with kernels compiled for the CPU by g++: see cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from treemem.kernels.gpu import SOURCE

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
KERNELS = ("walk", "scan", "score", "quantise")


class Array(np.ndarray):
    """An array on the pretended GPU."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        """What CuPy's arrays have: where they lie."""
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.__array_interface__)


class Pinned(bytearray):
    """The host's pinned memory."""

    @property
    def ptr(self) -> int:
        """Where it lies."""
        return ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self))


class Function:
    """A compiled kernel."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(
        self, grid: tuple[int, int], block: tuple[int], arguments: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        """Run all blocks, one after the other."""
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray) and argument.ndim:
                assert isinstance(argument, Array), "a kernel was given an array of the host"
                assert argument.flags.c_contiguous
                values.append(np.array(argument.data.ptr, np.uint64))
            else:
                assert isinstance(argument, np.generic), f"{argument!r} has no size in C"
                values.append(np.asarray(argument))
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self._run(*map(ctypes.c_uint, (*grid, *block, shared_mem)), addresses)


class Module:
    """Kernels compiled by g++."""

    def __init__(self, folder: Path, code: str) -> None:
        source = folder / "kernels.cpp"
        exports = "\n".join(f"EXPORT({name})" for name in KERNELS)
        source.write_text(f'#include "{HEADER}"\n{code}\n{exports}\n')
        library = folder / "kernels.so"
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
        subprocess.run(["g++", *options, "-o", str(library), str(source)], check=True)
        self._library = ctypes.PyDLL(str(library))  # one caller at a time: it holds the interpreter lock

    def get_function(self, name: str) -> Function:
        """One of them."""
        return Function(getattr(self._library, f"run_{name}"))


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return np.asarray(function(*arguments, **options)).view(Array)

    return call


def cupy(folder: Path, free: int) -> Any:
    """Something to be used in place of the module."""

    def asarray(array: Any) -> Any:
        # The host's arrays are copied, as they would be; those of the device are not.
        return array if isinstance(array, Array) else np.array(array).view(Array)

    def from_dlpack(array: Any) -> Any:
        # NumPy takes what lies on the host alone.
        host = SimpleNamespace(__dlpack__=lambda **_: array.__dlpack__(), __dlpack_device__=lambda: (1, 0))
        return np.from_dlpack(host).view(Array)

    modules: list[Module] = []

    @cache
    def kernel(name: str) -> Function:
        if not modules:
            modules.append(Module(folder, SOURCE.read_text("utf-8")))
        return modules[0].get_function(name)

    names = ("empty", "full", "sort", "where", "isfinite", "argwhere")
    return SimpleNamespace(
        kernel=kernel,
        asarray=asarray,
        from_dlpack=from_dlpack,
        asnumpy=lambda array: np.array(array),
        ascontiguousarray=lambda array, kind: np.ascontiguousarray(array, kind).view(Array),
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 227 << 10}),
            alloc_pinned_memory=Pinned,
            runtime=SimpleNamespace(memGetInfo=lambda: (free, free)),
        ),
        **{name: _wrapped(getattr(np, name)) for name in names},
    )
