"""Record which tensors live during a training step, and which part of it saves them.

`LiveBytes` sees every tensor that an operation returns, forward and backward, and when its storage dies, but not the
buffers that a kernel allocates and frees internally. `allocator_peak` includes those.
"""

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclasses.dataclass
class Life:
    """One storage.

    Attributes:
        size: bytes.
        shape: of the tensor that it was first seen in.
        operation: the operation that made it.
        part: part of the step (`LiveBytes.part`) that made it.
    """

    size: int
    shape: tuple[int, ...]
    operation: str
    part: str


class LiveBytes(TorchDispatchMode):
    """Records the births and deaths of storages while it is active.

    Attributes:
        part: the part of the step that runs; set by the code that runs the step.
        lives: every storage seen.
        events: births (+1) and deaths (-1) with the storage's place in `lives`, in order.
        forward_events: number of events at the end of the forward, loss included; set like `part`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "before"
        self.lives: list[Life] = []
        self.events: list[tuple[int, int]] = []
        self.forward_events = 0
        self._known: Any = WeakIdKeyDictionary()

    def add(self, tensors: Iterable[Tensor], operation: str) -> None:
        """Record tensors that exist already or are new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            place = len(self.lives)
            self.lives.append(Life(storage.nbytes(), tuple(tensor.shape), operation, self.part))
            self.events.append((1, place))
            self._known[storage] = place
            weakref.finalize(storage, self.events.append, (-1, place)).atexit = False

    def life_of(self, tensor: Tensor) -> Life | None:
        """The record of a tensor's storage."""
        place = self._known.get(tensor.untyped_storage())
        return None if place is None else self.lives[place]

    def peak(self, weight: Callable[[Life], int] = lambda _life: 1) -> int:
        """The most bytes that lived at once, each storage counted `weight` times."""
        alive = highest = 0
        for sign, place in self.events:
            alive += sign * weight(self.lives[place]) * self.lives[place].size
            highest = max(highest, alive)
        return highest

    def alive_after(self, events: int) -> list[Life]:
        """The storages that lived after so many events, largest first."""
        alive: set[int] = set()
        for sign, place in self.events[:events]:
            (alive.add if sign > 0 else alive.discard)(place)
        return sorted((self.lives[place] for place in alive), key=lambda life: -life.size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), str(func))
        return result


class SavingParts:
    """Notes which part of the forward saves a tensor for backward; a pack hook of saved_tensors_hooks."""

    def __init__(self) -> None:
        self.part = "prefix"
        self._saved: list[tuple[str, Tensor]] = []  # the tensors, so that no address is used again

    def __call__(self, tensor: Tensor) -> Tensor:
        """Record a tensor, and pack it without its graph."""
        self._saved.append((self.part, tensor.detach()))
        return tensor.detach()

    def saving(self, tensor: Tensor) -> set[str]:
        """The parts that save this tensor's storage."""
        address = tensor.untyped_storage().data_ptr()
        return {part for part, saved in self._saved if saved.untyped_storage().data_ptr() == address}


def allocator_peak(call: Callable[[], object], device: str) -> int:
    """The most bytes that the allocator had handed out at once during a call, beyond those before it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    alive = highest = 0
    recorded = profile.profiler.kineto_results.events()
    for event in sorted((event for event in recorded if event.name() == "[memory]"), key=lambda one: one.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest
