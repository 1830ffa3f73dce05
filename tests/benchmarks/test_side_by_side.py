"""Networks trained side by side are those that are trained one by one, and the queue of many runs does what it says."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import mobilenet_v2

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

from disparse_plugin.masks import masks_of
from multitask.data.splits import InMemory
from multitask.data.trunk import TrunkProblem
from multitask.problem.problem import Problem
from multitask.problem.tasks import classification
from multitask.pruning.cuts import Scored
from multitask.pruning.methods import METHODS
from multitask.pruning.procedures import Plan
from multitask.together import Job, carry_out, make_benches, on_device, runs_of
from multitask.training.bench import Bench, Budget, Course, Setting
from multitask.training.networks import mlp, small_resnet, tapped_resnet
from multitask.training.products import as_products
from multitask.training.stack import Stack, StackedCourse
from multitask.training.trunk import pretrained_mobilenet
from signs import BUDGET, SETTING, in_memory, made_up

CPU = torch.device("cpu")
PARTS = ("weight", "bias")


def pictures() -> Problem:
    """Random pictures of 28x28 with random classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 255, (40, 1, 28, 28), generator=generator, dtype=torch.uint8)
    targets = {name: torch.randint(0, 2, (40,), generator=generator) for name in ("shoe", "odd", "garment")}
    split = InMemory(inputs, targets, torch.tensor([127.0]), torch.tensor([70.0]))
    return Problem("pictures", tuple(classification(name, 2) for name in targets), split, split, split, (1, 28, 28))


def with_a_trunk() -> TrunkProblem:
    """The same pictures, with weights of a trunk that stand for trained ones."""
    problem, features = pictures(), mobilenet_v2().features
    given = {field.name: getattr(problem, field.name) for field in fields(Problem)}
    return TrunkProblem(**given, trunk=features.state_dict())


def exact(split: InMemory) -> InMemory:
    """The same samples, batches of which are float64."""

    class Exact(InMemory):
        def batch(self, which: Tensor):
            inputs, targets = super().batch(which)
            return inputs.double(), targets

    return Exact(split.inputs, split.targets, split.mean.flatten(), split.spread.flatten())


PRUNED = {
    small_resnet: "trunk.layer1.0.conv1",
    tapped_resnet: "trunk.layer2.0.conv1",
    pretrained_mobilenet: "trunk.features.3.conv.1.0",  # depthwise
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("network", PRUNED)
def test_a_stack_trains_each_network_as_if_it_were_alone(optimizer: str, network) -> None:
    problem, steps = (with_a_trunk(), 2) if network is pretrained_mobilenet else (pictures(), 5)
    budget = Budget(steps, 3, batch_size=8, scored=1, rates=(0.01,), optimizer=optimizer)
    problem = replace(problem, train=exact(problem.train), test=exact(problem.test))
    benches = [Bench(Setting("pictures", pictures, network, budget), problem, seed, 0.01, CPU) for seed in (0, 1)]
    alone = [bench.initial().double() for bench in benches]
    prune.l1_unstructured(alone[1].get_submodule(PRUNED[network]), "weight", 0.5)
    stack = Stack(benches[0].initial().double(), 2)
    for place, model in enumerate(alone):
        stack.put(place, model)
    rates = [2**-7, 2**-8]  # the same in float32, which a stack keeps them in
    StackedCourse(stack, problem, budget, rates, torch.stack([bench.order(steps, 0) for bench in benches])).run()
    for place, (bench, model, rate) in enumerate(zip(benches, alone, rates, strict=True)):
        Course(bench, model, steps, rate, stage=0).run()
        found = stack.take(place).state_dict()
        assert found.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
        assert stack.measure(problem, problem.test, 16)[place] == bench.measure(model, problem.test)


def test_only_the_heads_of_a_trained_trunk_are_left_to_chance() -> None:
    problem = with_a_trunk()
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(pretrained_mobilenet(problem).state_dict())
    same = {name for name, value in networks[0].items() if torch.equal(value, networks[1][name])}
    assert networks[0].keys() - same == {f"heads.{t}.{part}" for t in ("shoe", "odd", "garment") for part in PARTS}
    assert all(torch.equal(networks[0][f"trunk.features.{name}"], value) for name, value in problem.trunk.items())
    with pytest.raises(ValueError, match="problem: needs one with the weights of a trunk, found pictures"):
        pretrained_mobilenet(pictures())


def test_convolutions_by_products_are_convolutions() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 4, (1, 2), bias=False)).double()
    inputs = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    products = as_products(copy.deepcopy(network))
    torch.testing.assert_close(products(inputs), network(inputs))
    for bad in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 2, 3, dilation=2), nn.Conv2d(2, 2, 3, padding="same")):
        with pytest.raises(ValueError, match="network: needs plain convolutions"):
            as_products(nn.Sequential(bad))


@pytest.mark.parametrize(
    "names",
    [
        ["dense", "magnitude", "LAMP with reach", "DiSparse damped 0.5", "shares, damped 0.25"],
        ["SNIP", "magnitude, gradual to 1/2", "LAMP with reach, cut at 1/4", "DiSparse damped 0.5, gradual to 3/4"],
    ],
    ids=["tuned", "trained"],
)
def test_jobs_make_what_their_methods_make_alone(names: list[str]) -> None:
    budget = replace(BUDGET, optimizer="sgd", train=40, tune=20)
    setting = Setting("signs", in_memory, lambda problem: mlp(problem).double(), budget)  # hardly any rounding
    problem = in_memory()
    problem = replace(
        problem, train=exact(problem.train), test=exact(problem.test), validation=exact(problem.validation)
    )
    benches = make_benches(setting, problem, [3, 4], {}, CPU)
    for bench in benches.values():
        bench.set_dense(Bench(setting, problem, bench.seed, 0.03, CPU).dense().state_dict())
    jobs = [Job(METHODS[name], 0.9, seed, rate) for name in names for seed, rate in ((3, 0.01), (4, 0.03))]
    stack = carry_out(jobs, benches)
    for place, job in enumerate(jobs):
        expected = benches[job.seed].run(job.method.procedure, job.amount, job.rate)
        found = stack.take(place)
        wanted, made = masks_of(expected), masks_of(found)
        assert {name: mask for name, mask in wanted.items() if not mask.all()}.keys() == made.keys()
        assert all(torch.equal(mask, wanted[name]) for name, mask in made.items())
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=1e-8, msg=name)
    runs = list(runs_of("signs", jobs[:1], benches))
    assert runs[0].test == benches[3].measure(stack.take(0), problem.test)


def test_scoring_the_dense_network_once_gives_the_masks_of_each_cut() -> None:
    bench = Bench(SETTING, made_up(), 3, 1e-2, CPU)
    for name in ("LAMP with reach", "DiSparse adaptive", "shares, damped 0.5", "adaptive Taylor, joint"):
        cut = METHODS[name].procedure.cut
        assert isinstance(cut, Scored)
        for amount in (0.9, 0.98):
            model = bench.dense()
            cut(bench, model, amount)
            found = cut.of_dense(bench, amount)
            assert all(torch.equal(found[name] != 0, mask) for name, mask in masks_of(model).items())


def test_cuts_on_the_way_follow_the_cubic_schedule() -> None:
    bench = Bench(replace(SETTING, budget=replace(BUDGET, train=80, tune=20)), made_up(), 0, 1e-2, CPU)
    plan = METHODS["magnitude, gradual to 1/2"].procedure
    assert isinstance(plan, Plan)
    assert plan.cuts(bench, 0.5) == pytest.approx({10: 0.244, 20: 0.392, 30: 0.468, 40: 0.496, 50: 0.5})
    assert METHODS["dense"].procedure.cuts(bench, 0.5) == {}


def test_jobs_that_start_differently_or_have_no_plan_are_refused() -> None:
    bench = Bench(SETTING, made_up(), 0, 1e-2, CPU)
    with pytest.raises(ValueError, match="jobs: need to start alike"):
        carry_out([Job(METHODS[name], 0.9, 0, 0.1) for name in ("SNIP", "LAMP")], {0: bench})
    with pytest.raises(ValueError, match=r"benches: need dense networks, found none of seeds \[0\]"):
        carry_out([Job(METHODS["LAMP"], 0.9, 0, 0.1)], {0: bench})
    with pytest.raises(ValueError, match="method: needs one with a plan, found RigL"):
        carry_out([Job(METHODS["RigL"], 0.9, 0, 0.1)], {0: bench})
    with pytest.raises(ValueError, match="problem: needs samples in memory, found Signs"):
        on_device(made_up(), CPU)
