"""Several trainers that improve one policy: each works on a part of the rows, and the gradients are averaged.

They talk over torch.distributed with gloo: on loopback, or between nodes on the interface that dray has chosen.
Rank 0 opens the rendezvous on a port that it keeps, and dray hands its address to the others. A trainer alone
exchanges nothing.
"""

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from dray.jobs import PolicyGroup, ReplicaContext

PATIENCE = timedelta(minutes=5)  # rank 0 evaluates while the others wait for the next step


class Ranks:
    """The place of this trainer among the `group` of its `ReplicaContext`."""

    def __init__(self, context: "ReplicaContext") -> None:
        group = context.group
        self.first = group.rank == 0
        self._size = group.size
        # The ranks that are given the same episodes share the rows among them.
        self._place, self._sharing = group.rank % group.readers, group.readers
        if self._size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # on several nodes dray has set it
            store = _rendezvous(group, context.address)
            distributed.init_process_group(
                "gloo", store=store, rank=group.rank, world_size=group.size, timeout=PATIENCE
            )

    def minibatches(self, order: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
        """This rank's share of the rows in `order`, in as many pieces as every other rank has.

        Together, the pieces of all ranks have about `size` rows.
        """
        if self._size == 1:
            return [order[start : start + size] for start in range(0, len(order), size)]
        rows = order[self._place :: self._sharing]
        pieces = torch.tensor(ceil(len(rows) * self._size / size))
        distributed.all_reduce(pieces, distributed.ReduceOp.MAX)
        return rows.tensor_split(int(pieces))

    def average_gradients(self, parameters: Sequence[torch.Tensor], rows: int) -> None:
        """Replace the gradients of all ranks by their mean, in which each counts by its `rows`."""
        if self._size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() * rows for gradient in gradients), torch.tensor([float(rows)])])
        distributed.all_reduce(flat)
        start = 0
        for gradient in gradients:
            end = start + gradient.numel()
            gradient.copy_((flat[start:end] / flat[-1]).view_as(gradient))
            start = end


def _rendezvous(group: "PolicyGroup", address: str) -> Any:
    """The store through which gloo's ends find each other."""
    if group.rank:
        host, port = group.share(None).split(":")
        return TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
    # Bound here, so that it listens on this address only; the port stays ours from here on.
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        store = TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=PATIENCE,
            master_listen_fd=listener.detach(),
        )
    group.share(f"{address}:{port}")
    return store
