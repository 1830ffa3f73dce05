"""The Hugging Face Trainer, unmodified, with our callback."""

import contextlib
import doctest
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import prune
from torch.utils.data import IterableDataset

from client_runs import client, our_callback, same
from disparse_plugin import score_tasks
from disparse_plugin.masks import clone_pruned, fold, masks_of
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from hf_runs import (
    EXAMPLES,
    MODES,
    SIZE,
    STEPS,
    FourTasks,
    Losses,
    callback,
    half,
    keys,
    pretrained_model,
    train,
    trainer,
)
from networks import square_losses, vectors
from places import CLIENTS, python
from runs import alive_count
from said import warned

pytestmark = [
    pytest.mark.clients,
    # Of the Trainer's own making: pinned memory without a GPU, and what torch has deprecated.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data", "ignore::FutureWarning:transformers"),
]


def test_it_is_optional():
    code = (
        "import sys; sys.modules['transformers'] = None; import disparse_plugin\n"
        "try:\n    import disparse_plugin.hf_trainer\nexcept ImportError as error:\n    print(error)\n"
    )
    done = python("-c", code)
    assert done.stdout.strip().endswith("pip install 'disparse-plugin[transformers]'"), done.stderr


def test_its_doctest():
    assert doctest.testmod(our_callback()).failed == 0


# The losses get less, so that the first model that is evaluated has the highest.
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "label_names": ["x"],
}


class Streamed(IterableDataset):
    def __iter__(self):
        yield from ({"x": row} for row in torch.cat(vectors(EXAMPLES // 4)))


class TestModes:
    """Each mode makes the masks of the core."""

    def test_static(self, tmp_path):
        losses, model, twin = Losses(), FourTasks(), FourTasks()
        train(tmp_path, model, callback("static", losses=losses, criterion="fisher", arbiter="majority"))
        assert len(losses.scored_on) == 3
        scores = score_tasks(twin.net, square_losses, losses.scored_on, criterion="fisher", parameters=keys(twin))
        expected = list(scores.masks(0.5, "majority").values())
        assert all(torch.equal(m.weight_mask != 0, mask) for (m, _), mask in zip(keys(model), expected, strict=True))

    def test_pretrained_after_some_steps(self, tmp_path):
        model = FourTasks()
        trained = train(tmp_path, model, callback("pretrained"), logging_strategy="steps", logging_steps=1)
        logged = [line["sparsity"] for line in trained.state.log_history if "loss" in line]
        total, kept = half(model)
        assert logged == [0, 0] + [1 - kept / total] * (3 * STEPS - 2)
        assert alive_count(model) == kept

    @pytest.mark.parametrize("accumulated", [1, 2])
    @pytest.mark.parametrize(("mode", "kind"), [("gradual", GradualPruning), ("dynamic", DiSparseScheduler)])
    def test_schedulers(self, tmp_path, mode, kind, accumulated):
        losses, model, twin = Losses(), FourTasks(), FourTasks()
        train(tmp_path, model, callback(mode, losses=losses, stop_at=4), gradient_accumulation_steps=accumulated)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0)
        options = {"amount": 0.5, "update_every": 2, "stop_at": 4, "parameters": keys(twin)}
        drawn = iter(losses.scored_on)
        scheduler = kind(twin.net, optimizer, lambda net, _: square_losses(net, next(drawn)), **options)
        for start in range(0, len(model.trained_on), accumulated):
            optimizer.zero_grad()
            for batch in model.trained_on[start : start + accumulated]:
                (sum(square_losses(twin.net, batch).values()) / accumulated).backward()
            optimizer.step()
            scheduler.step(*[None] * accumulated)
        assert next(drawn, None) is None
        assert same(model.state_dict(), twin.state_dict(), 1e-6)

    def test_a_streamed_dataset_is_read_on(self, tmp_path):
        losses, model = Losses(), FourTasks()
        trained = trainer(tmp_path, model, callback("dynamic", losses=losses), max_steps=6)
        trained.train_dataset = Streamed()
        trained.train()
        first = torch.cat([row["x"] for row in Streamed()]).reshape(EXAMPLES, -1)
        # Three updates, and the look of the first step at what can be masked.
        assert torch.equal(torch.cat(losses.scored_on), first[: 4 * SIZE])

    @pytest.mark.parametrize("mode", MODES)
    def test_in_half_precision(self, tmp_path, mode):
        """Scored under the autocast of the training: the layers see, and return, bfloat16."""
        model, kinds = FourTasks(), []
        model.net.abc.register_forward_hook(lambda layer, inputs, output: kinds.append(output.dtype))
        losses = lambda model, batch: {"sum": model(**batch)["loss"], "again": model(**batch)["loss"]}  # noqa: E731
        train(tmp_path, model, callback(mode, losses=losses), bf16=True)
        assert set(kinds) == {torch.bfloat16}
        assert alive_count(model) == half(model)[1]


@pytest.mark.parametrize("mode", MODES)
class TestCheckpoints:
    def test_a_resumed_run_is_the_run_that_never_stopped(self, tmp_path, mode):
        whole, resumed = FourTasks(), FourTasks(seed=1)
        train(tmp_path, whole, callback(mode), save_strategy="epoch")
        path = tmp_path / f"checkpoint-{STEPS}"
        saved = load_file(path / "model.safetensors")
        assert any(name.endswith("weight_mask") for name in saved)
        train(tmp_path / "resumed", resumed, callback(mode), resume=path)
        assert same(whole.state_dict(), resumed.state_dict())

    def test_a_further_train_goes_on(self, tmp_path, mode):
        model, pruning = FourTasks(), callback(mode)
        told = warned(UserWarning, "or train on") if mode == "gradual" else contextlib.nullcontext()
        with told:
            trained = train(tmp_path, model, pruning, num_train_epochs=1)
        before = alive_count(model)
        trained.train()
        assert alive_count(model) <= before
        trained.train()
        assert alive_count(model) == half(model)[1]

    def test_folded_at_the_end(self, tmp_path, mode):
        model, pruning = FourTasks(), callback(mode, fold=True)
        trained = train(tmp_path, model, pruning)
        assert not any(prune.is_pruned(layer) for layer in model.modules())
        assert sum(int((layer.weight != 0).sum()) for layer, _ in keys(model)) <= half(model)[1]
        trained.save_model(tmp_path / "plain")
        plain = FourTasks(seed=1)
        plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
        assert same(plain.state_dict(), model.state_dict())
        trained.train()
        assert sum(int((layer.weight != 0).sum()) for layer, _ in keys(model)) <= half(model)[1]


class TestResuming:
    def test_a_dense_checkpoint_is_pruned(self, tmp_path):
        train(tmp_path, FourTasks(), save_strategy="epoch")
        model = FourTasks(seed=1)
        path = tmp_path / f"checkpoint-{STEPS}"
        train(tmp_path / "resumed", model, callback("static"), resume=path, save_strategy="epoch")
        assert alive_count(model) == half(model)[1]

    @pytest.mark.parametrize("epoch", [1, 2])
    def test_two_callbacks_find_their_own_states(self, tmp_path, epoch):
        def both():
            heads = callback("gradual", 0.3, exclude=["net.unused", "net.abc", "net.ab", "net.d"])
            return callback("gradual", 0.6, exclude=["net.unused", "net.heads"]), heads

        whole, resumed, twice = FourTasks(), FourTasks(seed=1), FourTasks(seed=2)
        train(tmp_path, whole, *both(), save_strategy="epoch")
        callbacks = both()
        path = tmp_path / f"checkpoint-{epoch * STEPS}"
        train(tmp_path / "resumed", resumed, *callbacks, resume=path, save_strategy="epoch")
        assert same(whole.state_dict(), resumed.state_dict())
        assert [round(own.sparsity, 1) for own in callbacks] == [0.6, 0.3]
        path = tmp_path / "resumed" / f"checkpoint-{3 * STEPS}"
        train(tmp_path / "twice", twice, *both(), resume=path, num_train_epochs=4)
        assert {name: int(mask.sum()) for name, mask in masks_of(twice).items()} == {
            name: int(mask.sum()) for name, mask in masks_of(whole).items()
        }

    @pytest.mark.parametrize("mode", ["gradual", "dynamic"])
    def test_two_callbacks_fold_their_own_masks(self, tmp_path, mode):
        def both(**options):
            heads = callback(mode, exclude=["net.unused", "net.abc", "net.ab", "net.d"], **options)
            return callback(mode, exclude=["net.unused", "net.heads"], **options), heads

        whole, folded = FourTasks(), FourTasks()
        train(tmp_path, whole, *(kept := both()))
        trained = train(tmp_path, folded, *(own := both(fold=True)))
        assert masks_of(folded) == {}
        assert same(fold(clone_pruned(whole)).state_dict(), folded.state_dict())
        assert [one.sparsity for one in own] == [one.sparsity for one in kept]
        zeros = {name: weight == 0 for name, weight in folded.state_dict().items() if name.endswith("weight")}
        if mode == "gradual":  # the masks come back
            trained.train()
            assert all((folded.state_dict()[name][zero] == 0).all() for name, zero in zeros.items())

    def test_an_optimizer_with_one_group_for_weights_and_biases(self, tmp_path, monkeypatch):
        def create_optimizer(trainer, *_):
            trainer.optimizer = trainer.optimizer or torch.optim.Adam(trainer.model.parameters(), lr=0.01)
            return trainer.optimizer

        monkeypatch.setattr(client("transformers").Trainer, "create_optimizer", create_optimizer)
        whole, resumed = FourTasks(), FourTasks(seed=1)
        train(tmp_path, whole, callback("dynamic"), save_strategy="epoch")
        path = tmp_path / f"checkpoint-{STEPS}"
        train(tmp_path / "resumed", resumed, callback("dynamic"), resume=path, save_strategy="epoch")
        assert same(whole.state_dict(), resumed.state_dict())

    def test_checkpoints_of_two_callbacks_do_not_grow(self, tmp_path):
        two = [callback("static", exclude=["net.unused", layer]) for layer in ("net.abc", "net.ab")]
        train(tmp_path, FourTasks(), *two, save_strategy="epoch")
        for epoch in (1, 2, 3):
            state = json.loads((tmp_path / f"checkpoint-{epoch * STEPS}" / "trainer_state.json").read_text())
            assert len(state["stateful_callbacks"]["DiSparseTrainerCallback"]) == 2

    def test_another_mode_takes_over_the_masks_only(self, tmp_path):
        train(tmp_path, FourTasks(), callback("static"), save_strategy="epoch")
        model = FourTasks(seed=1)
        path = tmp_path / f"checkpoint-{STEPS}"
        saved = load_file(path / "model.safetensors")
        options = {"update_every": 2, "stop_at": 100, "drop_fraction": 0.0}
        train(tmp_path / "resumed", model, callback("dynamic", **options), resume=path)
        masks = {name: mask for name, mask in model.state_dict().items() if name.endswith("weight_mask")}
        assert same(masks, {name: mask for name, mask in saved.items() if name.endswith("weight_mask")})

    def test_the_best_model_comes_back_with_its_masks(self, tmp_path):
        model = FourTasks()
        with warned(UserWarning, "model: must be as pruned"):
            trained = train(tmp_path, model, callback("gradual"), **BEST)
        assert trained.state.best_global_step < 3 * STEPS
        saved = load_file(f"{trained.state.best_model_checkpoint}/model.safetensors")
        assert same(model.state_dict(), saved)

    @pytest.mark.parametrize(("mode", "start", "told"), [("pretrained", STEPS + 1, "0.0%"), ("gradual", 2, "28.7%")])
    def test_a_best_model_of_before_the_pruning_ended_is_told(self, tmp_path, mode, start, told):
        model, pruning = FourTasks(), callback(mode, start_at=start)
        with warned(UserWarning, rf"found {told} of the weights masked, of 49\.5%: .* eval_delay"):
            trained = train(tmp_path, model, pruning, **BEST)
        assert trained.state.best_global_step == STEPS
        masked = sum(int((layer.weight == 0).sum()) for layer, _ in keys(model))
        assert pruning.sparsity == pytest.approx(masked / half(model)[0])

    def test_the_best_of_those_after_the_pruning_is_fully_pruned(self, tmp_path):
        model, pruning = FourTasks(), callback("pretrained")
        train(tmp_path, model, pruning, eval_delay=1, **BEST)
        assert alive_count(model) == half(model)[1]
        assert pruning.sparsity == 1 - half(model)[1] / half(model)[0]

    def test_other_options_than_the_checkpoint(self, tmp_path):
        train(tmp_path, FourTasks(), callback("gradual"), save_strategy="epoch")
        path = tmp_path / f"checkpoint-{STEPS}"
        with pytest.raises(ValueError, match=r"same options, found other update_every 3 \(saved: 2\)"):
            train(tmp_path / "resumed", FourTasks(), callback("gradual", update_every=3), resume=path)


class TestPretrainedModels:
    """A ``PreTrainedModel`` brings its own ways to save and load."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        train(tmp_path, pretrained_model(), callback("static"), save_strategy="epoch")
        return tmp_path / f"checkpoint-{STEPS}"

    def test_resumed_with_the_callback(self, tmp_path, checkpoint):
        model = pretrained_model()
        train(tmp_path / "resumed", model, callback("static"), resume=checkpoint)
        whole = load_file(tmp_path / f"checkpoint-{3 * STEPS}" / "model.safetensors")
        assert same(model.state_dict(), whole)

    def test_resumed_without_it_the_weights_are_not_even_loaded(self, tmp_path, checkpoint):
        """Why the callback is needed: the Trainer loads without checking names, and says so in a log line only."""
        model = pretrained_model()
        before = model.net.abc.weight.detach().clone()
        train(tmp_path / "resumed", model, resume=checkpoint, num_train_epochs=1)  # at its end already
        assert masks_of(model) == {}
        assert not any(bool((layer.weight == 0).any()) for layer, _ in keys(model))
        assert torch.equal(model.net.abc.weight, before)

    def test_from_pretrained_knows_no_masks(self, checkpoint):
        kind = type(pretrained_model())
        _, info = kind.from_pretrained(checkpoint, output_loading_info=True)
        assert "net.abc.weight" in info["missing_keys"]
        assert "net.abc.weight_orig" in info["unexpected_keys"]

    def test_from_pretrained_of_a_folded_model(self, tmp_path):
        model = pretrained_model()
        trained = train(tmp_path, model, callback("static", fold=True))
        trained.save_model(tmp_path / "plain")
        assert same(type(model).from_pretrained(tmp_path / "plain").state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_have_the_same_masks(tmp_path, mode):
    client("transformers")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", CLIENTS / "hf_runs.py"]
    done = python(*launch, tmp_path, mode)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not any(torch.equal(*batches) for batches in zip(first["trained_on"], second["trained_on"], strict=True))
    assert any(bool((~mask).any()) for mask in first["masks"].values())
    assert same(first["masks"], second["masks"])


def test_what_was_chosen_is_shown():
    assert repr(callback("static", exclude=["net.d"])) == (
        "DiSparseTrainerCallback(mode='static', amount=0.5, exclude=['net.d'], num_batches=3)"
    )


class TestRefusals:
    def test_a_callback_added_after_the_weights_were_to_be_loaded(self, tmp_path):
        train(tmp_path, FourTasks(), save_strategy="epoch")
        late = trainer(tmp_path / "resumed", FourTasks())
        late.add_callback(callback("static"))
        with pytest.raises(ValueError, match="callbacks: must hold the callback when the Trainer is made"):
            late.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))

    def test_a_model_that_the_trainer_makes_anew(self, tmp_path):
        train(tmp_path, None, callback("static"), model_init=pretrained_model, save_strategy="epoch")
        path = tmp_path / f"checkpoint-{STEPS}"
        with pytest.raises(
            ValueError, match=r"model_init: must be left out for a run .* use Trainer\(model=model_init\(\), "
        ):
            train(tmp_path / "refused", None, callback("static"), model_init=pretrained_model, resume=path)
        model = pretrained_model()
        train(tmp_path / "resumed", model, callback("static"), resume=path)  # as it says
        assert same(model.state_dict(), load_file(tmp_path / f"checkpoint-{3 * STEPS}" / "model.safetensors"))

    def test_callback_states_that_the_trainer_restores(self, tmp_path):
        with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint must be False"):
            trainer(tmp_path, FourTasks(), callback("static"), restore_callback_states_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"mode": "static", "amount": 1.5}, ValueError, "amount: a float must be a fraction"),
            ({"mode": "static", "stop_at": 9}, ValueError, "stop_at: must be left out with mode='static'"),
            ({"mode": "static", "stop": 9}, TypeError, "unexpected keyword argument 'stop'"),
            ({"mode": "dynamic", "losses": {"a": 1}}, TypeError, "losses: must be a function .* found dict"),
        ],
    )
    def test_options(self, given, error, message):
        with pytest.raises(error, match=message):
            callback(**given)
