"""What each process of bench_scaling.py does: training steps of plain and R-Block models in turns, under Accelerate.

    torchrun --standalone --nproc_per_node 2 benchmarks/scaling_worker.py JOB.json RESULT.json

bench_scaling.py writes the job and reads the result, which the first process writes. A step is forward, loss, backward
(with the all-reduce of the gradients, where there are several processes) and the update. All processes start a step
together, and it takes as long as the slowest of them. Where there are several, every method is also timed "alone": the
same bare model in each process, which shares no gradients. What a step takes longer than that is communication; what
"alone" takes longer than one process did is contention for the machine.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.models.vgg import ConvMlp
from torch import nn

from rblock_fx import RBlockLoss, apply_rblock

Step = Callable[[], tuple[float, float]]  # gives the seconds of the step and, of these, of the update
Seconds = dict[str, list[list[float]]]  # (rounds, 2) per competitor


def build_model(name: str) -> nn.Module:
    """A timm model of 10 classes; `cifar_resnet18` has a 3x3 stem without pooling, `vgg11_bn` a head of 512 units."""
    model: Any = timm.create_model(name.removeprefix("cifar_"), num_classes=10)
    if name == "cifar_resnet18":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if name == "vgg11_bn":  # 22 M parameters instead of 129 M, of which this machine would hold six models
        model.pre_logits = ConvMlp(512, 512, kernel_size=7)
        model.head.fc = nn.Linear(512, 10)
    assert isinstance(model, nn.Module)
    return model


def main() -> None:
    """Time all cases of the job; the first process writes what was found."""
    job_path, result_path = map(pathlib.Path, sys.argv[1:])
    job = json.loads(job_path.read_text())
    accelerator = Accelerator(cpu=job["device"] == "cpu")
    torch.set_num_threads(job["threads"])  # Accelerate sets it too, to another value for one process than for two
    if accelerator.num_processes != job["processes"]:
        raise SystemExit(f"{job['processes']} processes were launched, Accelerate joined {accelerator.num_processes}")
    set_seed(job["seed"], device_specific=True)
    result = {
        "world_size": accelerator.num_processes,
        "ranks": gather_object([accelerator.process_index]),
        "distributed_type": str(accelerator.distributed_type.value),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "cases": {case["model"]: time_case(case, job["rounds"], accelerator) for case in job["cases"]},
    }
    if accelerator.is_main_process:
        result_path.write_text(json.dumps(result))
    accelerator.end_training()


def time_case(case: dict[str, Any], rounds: int, accelerator: Accelerator) -> Seconds:
    """The slowest process's seconds of every competitor in every round."""
    methods = {"plain": None} | case["selections"]
    steps = {method: training_step(case, sites, accelerator, shared=True) for method, sites in methods.items()}
    if accelerator.num_processes > 1:
        steps |= {
            f"{method}, alone": training_step(case, sites, accelerator, shared=False)
            for method, sites in methods.items()
        }
    mine = time_in_turns(steps, rounds, accelerator)
    per_process: list[Seconds] = gather_object([mine])
    return {
        name: [max(turns) for turns in zip(*(seconds[name] for seconds in per_process), strict=True)] for name in steps
    }


def training_step(case: dict[str, Any], sites: Any, accelerator: Accelerator, *, shared: bool) -> Step:
    """A training step of a plain model (sites None) or an R-Block model, with gradients shared or not."""
    size = (3, case["image"], case["image"])
    model = build_model(case["model"])
    if sites is not None:
        apply_rblock(model, sites, input_size=size)
    model.to(accelerator.device).train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if shared:
        model, optimizer = accelerator.prepare(model, optimizer)
        if accelerator.num_processes > 1:
            assert isinstance(model, nn.parallel.DistributedDataParallel), type(model)
    criterion = RBlockLoss()
    images = torch.randn(case["batch"], *size, device=accelerator.device)
    targets = torch.randint(10, (case["batch"],), device=accelerator.device)

    def step() -> tuple[float, float]:
        start = now(accelerator)
        loss = criterion(model(images), targets)
        accelerator.backward(loss)
        updated = now(accelerator)
        optimizer.step()
        optimizer.zero_grad()
        end = now(accelerator)
        return end - start, end - updated

    return step


def time_in_turns(steps: dict[str, Step], rounds: int, accelerator: Accelerator, warm_up: int = 2) -> Seconds:
    """Each round runs every competitor once, in rotated order; all processes begin a step together."""
    names = list(steps)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(-warm_up, rounds):  # DDP arranges its buckets anew after a model's first step
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            accelerator.wait_for_everyone()
            step, update = steps[name]()
            if turn >= 0:
                seconds[name].append([step, update])
    return seconds


def now(accelerator: Accelerator) -> float:
    """Seconds, once the device has done what it was told to."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
