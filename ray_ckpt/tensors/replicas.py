"""Tensors that several ranks hold alike (HSDP, DDP): one of them reads, and gives to the others.

    mesh [2 replicas, 2 shards]     rank 0, 2 hold the first half of `w`, rank 1, 3 the second
    `w`                             rank 0 and 1 read their halves, 2 and 3 receive them
    `v`                             the other way round: the reading is spread over the replicas

Who reads what follows from names and placements alone, so that nobody has to be asked.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate


class Replicas:
    """Those of a flat state dict that this rank does not hold alone.

    With `is_far` the storage is so far away that a neighbour is always nearer; from a disk a tensor
    that is to lie in this host's memory is read by each rank: it is in the page cache by then.
    """

    def __init__(self, state_dict: Mapping[str, Any], *, is_far: bool) -> None:
        self._held = {
            name: value
            for name, value in sorted(state_dict.items())
            if isinstance(value, DTensor) and _can_be_given(value, is_far=is_far)
        }

    def reads(self, name: str) -> bool:
        """Whether this rank reads the tensor itself."""
        tensor = self._held.get(name)
        if tensor is None:
            return True
        coordinate = tensor.device_mesh.get_coordinate() or []
        return all(coordinate[dim] == giver for dim, giver in _givers(name, tensor))

    def give(self) -> None:
        """Every rank holds what the one that reads has read. Collective."""
        for name, tensor in self._held.items():
            local = tensor.to_local().detach().view(-1).view(torch.uint8)
            for dim, giver in _givers(name, tensor):
                group = tensor.device_mesh.get_group(dim)
                dist.broadcast(local, dist.get_global_rank(group, giver), group=group)


def _can_be_given(tensor: DTensor, *, is_far: bool) -> bool:
    """Whether it is worth it, and its group can carry memory of its device."""
    mesh, local = tensor.device_mesh, tensor.to_local()
    if mesh.get_coordinate() is None or not local.numel() or not local.is_contiguous():
        return False
    dims = list(_replicated(tensor))
    carries = f"{local.device.type}:"
    return (
        bool(dims)
        and (is_far or local.is_cuda)
        and all(carries in dist.get_backend_config(mesh.get_group(dim)) for dim in dims)
    )


def _givers(name: str, tensor: DTensor) -> Iterator[tuple[int, int]]:
    """Each dimension of the mesh along which copies lie, and who reads: its place there."""
    for dim in _replicated(tensor):
        yield dim, zlib.crc32(name.encode()) % tensor.device_mesh.size(dim)


def _replicated(tensor: DTensor) -> Iterator[int]:
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate) and tensor.device_mesh.size(dim) > 1:
            yield dim
