"""The instruments of `bench_memory.py`: which bytes of tensors live during a training step, and which autograd saves.

`LiveBytes` sees every tensor that an operation gives, forward and backward, and when its storage dies; what a kernel
allocates and frees within itself it does not see. `allocator_peak` sees that too: what the allocator handed out.
"""

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
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
        operation: what gave it.
        part: of the step, as the measured code says (`LiveBytes.part`).
    """

    size: int
    shape: tuple[int, ...]
    operation: str
    part: str


class LiveBytes(TorchDispatchMode):
    """Records the births and deaths of storages while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "before"
        self.lives: list[Life] = []
        self.events: list[tuple[int, int]] = []  # +1 or -1, and the place in lives
        self._known: WeakIdKeyDictionary[Any, int] = WeakIdKeyDictionary()

    def add(self, tensors: Iterable[Tensor], operation: str) -> None:
        """Take tensors that live already, or have just been made."""
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
        """What is known of a tensor's storage."""
        place = self._known.get(tensor.untyped_storage())
        return None if place is None else self.lives[place]

    def peak(self, weight: Callable[[Life], int] = lambda _life: 1) -> int:
        """The most bytes that lived at once, each storage counted `weight` times."""
        alive = highest = 0
        for sign, place in self.events:
            alive += sign * weight(self.lives[place]) * self.lives[place].size
            highest = max(highest, alive)
        return highest

    def at_peak(self) -> list[Life]:
        """The storages that lived at the peak, largest first."""
        alive: set[int] = set()
        size = highest = 0
        then: set[int] = set()
        for sign, place in self.events:
            size += sign * self.lives[place].size
            (alive.add if sign > 0 else alive.discard)(place)
            if size > highest:
                highest, then = size, set(alive)
        return sorted((self.lives[place] for place in then), key=lambda life: -life.size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), str(func))
        return result


class SavedBytes:
    """Collects what autograd saves for backward, each storage once, by the part of the forward that saves it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.part = "prefix"
        self._tensors: list[Tensor] = []  # which also keeps their addresses from being used again
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._sizes: dict[str, dict[int, int]] = {"prefix": {}, "suffix": {}}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Pack hook of torch.autograd.graph.saved_tensors_hooks."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._ignored:
            self._tensors.append(tensor.detach())
            self._sizes[self.part][storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def __contains__(self, tensor: Tensor) -> bool:
        return any(self.holds(tensor, part) for part in self._sizes)

    def holds(self, tensor: Tensor, part: str) -> bool:
        """Whether a part saves this tensor's storage."""
        return tensor.untyped_storage().data_ptr() in self._sizes[part]

    def total(self, part: str | None = None) -> int:
        """Bytes that a part saves; by default both, what both save counted once."""
        if part is not None:
            return sum(self._sizes[part].values())
        return sum((self._sizes["prefix"] | self._sizes["suffix"]).values())


@contextlib.contextmanager
def saved_bytes(known: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Collect what is saved for backward in the block; the graph made there cannot be run backward."""
    saved = SavedBytes(known)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        yield saved


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
