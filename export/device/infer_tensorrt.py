"""A classifier's TensorRT engine as a function, for infer.py: it needs numpy, TensorRT and the CUDA driver."""

import sys
from ctypes import CDLL, byref, c_size_t, c_void_p
from typing import Any

import numpy as np


def network(path: str, how: Any) -> Any:
    """Return the network of an engine that this machine built: input -> scores of the classes.

    Args:
        path: The engine.
        how: Content of preprocess.json.
    """
    import tensorrt

    cuda, context = CDLL("libcuda.so.1"), c_void_p()

    def call(name: str, *arguments: Any) -> None:
        if getattr(cuda, name)(*arguments):
            sys.exit(f"The CUDA driver refused {name}.")

    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", byref(context), 0)
    call("cuCtxSetCurrent", context)
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    with open(path, "rb") as file:
        loaded = runtime.deserialize_cuda_engine(file.read())
    if loaded is None:
        sys.exit(f"{path} was built for another GPU or TensorRT: build it on this machine.")
    run = loaded.create_execution_context()
    places, order, named = [c_void_p(), c_void_p()], [0, 0], hasattr(run, "set_tensor_address")  # from 8.5 on
    for place, tensor in zip(places, (how["inputs"][0], how["outputs"][0])):
        call("cuMemAlloc_v2", byref(place), c_size_t(4 * int(np.prod(tensor["shape"]))))
        if named:
            run.set_tensor_address(tensor["name"], place.value)
        else:
            order[loaded.get_binding_index(tensor["name"])] = place.value or 0

    def scores(image: Any) -> Any:
        image = np.ascontiguousarray(np.repeat(image, how["inputs"][0]["shape"][0], 0))
        found = np.empty(how["outputs"][0]["shape"], dtype=np.float32)
        call("cuMemcpyHtoD_v2", places[0], c_void_p(image.ctypes.data), c_size_t(image.nbytes))
        if not (run.execute_async_v3(0) if named else run.execute_v2(order)):
            sys.exit(f"TensorRT cannot run {path}.")
        call("cuCtxSynchronize")
        call("cuMemcpyDtoH_v2", c_void_p(found.ctypes.data), places[1], c_size_t(found.nbytes))
        return found[0]

    return scores
