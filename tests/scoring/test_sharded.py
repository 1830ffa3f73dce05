"""Under torchrun with gloo: sharded weights have the scores and the masks of one process on the joined batches."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from disparse_plugin import attach_masks, clone_pruned, disparse_static, score_tasks, sparsity_report
from disparse_plugin._support.shards import whole
from disparse_plugin.analysis import GradientConflict, own_masks, task_overlap
from disparse_plugin.in_weight import MaskInWeight
from disparse_plugin.masks import fold, keep_tasks, load_masks
from disparse_plugin.masks.attach import masks_of
from disparse_plugin.masks.state_dicts import match_masks
from disparse_plugin.scoring.score import score_for_removal
from disparse_plugin.sparse_training import GradualPruning, RewindPoint, save_checkpoint
from disparse_plugin.structured import remove_channels
from networks import Around, square_losses
from places import HELPERS, python
from sharded_worker import (
    RECOMMENDED,
    TENSOR_PARALLEL_WIDTH,
    asked,
    joined_batches,
    net,
    sharded,
    shards_on_cpus,
    tied_scores,
    train,
    trained,
)

pytestmark = shards_on_cpus

SCENARIOS = [
    "score",
    "hybrid",
    "half",
    "rounded",
    "recommended",
    "stale",
    "mixed",
    "ties",
    "tensor_parallel",
    "one_shot",
    "dynamic",
    "random_growth",
    "gradual",
    "checkpoint",
    "resumed",
    "other_masks",
    "untouched",
    "fewer_batches",
    "missing_task",
    "failing_loss",
    "failing_data",
    "nan_on_one_rank",
    "stages",
    "masked_before",
    "entangled_criterion",
    "channels",
]


def torchrun(ranks, scenarios, folder, timeout=300):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return python(*command, HELPERS / "sharded_worker.py", ",".join(scenarios), folder, timeout=timeout)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """One launch for all scenarios; that the later ones work shows that failures leave the group in order."""
    folder = tmp_path_factory.mktemp("shards")
    process = torchrun(request.param, SCENARIOS, folder)
    assert process.returncode == 0, process.stderr
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]
    return found, folder


def unsharded(model=None, ranks=2, **options):
    return score_tasks(net() if model is None else model, square_losses, joined_batches(ranks), **options)


def check_like(found, scores):
    """Masks and order are equal, entry by entry; scores and shares but for the rounding of sums."""
    assert isinstance(found, dict), found
    expected = asked(scores)
    assert found["tasks"] == expected["tasks"]
    for task, table in expected["scores"].items():
        assert found["scores"][task].keys() == table.keys()
        for name, score in table.items():
            torch.testing.assert_close(found["scores"][task][name], score, rtol=1e-9, atol=1e-12)
    for arbiter, masks in expected["masks"].items():
        assert all(torch.equal(found["masks"][arbiter][name], mask) for name, mask in masks.items()), arbiter
    for what in ("min_keep", "parts", "importance"):
        assert all(torch.equal(found[what][name], value) for name, value in expected[what].items()), what


@pytest.mark.parametrize("scenario", ["score", "mixed", "hybrid"])
def test_scores_and_masks_are_those_of_one_process_on_the_joined_batches(results, scenario):
    found, _ = results
    for of_rank in found:
        check_like(of_rank[scenario], unsharded(ranks=len(found)))


def test_mixed_precision_scores_what_is_kept(results):
    """The scores are float32, near those of full precision, and all ranks cut alike, exactly as much as asked."""
    found, _ = results
    expected = asked(unsharded(net(), len(found)))
    for of_rank in found:
        result = of_rank["half"]
        assert isinstance(result, dict), result
        for task, table in expected["scores"].items():
            for name, score in table.items():
                kept = result["scores"][task][name]
                assert kept.dtype == torch.float32
                assert (kept - score).norm() < 0.05 * score.norm()
        for arbiter, masks in result["masks"].items():
            count = sum(int((~mask).sum()) for mask in masks.values())
            assert count == sum(int((~mask).sum()) for mask in expected["masks"][arbiter].values())
            assert all(torch.equal(mask, found[0]["half"]["masks"][arbiter][name]) for name, mask in masks.items())


def test_rounded_scores_of_a_task_at_a_time(results):
    found, _ = results
    options = {"dtype": torch.bfloat16, "tasks_at_once": 1}
    for of_rank in found:
        check_like(of_rank["rounded"], unsharded(ranks=len(found), **options))


def test_tensor_parallel_weights(results):
    found, _ = results
    for of_rank in found:
        check_like(of_rank["tensor_parallel"], unsharded(net(TENSOR_PARALLEL_WIDTH), len(found) // 2))


def test_a_layer_adaptive_criterion_on_what_is_left_of_a_pruned_model(results):
    found, _ = results
    model = net()
    disparse_static(model, square_losses, joined_batches(len(found)), 0.3)
    for of_rank in found:
        check_like(of_rank["recommended"], unsharded(model, len(found), criterion=RECOMMENDED))


def test_shares_are_those_among_what_is_alive_on_all_ranks(results):
    found, _ = results
    model = net()
    scores = unsharded(model, len(found), criterion=RECOMMENDED)
    dense = scores.masks(0.6, "sum")
    disparse_static(model, square_losses, joined_batches(len(found)), 0.4, criterion="gradient")
    assert any(not torch.equal(mask, dense[key]) for key, mask in scores.masks(0.6, "sum").items())
    for of_rank in found:
        check_like(of_rank["stale"], scores)


def test_equal_scores_go_by_magnitude_then_by_place(results):
    found, _ = results
    for of_rank in found:
        check_like(of_rank["ties"], tied_scores(net()))


def test_one_shot_masks_stay_zero_in_training(results):
    found, _ = results
    model = net()
    scores = disparse_static(model, square_losses, joined_batches(len(found)), 0.5)
    expected = masks_of(model)
    for of_rank in found:
        result = of_rank["one_shot"]
        assert result["pruned"]
        assert result["report"] == sparsity_report(model, scores).to_dict()
        for name, mask in expected.items():
            assert torch.equal(result["masks"][name], mask)
            assert torch.equal(result["weights"][name] != 0, mask)


def test_training_is_that_of_one_process(results):
    found, _ = results
    model, ranks = net(), len(found)
    disparse_static(model, square_losses, joined_batches(ranks), 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for batch in joined_batches(ranks, 2):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
    model(joined_batches(ranks)[0])  # brings the masked weights up to date
    for name, weight in found[0]["one_shot"]["weights"].items():
        layer, own = name.rsplit(".", 1)
        torch.testing.assert_close(weight, getattr(model.get_submodule(layer), own).detach())


def test_masks_written_by_several_ranks_load_into_a_plain_model(results):
    found, folder = results
    model = net()
    assert load_masks(model, folder / "masks.safetensors") == {"amount": 0.5}
    assert all(torch.equal(found[0]["one_shot"]["masks"][name], mask) for name, mask in masks_of(model).items())


def test_whole_masks_go_onto_a_sharded_model_and_off_again(results):
    found, _ = results
    for of_rank in found:
        result = of_rank["other_masks"]
        assert result["masks"].keys() == {"trunk.0.weight", "heads.b.weight"}
        assert torch.equal(result["masks"]["trunk.0.weight"], torch.eye(7, 5) > 0)
        assert (result["left"], result["zeros"]) == (0, 30)


def test_scoring_touches_nothing(results):
    assert all(of_rank["untouched"] is True for of_rank in results[0])


@pytest.mark.parametrize(
    ("scenario", "failing", "own"),
    [
        ("fewer_batches", None, "ValueError: data: all ranks must have the same number of batches where weights are s"),
        ("missing_task", None, "ValueError: losses: must be the same on all ranks, found [['a', 'b'], ['a']"),
        ("failing_loss", 1, "KeyError: 'labels'"),
        ("failing_data", 1, "KeyError: 'file'"),
        ("nan_on_one_rank", None, "NonFiniteError: losses: every "),
        ("stages", None, "ValueError: parameters: must be the same on all ranks, found"),
        ("masked_before", None, "ValueError: parameters: own.weight must be sharded without a mask, found a mask that"),
        ("entangled_criterion", None, "ValueError: criterion: must score every entry by itself where weights are sh"),
        ("channels", None, "ValueError: pattern: must be 'weights' where weights are sharded, found 'channels'"),
    ],
)
def test_a_failure_is_an_error_on_all_ranks(results, scenario, failing, own):
    for rank, of_rank in enumerate(results[0]):
        expected = own if failing in (None, rank) else "RuntimeError: distributed: all ranks must succeed, found that"
        assert str(of_rank[scenario]).startswith(expected)


@pytest.mark.usefixtures("one_rank")
def test_one_rank_alone():
    model = sharded(1)
    scores = score_tasks(model, square_losses, joined_batches(1))
    check_like(asked(scores), unsharded(ranks=1))
    disparse_static(model, square_losses, joined_batches(1), 0.5)
    with torch.no_grad():
        model(joined_batches(1)[0])  # leaves the outermost layers whole
    assert sparsity_report(model, scores).alive == 75


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["dynamic", "gradual"])
def test_sparse_training_on_one_rank_alone(kind):
    sharded_run, plain_run = (trained(model, joined_batches(1, 30), kind) for model in (sharded(1), net()))
    assert sharded_run[3:] == plain_run[3:]
    expected = masks_of(plain_run[0])
    assert all(torch.equal(whole(mask), expected[name]) for name, mask in masks_of(sharded_run[0]).items())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda model, scores: scores.save("never.safetensors"), "scores: must be of whole weights to be written"),
        (
            lambda model, scores: save_checkpoint("never.pt", model=model),
            "parts: must hold whole tensors, found sharded ones in model; write them with torch",
        ),
        (
            lambda model, scores: score_for_removal(
                model, square_losses, joined_batches(1), criterion="snip", parameters=scores.parameters
            ),
            "model: must hold whole weights where channels are removed",
        ),
        (
            lambda model, scores: remove_channels(
                model, square_losses, joined_batches(1), joined_batches(1)[0], amount=0.5
            ),
            "model: must hold whole weights where channels are removed",
        ),
        (lambda model, scores: scores.candidates(), "scores: must be of whole weights here, found some of sharded"),
        (lambda model, scores: scores.masks(pattern="2:4"), "pattern: must be 'weights' where weights are sharded, fo"),
        (
            lambda model, scores: score_tasks(model, square_losses, joined_batches(1), observe=GradientConflict()),
            "observe: must be None where weights are sharded",
        ),
        (
            lambda model, scores: trained(model, [], grad_scaler=torch.amp.GradScaler("cpu", enabled=True)),
            "grad_scaler: must be None or disabled where weights are sharded",
        ),
        (lambda model, scores: trained(model, [], pattern="1:3"), "pattern: must be 'weights' where weights are sha"),
    ],
)
def test_what_needs_whole_weights_is_refused(refused, message):
    model = sharded(1)
    scores = score_tasks(model, square_losses, joined_batches(1))
    with pytest.raises(ValueError, match=message):
        refused(model, scores)
    assert not masks_of(model)


@pytest.mark.usefixtures("one_rank")
def test_weights_that_no_rank_can_score_are_refused():
    model, mesh = net(), init_device_mesh("cpu", (1,))
    partial = DTensor.from_local(torch.ones(3, 5).double(), mesh, [Partial()])
    model.own.weight = nn.Parameter(partial)
    with pytest.raises(ValueError, match=r"own\.weight must be sharded or replicated, found a DTensor of partial sums"):
        score_tasks(model, square_losses, joined_batches(1))
    frozen = sharded(1)
    frozen.own.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"own\.weight must require a gradient where weights are sharded"):
        score_tasks(frozen, square_losses, joined_batches(1), parameters=[(frozen.own, "weight")])


@pytest.mark.usefixtures("one_rank")
def test_a_rewound_model_keeps_its_masks():
    models = []
    for model in (sharded(1), net()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruning = GradualPruning(model, optimizer, square_losses, amount=0.5, update_every=100, stop_at=100)
        point = RewindPoint(model, optimizer)
        train(model, optimizer, pruning, joined_batches(1)[0], [])
        pruning.prune_to(0.5, joined_batches(1)[0])
        point.rewind()
        train(model, optimizer, pruning, joined_batches(1)[1], [])
        model(joined_batches(1)[0])
        models.append(model)
    for layer in ("trunk.0", "trunk.2", "own"):
        one, other = (model.get_submodule(layer).weight.detach() for model in models)
        torch.testing.assert_close(whole(one), other)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_a_state_assigned(model):
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "other",
    [clone_pruned, copy.deepcopy, saved_and_loaded, with_a_state_assigned, lambda model: model.double()],
    ids=["clone_pruned", "deepcopy", "torch.save", "assign", "double"],
)
def test_a_copy_of_a_sharded_model_keeps_its_masks_in_training(other):
    mesh, mask = init_device_mesh("cpu", (1,)), torch.arange(12).reshape(3, 4) % 2 == 0
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(torch.ones(3, 4), mesh, [Shard(0)]))
    attach_masks(layer, {"weight": mask})
    twin = other(layer)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = distribute_tensor(torch.ones(1, 4, dtype=twin.weight.dtype), mesh, [Replicate()])
        twin(inputs).full_tensor().sum().backward()
        optimizer.step()
    # Every gradient is 1: the first step goes by 0.1, the second by 0.1 * 1.9.
    torch.testing.assert_close(whole(twin.weight.detach()), 0.71 * mask.to(twin.weight.dtype))
    assert sparsity_report(twin).alive == 6


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_mask_in_the_weight_holds_in_a_compiled_copy(fullgraph):
    layer = nn.Linear(3, 1)
    MaskInWeight.apply(layer, "weight", torch.tensor([[True, False, True]]))
    for model in (layer, copy.deepcopy(layer)):
        torch.compile(model, backend="eager", fullgraph=fullgraph)(torch.ones(1, 3)).sum().backward()
        assert model.weight.grad.tolist() == [[1, 0, 1]]


def test_a_mask_in_a_weight_of_a_copy_outlasts_weights_that_are_loaded():
    layer = nn.Linear(3, 1)
    MaskInWeight.apply(layer, "weight", torch.tensor([[True, False, True]]))
    for model in (layer, copy.deepcopy(layer)):
        model.load_state_dict({"weight": torch.ones(1, 3)}, strict=False)
        assert model.weight.tolist() == [[1, 0, 1]]
        fold(model)
        assert not model._load_state_dict_post_hooks


def test_a_mask_in_a_frozen_weight_holds_once_that_is_trained():
    layer = nn.Linear(3, 1).requires_grad_(False)
    MaskInWeight.apply(layer, "weight", torch.tensor([[True, False, True]]))
    layer.requires_grad_(True)
    layer(torch.ones(3)).sum().backward()
    assert layer.weight.grad.tolist() == [[1, 0, 1]]


def test_a_layer_with_a_mask_in_its_weight_is_scored_as_others_are():
    """As a head beside a sharded trunk: it is not taken for one that a parent reads, and trains on."""
    model, other = net(), net()
    mask = torch.rand_like(model.own.weight) > 0.5
    MaskInWeight.apply(model.own, "weight", mask)
    with torch.no_grad():
        other.own.weight.mul_(mask)
    scores, expected = (score_tasks(each, square_losses, joined_batches(1)) for each in (model, other))
    assert scores.names == expected.names
    assert torch.equal(scores["a"][model.own, "weight"], expected["a"][other.own, "weight"])
    sum(square_losses(model, joined_batches(1)[0]).values()).backward()
    assert "weight" not in vars(model.own)
    assert torch.equal(model.own.weight.grad != 0, mask)


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.usefixtures("one_rank")
def test_whole_weights_beside_sharded_ones_of_any_size(size):
    layers = nn.Sequential(nn.Linear(5, size), nn.Tanh(), nn.Linear(size, 5))
    model, plain = Around(layers).double(), Around(copy.deepcopy(layers)).double()
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=set(model.first[2].parameters()))
    for each in (model, plain):
        disparse_static(each, square_losses, joined_batches(1), 0.5)
    for name, mask in masks_of(plain).items():
        assert torch.equal(whole(masks_of(model)[name]) != 0, mask != 0)


@pytest.mark.usefixtures("one_rank")
def test_a_mask_in_a_weight_outlasts_weights_that_are_loaded():
    model, dense = sharded(1), net()
    disparse_static(model, square_losses, joined_batches(1), 0.5)
    masks = {name: whole(mask) for name, mask in masks_of(model).items()}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dense.state_dict(), options=options)
    for name, mask in masks.items():
        assert torch.equal(whole(model.get_parameter(name).detach()), dense.get_parameter(name) * mask)


@pytest.mark.usefixtures("one_rank")
def test_a_loaded_state_leaves_masks_that_it_has():
    model = sharded(1)
    disparse_static(model, square_losses, joined_batches(1), 0.5)
    match_masks(model, model.state_dict())
    assert len(masks_of(model)) == 5


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
def test_other_engines_are_refused_by_name():
    old = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=r"model: must be sharded by torch.distributed.fsdp.fully_shard \(FSDP2\)"):
        score_tasks(old, square_losses, joined_batches(1))
    parts = pipeline(net().trunk, (joined_batches(1)[0],), split_spec={"2": SplitPoint.BEGINNING})
    with pytest.raises(ValueError, match=r"model: must run on every rank, found Pipe of torch.distributed.pipelining"):
        score_tasks(parts, square_losses, joined_batches(1))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "asked_for",
    [
        lambda model, scores: task_overlap(scores, 0.5),
        lambda model, scores: own_masks(scores, 0.5),
        lambda model, scores: keep_tasks(model, scores, ["a"]),
    ],
)
def test_analyses_of_sharded_scores_are_refused(asked_for):
    model = sharded(1)
    scores = score_tasks(model, square_losses, joined_batches(1))
    with pytest.raises(ValueError, match="scores: must be of whole weights here"):
        asked_for(model, scores)


def test_a_run_goes_on_with_the_same_weights_and_masks(results):
    for of_rank in results[0]:
        written, resumed = of_rank["checkpoint"]["end"], of_rank["resumed"]
        assert all(torch.equal(resumed[name], value) for name, value in written.items())


@pytest.mark.parametrize(
    ("scenario", "options"), [("dynamic", {}), ("random_growth", {"criterion": "random"}), ("gradual", {})]
)
def test_sparse_training_is_that_of_one_process(results, scenario, options):
    found, _ = results
    kind = scenario
    model, _, _, reports, alive = trained(net(), joined_batches(len(found), 30), kind, **options)
    expected = masks_of(model)
    if kind != "gradual":
        assert set(alive) == {75}
    for of_rank in found:
        result = of_rank[scenario]
        assert (result["reports"], result["alive"]) == (reports, alive)
        assert all(torch.equal(result["masks"][name], mask) for name, mask in expected.items())


@pytest.mark.slow
def test_what_four_ranks_have_written_two_can_load(tmp_path):
    for ranks, scenarios in ((4, ["one_shot", "checkpoint"]), (2, ["loaded_masks", "loaded_run"])):
        process = torchrun(ranks, scenarios, tmp_path)
        assert process.returncode == 0, process.stderr
        if ranks == 4:
            written = torch.load(tmp_path / "0.pt", weights_only=False)
    loaded = torch.load(tmp_path / "0.pt", weights_only=False)
    masks = written["one_shot"]["masks"]
    assert loaded["loaded_masks"].keys() == masks.keys()
    assert all(torch.equal(loaded["loaded_masks"][name], mask) for name, mask in masks.items())
    assert all(torch.equal(loaded["loaded_run"][name], value) for name, value in written["checkpoint"]["at"].items())


def test_a_rank_that_fails_in_the_middle_of_a_forward_ends_the_run(tmp_path):
    process = torchrun(2, ["failing_before_the_forward"], tmp_path, timeout=120)
    assert process.returncode != 0
    assert "exitcode  : 3" in process.stderr
