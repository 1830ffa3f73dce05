"""What every rank runs under torchrun: ``torchrun sharded_worker.py SCENARIOS FOLDER``; one result file each."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import prune

from disparse_plugin import TaskScores, disparse_static, fold, prunable_parameters, score_tasks, sparsity_report
from disparse_plugin._support.shards import beside, local, part_here, whole
from disparse_plugin.masks import attach_masks, load_masks, save_masks
from disparse_plugin.masks.attach import masks_of
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import square_losses, vectors
from rank_results import write_results

shards_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason=f"needs a torch whose fully_shard runs on CPUs, found {torch.__version__}",
)

STEPS = 3
SIZE = 4
TENSOR_PARALLEL_WIDTH = 8  # torch asks for even parts there
ARBITERS = ["unanimous", "any", "mean", "majority", "at_least(2)", "sum"]
RECOMMENDED = "layer_adaptive(damped(taylor, 0.25))"
FOLDER = Path()


class Net(nn.Module):
    """Two tasks; layers with fewer rows than ranks, rows that no number of ranks divides, and one of task a alone."""

    def __init__(self, width):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 9), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(9, 3), "b": nn.Linear(9, 1)})
        self.own = nn.Linear(5, 3)

    def forward(self, x):
        features = self.trunk(x)
        return {"a": self.heads["a"](features) + self.own(x), "b": self.heads["b"](features)}


def net(width=7):
    torch.manual_seed(0)
    return Net(width).double()


def joined_batches(ranks, steps=STEPS):
    """The batches of one process: what all ranks have in one step, together."""
    return [batch.double() for batch in vectors(steps, SIZE * ranks)]


def batches_of(rank, ranks, steps=STEPS):
    return [batch.chunk(ranks)[rank] for batch in joined_batches(ranks, steps)]


def sharded(ranks, *, whole_layers=False):
    """Sharded by layers and as a whole; ``whole_layers`` leaves the layer of task a alone as it is."""
    model = net()
    mesh = init_device_mesh("cpu", (ranks,))
    options = {"ignored_params": set(model.own.parameters())} if whole_layers else {}
    for layer in (model.trunk[0], model.trunk[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    return model


def with_tensor_parallel(ranks):
    """The trunk split by columns, then rows, over two ranks; with four, sharded over the other two as well."""
    model = net(TENSOR_PARALLEL_WIDTH)
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model.trunk, mesh["tensor"], plan)
    if ranks > 2:
        fully_shard(model, mesh=mesh["data"])
    return model


def named(scores, table):
    pairs = zip(scores.parameters, scores.names, strict=True)
    return {name: whole(table[key]) for key, name in pairs if key in table}


def asked(scores):
    """Everything that is asked of scores."""
    return {
        "scores": {task: named(scores, scores[task]) for task in scores},
        "masks": {arbiter: named(scores, scores.masks(0.6, arbiter)) for arbiter in ARBITERS},
        "min_keep": named(scores, scores.masks(0.8, min_keep=2)),
        "parts": named(scores, scores.masks({"shared": 0.5, "a": 0.3, "b": 0.7})),
        "importance": named(scores, scores.importance(min_keep=1)),
        "tasks": [scores.tasks_reaching(*key) for key in scores.parameters],
    }


def score(rank, ranks):
    return asked(score_tasks(sharded(ranks), square_losses, batches_of(rank, ranks)))


def hybrid(rank, ranks):
    """Two shards of everything, and with four ranks two copies of each (HSDP)."""
    model = net()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("copies", "shards"))
    for layer in (model.trunk[0], model.trunk[2], model):
        fully_shard(layer, mesh=mesh)
    return asked(score_tasks(model, square_losses, batches_of(rank, ranks)))


def half(rank, ranks):
    """Weights kept in full precision that are multiplied in bfloat16, and gradients added up in float32."""
    model, policy = net().float(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), mp_policy=policy)
    batches = [batch.float() for batch in batches_of(rank, ranks)]
    return asked(score_tasks(model, square_losses, batches))


def rounded(rank, ranks):
    """Scores kept in bfloat16, a task at a time."""
    options = {"dtype": torch.bfloat16, "tasks_at_once": 1}
    return asked(score_tasks(sharded(ranks), square_losses, batches_of(rank, ranks), **options))


def recommended(rank, ranks):
    """The criterion of trained weights, whose shares are sums over whole layers; some weights are pruned already."""
    model = sharded(ranks)
    disparse_static(model, square_losses, batches_of(rank, ranks), 0.3)
    return asked(score_tasks(model, square_losses, batches_of(rank, ranks), criterion=RECOMMENDED))


def stale(rank, ranks):
    """Shares made before masks that another rule has put on."""
    model = sharded(ranks)
    scores = score_tasks(model, square_losses, batches_of(rank, ranks), criterion=RECOMMENDED)
    disparse_static(model, square_losses, batches_of(rank, ranks), 0.4, criterion="gradient")
    return asked(scores)


def mixed(rank, ranks):
    """Some weights are whole on every rank."""
    return asked(score_tasks(sharded(ranks, whole_layers=True), square_losses, batches_of(rank, ranks)))


def tensor_parallel(rank, ranks):
    model = with_tensor_parallel(ranks)
    batches = batches_of(rank // 2, ranks // 2)  # ranks that share a layer see the same
    return asked(score_tasks(model, square_losses, batches))


def ties(rank, ranks):
    """Scores given from outside, the same for many weights: magnitudes and places decide."""
    model = sharded(ranks)
    return asked(tied_scores(model))


def tied_scores(model):
    """Whole numbers as scores and, in many places, equal magnitudes; spread as the weights are."""
    keys = prunable_parameters(model)
    tables = {}
    for number, task in enumerate("ab"):
        generator = torch.Generator().manual_seed(number)
        tables[task] = {}
        for key in keys[: len(keys) - number]:
            weight = key[0].weight
            drawn = torch.randint(3, weight.shape, generator=generator).double()
            tables[task][key] = beside(part_here(drawn, weight).clone(), weight)
    with torch.no_grad():
        for module, _ in keys:
            local(module.weight).copy_(local(module.weight).mul(4).round())
    return TaskScores(model, tables)


def one_shot(rank, ranks):
    """Prune, report, write, and train on: what is masked stays 0."""
    model = sharded(ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scores = disparse_static(model, square_losses, batches_of(rank, ranks), 0.5)
    report = sparsity_report(model, scores)
    save_masks(model, FOLDER / "masks.safetensors", facts={"amount": 0.5})
    for batch in batches_of(rank, ranks, 2):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
    return {
        "masks": {name: whole(mask) for name, mask in masks_of(model).items()},
        "report": report.to_dict(),
        "weights": {name: whole(weight.detach()) for name, weight in model.named_parameters()},
        "pruned": prune.is_pruned(model),
    }


def trained(model, batches, kind="dynamic", steps=30, **more):
    """Sparse training; also what was reported, and how many weights were alive on the way."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "gradual":
        options = {"amount": 0.6, "update_every": 5, "stop_at": steps, **more}
        pruning = GradualPruning(model, optimizer, square_losses, **options)
    else:
        amount = {} if "pattern" in more else {"amount": 0.5}
        options = {**amount, "update_every": 3, "stop_at": steps + 1, **more}
        pruning = DiSparseScheduler(model, optimizer, square_losses, **options)
    reports, alive = [], []
    for batch in batches:
        train(model, optimizer, pruning, batch, reports)
        alive.append(sum(int(whole(mask).sum()) for mask in masks_of(model).values()))
    return model, optimizer, pruning, [report for report in reports if report is not None], alive


def train(model, optimizer, scheduler, batch, reports):
    optimizer.zero_grad()
    sum(square_losses(model, batch).values()).backward()
    optimizer.step()
    reports.append(scheduler.step(batch))


def run_of(rank, ranks, kind, **options):
    model, _, _, reports, alive = trained(sharded(ranks), batches_of(rank, ranks, 30), kind, **options)
    masks = {name: whole(mask) for name, mask in masks_of(model).items()}
    return {"masks": masks, "reports": reports, "alive": alive}


def dynamic(rank, ranks):
    return run_of(rank, ranks, "dynamic")


def random_growth(rank, ranks):
    return run_of(rank, ranks, "random growth", criterion="random")


def gradual(rank, ranks):
    return run_of(rank, ranks, "gradual")


def checkpoint(rank, ranks):
    """Write a run with torch.distributed.checkpoint, after ten steps; and how it goes on."""
    batches = batches_of(rank, ranks, 16)
    model, optimizer, scheduler, _, _ = trained(sharded(ranks), batches[:10])
    dcp.save(run_state(model, optimizer, scheduler), checkpoint_id=FOLDER / "run")
    at = state_of(model)
    for batch in batches[10:]:
        train(model, optimizer, scheduler, batch, [])
    return {"at": at, "end": state_of(model)}


def resumed(rank, ranks):
    """Go on from there, in a model and a scheduler made anew."""
    model, optimizer, scheduler = loaded(ranks)
    for batch in batches_of(rank, ranks, 16)[10:]:
        train(model, optimizer, scheduler, batch, [])
    return state_of(model)


def loaded(ranks):
    model = sharded(ranks)
    _, optimizer, scheduler, _, _ = trained(model, [], seed=1)
    state = run_state(model, optimizer, scheduler)
    dcp.load(state, checkpoint_id=FOLDER / "run")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return model, optimizer, scheduler


def loaded_run(rank, ranks):
    """What another number of ranks has written."""
    model, optimizer, scheduler = loaded(ranks)
    found = state_of(model)
    train(model, optimizer, scheduler, batches_of(rank, ranks)[0], [])
    return found


def loaded_masks(rank, ranks):
    model = sharded(ranks)
    load_masks(model, FOLDER / "masks.safetensors")
    return {name: whole(mask) for name, mask in masks_of(model).items()}


def state_of(model):
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def run_state(model, optimizer, scheduler):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler.state_dict()}


def other_masks(rank, ranks):
    """Masks that another number of ranks has written, and a plain model's."""
    model = sharded(ranks)
    masks = {"trunk.0.weight": torch.eye(7, 5) > 0, "heads.b.weight": torch.arange(9).reshape(1, 9) > 4}
    attach_masks(model, masks)
    before = {name: whole(mask) for name, mask in masks_of(model).items()}
    with torch.no_grad():
        model(batches_of(rank, ranks)[0])  # leaves the outermost layers whole
    fold(model)
    return {"masks": before, "left": len(masks_of(model)), "zeros": int((whole(model.trunk[0].weight) == 0).sum())}


def untouched(rank, ranks):
    """Scoring leaves gradients, weights and modes as they were, also after a forward without a backward."""
    model = sharded(ranks)
    sum(square_losses(model, batches_of(rank, ranks)[0]).values()).backward()
    before = {name: (p, whole(p.grad).clone(), whole(p.detach()).clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        model(batches_of(rank, ranks)[0])  # leaves the outermost layers whole
    score_tasks(model, square_losses, batches_of(rank, ranks))
    after = dict(model.named_parameters())
    return all(
        after[name] is p and torch.equal(whole(p.grad), grad) and torch.equal(whole(p.detach()), value)
        for name, (p, grad, value) in before.items()
    )


def fewer_batches(rank, ranks):
    return score_tasks(sharded(ranks), square_losses, batches_of(rank, ranks)[: STEPS - min(rank, 1)])


def missing_task(rank, ranks):
    def losses(model, batch):
        found = square_losses(model, batch)
        return {task: loss for task, loss in found.items() if task == "a" or rank == 0}

    return score_tasks(sharded(ranks), losses, batches_of(rank, ranks))


def failing_loss(rank, ranks):
    """One rank fails after its forward, in what it does with the outputs."""

    def losses(model, batch):
        found = square_losses(model, batch)
        return found if rank != 1 else {"a": found["labels"]}

    return score_tasks(sharded(ranks), losses, batches_of(rank, ranks))


def failing_data(rank, ranks):
    def batches():
        yield batches_of(rank, ranks)[0]
        if rank == 1:
            raise KeyError("file")
        yield batches_of(rank, ranks)[1]

    return score_tasks(sharded(ranks), square_losses, batches())


def nan_on_one_rank(rank, ranks):
    def losses(model, batch):
        return {task: loss * (torch.nan if rank == 1 else 1) for task, loss in square_losses(model, batch).items()}

    return score_tasks(sharded(ranks), losses, batches_of(rank, ranks))


def stages(rank, ranks):
    """Pipeline parallelism: each rank has layers of its own."""
    model = net()
    stage = nn.ModuleDict({"trunk": model.trunk} if rank % 2 == 0 else {"heads": model.heads})
    return score_tasks(stage, square_losses, batches_of(rank, ranks))


def masked_before(rank, ranks):
    model = net()
    prune.random_unstructured(model.own, "weight", 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    return score_tasks(model, square_losses, batches_of(rank, ranks))


def entangled_criterion(rank, ranks):
    return score_tasks(sharded(ranks), square_losses, batches_of(rank, ranks), criterion=lambda w, g: g / g.norm())


def channels(rank, ranks):
    return disparse_static(sharded(ranks), square_losses, batches_of(rank, ranks), 0.5, pattern="channels")


def failing_before_the_forward(rank, ranks):
    """Nothing can be told to ranks that gather weights: this one raises at once, and its end is theirs."""

    def losses(model, batch):
        if rank == 1:
            raise KeyError("labels")
        return square_losses(model, batch)

    try:
        score_tasks(sharded(ranks), losses, batches_of(rank, ranks))
    except KeyError as error:
        os._exit(3 if "before the model had finished its forward" in error.__notes__[-1] else 4)


def main(scenarios, folder):
    global FOLDER
    FOLDER = Path(folder)
    dist.init_process_group("gloo")
    write_results({scenario: globals()[scenario] for scenario in scenarios}, Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2])
