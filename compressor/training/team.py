"""The processes of one run that `torchrun` or `accelerate launch` started: the first one leads, the others follow.

The first process sends numbered messages through the launcher's key-value store, where the others look for the next
one. Waiting there costs no processor time, has no time limit and can be interrupted, unlike waiting in a collective
operation. Large states follow a message as a broadcast.

A process that fails notes its name in the store before its connections close, so that the others, whose collective
operations then fail as well, can name it.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from compressor.training.placement import Placement

POLL_SECONDS = 0.1
"""Time between two looks for a message."""


def launched() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) if no launcher started several.

    Raises:
        CompressorError: The launcher's environment variables are incomplete.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return 0, 1
    given = (world, os.environ.get("RANK", ""), os.environ.get("MASTER_PORT", ""))
    if not all(text.isdecimal() for text in given) or "MASTER_ADDR" not in os.environ:
        raise CompressorError(
            f"WORLD_SIZE is {world}, which asks for several processes, but RANK, MASTER_ADDR and MASTER_PORT do not "
            "belong to it.",
            "Start them with: torchrun --nproc_per_node 2 --no-python compress ...; or unset WORLD_SIZE.",
        )
    return int(given[1]), int(world)


@cache
def team() -> Team | None:
    """Return the processes of this launch, all connected; None for a single one. Each process has to call it.

    Raises:
        CompressorError: This machine has fewer GPUs than processes.
    """
    rank, world = launched()
    if world == 1:
        return None
    import torch
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from compressor.training.placement import place_together

    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < here:
        raise CompressorError(
            f"There are {here} processes on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}.",
            f"Start at most as many: --nproc_per_node {gpus}",
        )
    placed = place_together("cuda" if gpus else "cpu")
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
    )
    prefix = f"compressor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Team(rank, world, placed, PrefixStore(prefix, store))


@dataclass
class Team:
    """All processes of a launch, seen from one of them.

    Attributes:
        rank: Rank of this process; the first one, of rank 0, leads.
        world: Number of processes.
        current: What the others train at present.
    """

    rank: int
    world: int
    _placed: Placement
    _store: Store
    current: Any = None
    _messages: int = field(default=0)

    def tell(self, message: Mapping[str, Any], state: Any = None) -> None:
        """Send a message to all others.

        Args:
            message: JSON-compatible values.
            state: Nested dicts and lists of tensors and plain values; None for none.
        """
        content = None if state is None else _packed(state)
        size = None if content is None else content.numel()
        self._store.set(self._key("message"), json.dumps({"message": dict(message), "size": size}))
        self._messages += 1
        if content is not None:
            self._placed.spread(content)

    def hear(self) -> tuple[dict[str, Any], Any]:
        """Wait for the first process's next message; return it with its state."""
        import torch

        key = self._key("message")
        while not self._store.check([key]):
            time.sleep(POLL_SECONDS)
        found = json.loads(self._store.get(key))
        self._messages += 1
        state = None
        if found["size"] is not None:
            state = _unpacked(self._placed.spread(torch.empty(found["size"], dtype=torch.uint8)))
        return found["message"], state

    def ready(self) -> None:
        """Confirm the last message."""
        self._store.set(self._key(f"ready-{self.rank}"), "")

    def await_ready(self) -> None:
        """Wait until all others have confirmed the last message.

        Raises:
            CompressorError: One of them has failed.
        """
        keys = [self._key(f"ready-{rank}") for rank in range(1, self.world)]
        while not self._store.check(keys):
            if (who := self.failure()) is not None:
                raise CompressorError(f"{who} cannot take part.", "Its own message says why.")
            time.sleep(POLL_SECONDS)

    def failed(self) -> None:
        """Note that this process has failed."""
        with suppress(RuntimeError):  # the launcher is gone, too
            self._store.set("failure", self.name)

    def failure(self) -> str | None:
        """Return the name of another process that has failed; None if none has."""
        with suppress(RuntimeError):
            if self._store.check(["failure"]):
                return str(self._store.get("failure"), "utf-8")
        return None

    @property
    def name(self) -> str:
        """This process, for messages."""
        return f"Rank {self.rank} of {self.world}, on {socket.gethostname()}"

    def _key(self, kind: str) -> str:
        return f"{kind}-{self._messages}"


def is_lost(error: RuntimeError) -> bool:
    """Return whether an error says that the connection to another process was lost."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)


def _packed(state: Any) -> Any:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(content: Any) -> Any:
    import torch

    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
