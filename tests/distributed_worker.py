"""What each of two processes does for test_distributed.py, which judges what they record.

torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER
"""

import contextlib
import copy
import datetime
import os
import sys
import traceback
from pathlib import Path

import timm
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rblock_fx import DropSchedule, RBlockLoss, apply_rblock, describe, remove_rblock, set_drop_prob
from tests.oracles import recorded_masks

ROWS = 6
SITES = ["stages.1", "stages.2"]
CRITERION = RBlockLoss(alpha=0.1)


def plain_net(name="test_nfnet"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # timm starts the gains of residual branches, and biases, at 0
                parameter.normal_(0.5, 0.1)
    return model


def converted_net(drop_prob=0.0, name="test_nfnet", sites=SITES, **options):
    return apply_rblock(plain_net(name), sites, drop_prob=drop_prob, input_size=(3, 64, 64), **options)


def images(rank, step=0):
    """Six images and their labels: the share of one process in one step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(ROWS, 3, 64, 64, generator=generator)
    return x, torch.randint(5, (ROWS,), generator=generator)


def whole(tensor):
    """A tensor that FSDP2 has cut into shards, put together: a collective call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def rates(model):
    return {name: (mask.rate.item(), mask.gamma.item()) for name, mask in model.rblock.named_children()}


def masked_step(model, bare, x, seed):
    """A training step whose loss is no mean, so that every sample keeps its own gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    with recorded_masks(bare) as masks:
        output = model(x)
    output.square().sum().backward()
    return {"masks": dict(masks), "output": output.detach().clone(), "gradients": gradients(bare)}


def evaluate(model, x):
    model.eval()
    with torch.no_grad():
        outputs = [model(x), model(x)]
    model.train()
    return outputs


def data_parallel(rank, _folder):
    """torch's own DistributedDataParallel, which by default refuses parameters that a step left out."""
    found = {}
    x, y = images(rank)

    bare = converted_net()
    model = DistributedDataParallel(bare)
    CRITERION(model(x), y).backward()
    found["gradients at rate 0"] = gradients(bare)

    model.zero_grad()
    for part, (part_x, part_y) in enumerate(zip(x.chunk(3), y.chunk(3), strict=True)):
        with contextlib.nullcontext() if part == 2 else model.no_sync():
            (CRITERION(model(part_x), part_y) / 3).backward()
        if part == 1:
            found["gradients before they are shared"] = gradients(bare)
    found["accumulated gradients"] = gradients(bare)

    set_drop_prob(model, [0.5, 0.3])
    found["rates set"] = rates(bare)
    found["own seeds"] = masked_step(model, bare, x, seed=rank)
    found["rates after a step"] = rates(bare)
    found["buffers of masks"] = [name for name in buffers(bare) if "rblock" in name]
    found["one seed"] = masked_step(model, bare, x, seed=9)

    schedule = DropSchedule(model, 0.0, 0.4, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found["rates of the schedule"] = []
    for step in range(4):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
        found["rates of the schedule"].append(rates(bare)["stages_1"][0])
        schedule.step()
        if step == 0:
            found["keys"] = list(bare.state_dict())
    found["rates of the schedule"].append(rates(bare)["stages_1"][0])
    found["weights"] = weights(bare)
    found["evaluation"] = evaluate(model, x)

    prototype = converted_net(0.3)
    for options in ({"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        other = copy.deepcopy(prototype)
        wrapped = DistributedDataParallel(other, **options)
        for _ in range(2):
            step = masked_step(wrapped, other, x, seed=rank)
        found[str(options)] = step

    bare = converted_net(0.4, "test_resnet", ["layer2"], batch_norm="per_submodel")
    model = DistributedDataParallel(bare)
    found["batch norm"] = []
    for step in range(2):
        record = masked_step(model, bare, images(rank, step)[0], seed=10 * step + rank)
        found["batch norm"].append(record | {"buffers": buffers(bare)})
    return found


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """What nn.SyncBatchNorm computes on GPUs, of all processes' rows; that one takes no CPU tensors."""

    def forward(self, input):
        count = torch.distributed.get_world_size() * input.numel() / input.shape[1]
        sums = torch.stack((input.sum((0, 2, 3)), input.square().sum((0, 2, 3))))
        mean, square = torch.distributed.nn.functional.all_reduce(sums) / count
        variance = square - mean**2
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        shape = (1, -1, 1, 1)
        x = (input - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


def batch_norm_net(norm):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        norm(8),
        nn.Sigmoid(),
        nn.Conv2d(8, 6, 3),
        norm(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Linear(6, 5)).double().train()


def attempt(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def synchronised(rank, _folder):
    found = {}
    x = images(rank)[0][:, :, :8, :8].double()
    bare = apply_rblock(
        batch_norm_net(SynchronisedBatchNorm), ["0"], batch_norm="per_submodel", drop_prob=0.4, input_size=(3, 8, 8)
    )
    found["step"] = masked_step(DistributedDataParallel(bare), bare, x, seed=rank) | {"buffers": buffers(bare)}

    plain = convert_sync_batchnorm(plain_net("test_efficientnet"))
    x = images(rank)[0]
    found["plain"] = attempt(lambda: plain(x))
    for batch_norm in ("joint", "per_submodel"):
        model = convert_sync_batchnorm(plain_net("test_efficientnet"))
        options = {"batch_norm": batch_norm, "input_size": (3, 64, 64)}
        found[f"conversion {batch_norm}"] = attempt(lambda m=model, o=options: str(describe(apply_rblock(m, **o))))
        found[f"training {batch_norm}"] = attempt(lambda m=model: m(x))
    return found


def sharded(rank, _folder):
    """FSDP2, block by block: each stage, then the root."""
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    x, y = images(rank)

    def shard(model, blocks=("stem", *(f"stages.{i}" for i in range(4))), **options):
        for path in blocks:
            fully_shard(model.get_submodule(path), mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    model = shard(converted_net([0.5, 0.3]))
    found["local shares"] = {name: (p.to_local().numel(), p.numel()) for name, p in model.named_parameters()}
    found["keys"] = list(model.state_dict())
    found["step"] = masked_step(model, model, x, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    optimizer.step()
    found["weights"] = weights(model)
    found["second step"] = masked_step(model, model, x, seed=10 + rank)
    found["evaluation"] = evaluate(model, x)
    model.reshard()  # the root stays whole after a forward without a backward, and zero_grad() would miss its shards
    found["description"] = str(describe(model))

    set_drop_prob(model, 0.0)
    found["rates"] = rates(model)
    model.zero_grad()
    for part, (part_x, part_y) in enumerate(zip(x.chunk(3), y.chunk(3), strict=True)):
        model.set_requires_gradient_sync(part == 2)
        (CRITERION(model(part_x), part_y) / 3).backward()
    found["accumulated gradients"] = gradients(model)
    found["weights then"] = weights(model)

    finer = shard(converted_net([0.5, 0.3]), ["stem", "stages.1.0", "stages.2.0"])
    found["blocks inside the sites"] = masked_step(finer, finer, x, seed=rank)

    half = shard(converted_net(0.3), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["bfloat16"] = masked_step(half, half, x, seed=rank)
    found["bfloat16 rates"] = rates(half)

    norms = shard(
        converted_net(0.4, "test_resnet", ["layer2"], batch_norm="per_submodel"), ["layer1", "layer2", "layer3"]
    )
    found["batch norm"] = masked_step(norms, norms, x, seed=rank) | {"buffers": buffers(norms)}

    inside = shard(converted_net(0.3, sites=["stages.2.0"]))
    found["a sharded container"] = attempt(lambda: inside(x))
    found["removal"] = attempt(lambda: remove_rblock(inside))
    partly = plain_net()
    fully_shard(partly.stem, mesh=mesh)
    found["conversion of a part"] = attempt(lambda: apply_rblock(partly, SITES, input_size=(3, 64, 64)))
    return found


def accelerated(rank, folder):
    found = {}
    for precision in ("no", "bf16"):
        found[precision] = accelerated_in(precision, rank, folder / precision)
        AcceleratorState._reset_state()
        GradientState._reset_state()
    return found


def accelerated_in(precision, rank, folder):
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=3)
    found = {"processes": accelerator.num_processes}
    model = converted_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    both = torch.utils.data.ConcatDataset(torch.utils.data.TensorDataset(*images(process)) for process in range(2))
    loader = torch.utils.data.DataLoader(both, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    bare = accelerator.unwrap_model(model)
    found["wrapper"] = type(model).__name__
    found["batches"] = 0
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(CRITERION(model(x), y))
            if accelerator.sync_gradients:
                found["accumulated gradients"] = gradients(bare)
        found["batches"] += 1

    set_drop_prob(model, [0.5, 0.3])
    set_seed(3, device_specific=True)
    x, y = images(rank)

    def step():
        with recorded_masks(accelerator.unwrap_model(model)) as masks:
            loss = CRITERION(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item(), "masks": dict(masks), "weights": weights(bare)}

    optimizer.zero_grad()
    accelerator.save_state(folder / "state")
    found["steps"] = [step(), step()]
    accelerator.load_state(folder / "state")
    found["steps again"] = [step(), step()]
    found["rates"] = rates(bare)

    found["evaluation"] = evaluate(model, x)
    found["keys"] = list(accelerator.get_state_dict(model))
    found["gathered"] = accelerator.gather_for_metrics(found["evaluation"][0])
    accelerator.save_model(model, folder / "weights")
    found["weights"] = weights(bare)
    model.train()
    found["training rows"] = model(x).shape[0]
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found["unwrapped"] = evaluate(unwrapped, x)
    found["removed"] = evaluate(remove_rblock(unwrapped), x)
    found["class after removal"] = type(unwrapped).__name__
    accelerator.wait_for_everyone()
    return found


SCENARIOS = (data_parallel, synchronised, sharded, accelerated)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {"world_size": torch.distributed.get_world_size()}
    for scenario in SCENARIOS:
        try:
            found[scenario.__name__] = scenario(rank, folder)
        except Exception:
            found[scenario.__name__] = traceback.format_exc()
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
