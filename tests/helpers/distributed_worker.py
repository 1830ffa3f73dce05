"""What every rank runs under torchrun: ``torchrun distributed_worker.py SCENARIOS FOLDER``; one result file each."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from disparse_plugin import disparse_pretrained, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from disparse_plugin.structured import remove_channels
from networks import PartlyShared, square_losses, vectors
from rank_results import write_results
from runs import masks_of

STEPS = 6


def model_and_shards(ranks, batches=STEPS):
    """The same float64 model everywhere, and for each rank its batches."""
    torch.manual_seed(0)
    everything = [batch.double() for batch in vectors(batches * ranks)]
    return PartlyShared().double(), [everything[rank::ranks] for rank in range(ranks)]


def scheduled(model, losses=square_losses, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"amount": 0.5, "update_every": 2, "stop_at": 100, "exclude": ["unused"], **options}
    return optimizer, DiSparseScheduler(model, optimizer, losses, **options)


def train(model, optimizer, scheduler, steps, losses=square_losses):
    """``steps`` is, for each step, the batches whose mean gradient is used."""
    for batches in steps:
        optimizer.zero_grad()
        for batch in batches:
            (sum(losses(model, batch).values()) / len(batches)).backward()
        optimizer.step()
        scheduler.step(*batches)


def some_tasks(model, batch):
    """Tasks that are missing in some batches, and so on some ranks."""
    found = square_losses(model, batch)
    return {task: loss for task, loss in found.items() if task != "d" or bool(batch[0, 0] > 0)}


def score(rank, ranks):
    model, shards = model_and_shards(ranks)
    scores = score_tasks(model, square_losses, shards[rank], parameters=used_parameters(model))
    return {"masks": {scores.names[i]: m for i, m in enumerate(scores.masks(0.6).values())}, "batches": STEPS}


def used_parameters(model):
    return [(m, "weight") for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.unused]


def dynamic(rank, ranks, losses=square_losses, **options):
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, scheduler = scheduled(wrapped, losses, **options)
    train(wrapped, optimizer, scheduler, [[batch] for batch in shards[rank]])
    return {"masks": masks_of(model)}


def missing_tasks(rank, ranks):
    return dynamic(rank, ranks, some_tasks)


def random_growth(rank, ranks):
    torch.manual_seed(rank)  # the ranks' own random states must not matter
    return dynamic(rank, ranks, criterion="random")


def gradual(rank, ranks):
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, pruning = gradually(wrapped)
    train(wrapped, optimizer, pruning, [[batch] for batch in shards[rank]])
    return {"masks": masks_of(model)}


def gradually(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"amount": 0.6, "update_every": 2, "stop_at": STEPS, "exclude": ["unused"]}
    return optimizer, GradualPruning(model, optimizer, square_losses, **options)


def uneven_accumulation(rank, ranks):
    """Another number of micro-batches on each rank, at the step of an update."""
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, scheduler = scheduled(wrapped, update_every=1)
    sum(square_losses(wrapped, shards[rank][0]).values()).backward()
    optimizer.step()
    scheduler.step(*shards[rank][: 1 + rank])


def uneven_shards(rank, ranks):
    model, shards = model_and_shards(ranks)
    return score_tasks(model, square_losses, shards[rank][: STEPS - rank], parameters=used_parameters(model))


def failing_rank(rank, ranks):
    model, shards = model_and_shards(ranks)

    def losses(model, batch):
        if rank == 1:
            raise KeyError("labels")
        return square_losses(model, batch)

    return score_tasks(model, losses, shards[rank], parameters=used_parameters(model))


def nan_on_one_rank(rank, ranks):
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    calls = []

    def losses(model, batch):
        found = square_losses(model, batch)
        return {task: loss * (torch.nan if rank == ranks - 1 else 1) for task, loss in found.items()}

    optimizer, scheduler = scheduled(wrapped, losses)
    before = masks_of(model)
    try:
        train(wrapped, optimizer, scheduler, [[batch] for batch in shards[rank]])
    finally:
        calls.append(all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items()))
        assert calls == [True]


def other_seed(rank, ranks):
    model, _ = model_and_shards(ranks)
    try:
        scheduled(model, seed=rank)
    finally:
        assert not masks_of(model)


def other_options(rank, ranks):
    scheduled(model_and_shards(ranks)[0], update_every=2 + rank)


def unequal_weights(rank, ranks):
    """Without DistributedDataParallel the ranks' weights drift apart, and so would their masks."""
    model, shards = model_and_shards(ranks)
    optimizer, scheduler = scheduled(model)
    train(model, optimizer, scheduler, [[batch * (1 + rank)] for batch in shards[rank]])


def steps_on_ranks(rank, ranks, skips=lambda rank, step: False, **options):
    """Train with the wrapper; ``skips`` tells where a rank leaves out the optimizer's step."""
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, scheduler = scheduled(wrapped, **options)
    before = masks_of(model)
    for step, batch in enumerate(shards[rank][:4]):
        optimizer.zero_grad()
        sum(square_losses(wrapped, batch).values()).backward()
        if not skips(rank, step):
            optimizer.step()
        try:
            scheduler.step(batch)
        except ValueError:
            assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
            raise
        before = masks_of(model)


def skipped_step(rank, ranks):
    """The step that one rank leaves out is the one after which the others would change their masks."""
    steps_on_ranks(rank, ranks, skips=lambda rank, step: rank == 1 and step == 1)


def other_fraction(rank, ranks):
    """Functions cannot be compared before they are asked."""
    steps_on_ranks(rank, ranks, drop_fraction=lambda step: 0.5 if rank else 0.0)


def other_amount(rank, ranks):
    model, shards = model_and_shards(ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = GradualPruning(model, optimizer, square_losses, amount=lambda step: 0.5 + 0.1 * rank, stop_at=1)
    optimizer.step()
    pruning.step(shards[rank][0])


def checkpoints_of_different_steps(rank, ranks):
    """Each rank has a file of its own, and was killed between two of them."""
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, scheduler = scheduled(wrapped, update_every=4)
    states = []
    for batch in shards[rank][:3]:
        train(wrapped, optimizer, scheduler, [[batch]])
        states.append(scheduler.state_dict())
    scheduler.load_state_dict(states[2 if rank else 1])
    train(wrapped, optimizer, scheduler, [[batch] for batch in shards[rank][:3]])


def no_batch(rank, ranks):
    model, shards = model_and_shards(ranks)
    optimizer, scheduler = scheduled(model, update_every=1)
    optimizer.step()
    scheduler.step(*([] if rank == 1 else shards[rank][:1]))


def bad_argument(rank, ranks):
    model, _ = model_and_shards(ranks)
    try:
        scheduled(model, seed="0" if rank == 1 else 0)
    finally:
        assert not masks_of(model)


def losses_that_call_the_wrapper(rank, ranks):
    """They close over the wrapper instead of running the model that they are given."""
    model, shards = model_and_shards(ranks)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, scheduler = scheduled(wrapped, lambda _, batch: square_losses(wrapped, batch), update_every=1)
    train(wrapped, optimizer, scheduler, [[batch] for batch in shards[rank]])
    return {"masks": masks_of(model)}


def one_shot(rank, ranks, model=None, **options):
    """A call that must leave the model dense if the ranks do not agree."""
    fresh, shards = model_and_shards(ranks)
    model = fresh if model is None else model
    options = {"amount": 0.5, "exclude": ["unused"], **options}
    try:
        disparse_pretrained(model, square_losses, shards[rank], **options)
    finally:
        assert not masks_of(model)


def other_one_shot_amount(rank, ranks):
    one_shot(rank, ranks, amount=0.5 + 0.1 * rank)


def bad_one_shot_amount(rank, ranks):
    one_shot(rank, ranks, amount=1.5 if rank == 1 else 0.5)


def bad_one_shot_criterion(rank, ranks):
    one_shot(rank, ranks, criterion="tailor" if rank == 1 else "taylor")


def other_criterion(rank, ranks):
    one_shot(rank, ranks, criterion="fisher" if rank else "taylor")


def other_parameters(rank, ranks):
    one_shot(rank, ranks, exclude=["unused", "abc"] if rank else ["unused"])


def drifted_weights(rank, ranks):
    """A criterion that looks at no gradient would give each rank masks of its own."""
    model, _ = model_and_shards(ranks)
    with torch.no_grad():
        model.ab.weight[0, 0] += 1e-9 * rank
    one_shot(rank, ranks, model, criterion="lamp")


def channels(rank, ranks, **options):
    """Remove channels; a call that fails must leave the model as it was."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
    before = [parameter.clone() for parameter in model.parameters()]
    _, shards = model_and_shards(ranks)
    options = {"data": shards[rank], "example_inputs": shards[rank][0], "amount": 0.5, **options}
    try:
        report = remove_channels(model, two_losses, **options)
    except Exception:
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
        raise
    return {"gone": [cut.positions.tolist() for cut in report.plan.cuts]}


def two_losses(model, batch):
    out = model(batch)
    return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}


def bad_inputs_for_channels(rank, ranks):
    """Found before anything is scored."""
    return channels(rank, ranks, example_inputs=vectors(1)[0].double()[:, : 4 if rank == 1 else 5])


def bad_channel_option(rank, ranks):
    return channels(rank, ranks, round_to=0 if rank == 1 else 1)


def channels_that_do_not_reach(rank, ranks):
    """Found after the scores have been added up."""
    return channels(rank, ranks, max_pruning_ratio=0.1 if rank == 1 else 1.0)


def other_channel_amount(rank, ranks):
    return channels(rank, ranks, amount=0.25 + 0.25 * (rank == 1))


def other_channel_steps(rank, ranks):
    return channels(rank, ranks, steps=1 + (rank == 1))


def failing_between_steps(rank, ranks):
    def between(model, step):
        if rank == 1:
            raise KeyError("between")

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
    _, shards = model_and_shards(ranks)
    remove_channels(model, two_losses, shards[rank], shards[rank][0], 0.5, steps=2, between=between)


def measured_channels(rank, ranks):
    return channels(rank, ranks, of="latency")


def dying_rank(rank, ranks):
    model, shards = model_and_shards(ranks)

    def losses(model, batch):
        if rank == 1:
            os._exit(3)
        return square_losses(model, batch)

    score_tasks(model, losses, shards[rank], parameters=used_parameters(model))


def main(scenarios, folder):
    dist.init_process_group("gloo")
    write_results({scenario: globals()[scenario] for scenario in scenarios}, Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2])
