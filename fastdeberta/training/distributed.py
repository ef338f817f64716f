"""Processes that share a run: who they are, what they add up, how they hold the model.

They are started by `torchrun` or `accelerate launch`, one for each device, and find one another by
the environment that both set. Here are torch's own DDP and FSDP2, without a launcher's wrapper
around model and optimiser: the losses are sums, divided by counts of all ranks and micro-batches.
"""

import atexit
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..models.encoder import Layer

# How long ranks wait for one that evaluates or writes; one that dies is noticed at once.
_PATIENCE = timedelta(hours=2)


class Ranks:
    """The processes of a run: this one is `rank` of `count`, on `device`.

    Raises:
        ValueError: no such device here.
    """

    def __init__(self, device: str):
        self.count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        self.rank = int(os.environ["RANK"]) if self.count > 1 else 0
        self.device = resolve_device(device)
        if self.count == 1:
            return
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # Objects and checkpoints go through the CPU.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(dist.destroy_process_group)

    @property
    def main(self) -> bool:
        """Whether this is the process that logs, shows progress and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's picklable object, on every rank."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.sum(torch.zeros(1))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does what the block says, and only then do the others: they find its files."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


def is_main() -> bool:
    """Whether this process is a run's only one or its rank 0; for what happens outside a run."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: no {name!r} here: {str(error).splitlines()[0]}") from None
    return device


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves every tensor of a (named) tuple, list or dict, however nested."""
    return _of_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: Any) -> Any:
    """The same, copied into memory from which a GPU reads on its own."""
    return _of_tensors(batch, Tensor.pin_memory)


def _of_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _of_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_of_tensors(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "NCCL", "onnection closed", "onnection reset")
    )


class Weighted(nn.Module):
    """A task's model, called for the loss: what is only logged is left without a gradient, of
    which DDP would wait for the share that never comes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any, factors: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of factor * term, float32, and the terms."""
        terms = self.model(batch)
        trained = [name for name in terms if factors[name]] or list(terms)
        loss = torch.stack([factors[name] * terms[name].float() for name in trained]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}


class Replica:
    """A whole model on every rank, whose gradients are averaged (DDP); one rank: the model.

    Attributes:
        model: holds the trained parameters. call: `Weighted`, whatever is around it.
    """

    call: nn.Module

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.model, self.call = model, Weighted(model)
        if ranks.count > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            # A stage of training may leave a network out.
            self.call = nn.parallel.DistributedDataParallel(
                self.call, device_ids=ids, find_unused_parameters=True
            )

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around a micro-batch: gradients are exchanged after the last one only."""
        if isinstance(self.call, nn.parallel.DistributedDataParallel) and not last:
            return self.call.no_sync()
        return nullcontext()


class Shards:
    """A model of which every rank holds a part (FSDP2).

    `whole`, on the CPU, is left as it was and gets the weights where they are needed whole: to be
    evaluated and exported on rank 0, or to be changed by a task.
    """

    def __init__(self, whole: nn.Module, ranks: Ranks):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.whole, self.ranks = whole, ranks
        self.model = copy.deepcopy(whole).to(ranks.device)
        self.call = Weighted(self.model)
        mesh = init_device_mesh(ranks.device.type, (ranks.count,))
        for layer in _own_layers(self.model):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around a micro-batch: gradients are exchanged after the last one only."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    @torch.no_grad()
    def gather(self, values: dict[str, Tensor] | None = None, everywhere: bool = False) -> None:
        """Copies the parameters, or `values` by their names, and the buffers into `whole`, on rank
        0 or on every rank."""
        targets = dict(self.whole.named_parameters())
        for name, parameter in self.model.named_parameters():
            full = whole_tensor((values or {}).get(name, parameter))
            if everywhere or self.ranks.main:
                targets[name].copy_(full)
        for ours, theirs in zip(self.whole.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)

    @torch.no_grad()
    def scatter(self) -> None:
        """Copies parameters and buffers from `whole`, which is the same on every rank."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        sources = dict(self.whole.named_parameters())
        for name, parameter in self.model.named_parameters():
            source = sources[name].to(self.ranks.device)
            if isinstance(parameter, DTensor):
                source = distribute_tensor(
                    source, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(source)
        for ours, theirs in zip(self.whole.buffers(), self.model.buffers(), strict=True):
            theirs.copy_(ours)

    def forget_frozen(self) -> None:
        """Drops the gradients of what is frozen in `whole`: shards are gathered into parameters
        that keep the requires_grad of their first step."""
        frozen = {name for name, p in self.whole.named_parameters() if not p.requires_grad}
        for name, parameter in self.model.named_parameters():
            if name in frozen:
                parameter.grad = None


def _own_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers that share no parameter with another part; others stay together."""
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return [m for m in layers if all(uses[id(p)] == 1 for p in m.parameters())]


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
