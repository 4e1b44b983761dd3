"""An ONNX file as a torch module, so that what scores the network can score its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.convert.ort import input_types, open_session, padded, run_session
from export.convert.trees import moved, rebuilt, rows, tensors_in
from export.errors import ExportError


class OnnxModule(nn.Module):
    """Runs an ONNX file with ONNX Runtime, with the arguments and the result of the network that it was exported from.

    A file with a fixed batch runs once for each batch of that size, the last one padded with its last input.

    Args:
        path: The file.
        network: The network; it is run once for the structure of its result.
        example: Its positional arguments for one input.
        threads: Threads of ONNX Runtime; None for those of torch.
    """

    def __init__(
        self, path: str | Path, network: nn.Module, example: tuple[Any, ...], *, threads: int | None = None
    ) -> None:
        super().__init__()
        self.on_cpu = nn.Parameter(torch.zeros(1), requires_grad=False)  # users ask a network for its device
        self._session = open_session(path, threads=threads or torch.get_num_threads())
        self._types = input_types(self._session)
        first = self._session.get_inputs()[0].shape
        self._batch = first[0] if first and isinstance(first[0], int) else None
        device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
        with torch.no_grad():
            self._result = moved(network(*moved(example, device)), "cpu")

    def forward(self, *arguments: Any) -> Any:
        tensors = [tensor.detach().cpu() for tensor in tensors_in(arguments)]
        if len(tensors) != len(self._types):
            raise ExportError(f"The file takes {len(self._types)} tensors, got {len(tensors)}.")
        count = len(tensors[0])
        size = self._batch or count
        results = []
        for start in range(0, count, size):
            length = min(size, count - start)
            part = [each.numpy() for each in rows(tensors, count, slice(start, start + size))]
            if length < size:
                part = [
                    padded(each, size) if whole.dim() and len(whole) == count else each
                    for each, whole in zip(part, tensors)
                ]
            feeds = {name: each.astype(kind) for (name, kind), each in zip(self._types.items(), part)}
            found = [torch.from_numpy(value) for value in run_session(self._session, feeds)]
            results.append(rows(found, size, slice(length)))
        whole = [torch.cat(column) if column[0].dim() else column[0] for column in zip(*results)]
        return rebuilt(self._result, whole)
