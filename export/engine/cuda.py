"""The CUDA driver API through ctypes: device properties, memory, streams and events.

TensorRT's Python API does not copy data or measure time, and a Jetson has neither torch nor a CUDA package
for Python. The driver's library is always installed, and a dozen of its functions suffice.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from export.errors import ExportError

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MAJOR, _MINOR, _CLOCK_KHZ = 75, 76, 13
_NOT_READY = 600


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: The driver's name for it.
        compute_capability: Such as "8.7".
        memory: Bytes; on a Jetson the memory shared with the CPU.
        clock_mhz: Maximum clock of its cores.
        driver: Version of CUDA that the driver supports, such as "12.6".
    """

    name: str
    compute_capability: str
    memory: int
    clock_mhz: int
    driver: str

    @property
    def major(self) -> int:
        """The first number of the compute capability."""
        return int(self.compute_capability.split(".")[0])


class Driver:
    """The first GPU and its primary context, which is released on exit with everything that was allocated.

    Raises:
        ExportError: there is no driver or no GPU, or a call fails; the message names the call.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else _load()
        self._call("cuInit", 0)
        handle, self._context, self._before = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(handle), 0)
        self._device = handle
        self._held: list[tuple[str, int]] = []  # (call that frees it, handle), in the order of creation
        self._call("cuCtxGetCurrent", ctypes.byref(self._before))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self._open = True
        try:
            self._call("cuCtxSetCurrent", self._context)
        except ExportError:
            self.close()
            raise

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free memory, streams and events, and release the context; errors of these calls are ignored."""
        while self._held:
            name, handle = self._held.pop()
            getattr(self._library, name)(ctypes.c_void_p(handle))
        if self._open:
            self._open = False
            self._library.cuCtxSetCurrent(self._before)  # a released context must not stay current
            self._library.cuDevicePrimaryCtxRelease_v2(self._device)

    def _hold(self, free: str, handle: ctypes.c_void_p) -> int:
        self._held.append((free, int(handle.value or 0)))
        return self._held[-1][1]

    def _call(self, name: str, *arguments: Any, also: int = 0) -> int:
        """Call a function that returns 0, or `also`."""
        result = int(getattr(self._library, name)(*arguments))
        if result not in (0, also):
            raise ExportError(f"The GPU's driver refused {name}: error {result}{self._error_name(result)}.")
        return result

    def _error_name(self, result: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(result, ctypes.byref(text)) or not text.value:
            return ""
        return f" ({text.value.decode()})"

    def device(self) -> Device:
        """The properties of the GPU."""
        name, memory, version = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
        self._call("cuDeviceGetName", name, 256, self._device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return Device(
            name=name.value.decode(),
            compute_capability=f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}",
            memory=memory.value,
            clock_mhz=self._attribute(_CLOCK_KHZ) // 1000,
            driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def pci_bus_id(self) -> str:
        """The GPU's address on the PCI bus, by which NVML knows it."""
        text = ctypes.create_string_buffer(64)
        self._call("cuDeviceGetPCIBusId", text, 64, self._device)
        return text.value.decode()

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the GPU and return the address."""
        address = ctypes.c_void_p()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return self._hold("cuMemFree_v2", address)

    def upload(self, address: int, array: Any) -> None:
        """Copy a contiguous numpy array to the GPU."""
        self._call(
            "cuMemcpyHtoD_v2",
            ctypes.c_void_p(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
        )

    def download(self, array: Any, address: int) -> None:
        """Copy memory of the GPU to a contiguous numpy array."""
        self._call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_void_p(address),
            ctypes.c_size_t(array.nbytes),
        )

    def stream(self) -> int:
        """Create a stream."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), 1)  # CU_STREAM_NON_BLOCKING
        return self._hold("cuStreamDestroy_v2", handle)

    def synchronise(self, stream: int) -> None:
        """Wait until the work of the stream is finished."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """Create an event that records its time."""
        handle = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(handle), 0)
        return self._hold("cuEventDestroy_v2", handle)

    def record(self, event: int, stream: int) -> None:
        """Record the event in the stream."""
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def reached(self, event: int) -> bool:
        """Whether the stream has reached a recorded event."""
        return self._call("cuEventQuery", ctypes.c_void_p(event), also=_NOT_READY) == 0

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two completed events."""
        value = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(value), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return float(value.value)


def find_device() -> Device | None:
    """The first GPU, or None where there is no driver or no GPU."""
    try:
        with Driver() as driver:
            return driver.device()
    except ExportError:
        return None


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ExportError("No NVIDIA driver was found.", "Run this on a machine with an NVIDIA GPU and its driver.")
