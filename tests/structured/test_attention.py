"""Whole attention heads, removed by torch-pruning's own pruners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from disparse_plugin.structured import attention_heads, record_removal, remove_channels, sync_attention
from disparse_plugin.structured.masked_copy import masked_copy
from structured_networks import batches, build, deviation, make_pruner

SETTINGS: dict[str, Any] = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "pruning_ratio": 0.25}

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def fused(**options: Any) -> Any:
    """Make a pruner for two attentions of four heads of width eight, each with one layer for query, key and value."""
    return make_pruner(build("transformer"), **{**SETTINGS, **options})


def separate(kind: str, heads: int, key_heads: int, **options: Any) -> Any:
    model = build(kind)
    counts = {model.attn.q: heads, model.attn.k: key_heads, model.attn.v: key_heads}
    return make_pruner(model, **{**SETTINGS, "num_heads": counts, **options})


def counts_of(pruner: Any) -> list[int]:
    return [block.attn.num_heads for block in pruner.model.blocks]


def step(pruner: Any) -> nn.Module:
    """Take one step; return the model of before with the same places masked."""
    full, recording = copy.deepcopy(pruner.model), record_removal(pruner)
    pruner.step()
    sync_attention(pruner.num_heads, pruner.model)
    return masked_copy(full, recording.plan.cuts)


@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "local"])
@pytest.mark.parametrize("dims", [True, False], ids=["dims", "heads only"])
@pytest.mark.parametrize("across", [None, "mean"])
def test_half_of_the_heads(everywhere: bool, dims: bool, across: str | None) -> None:
    pruner = fused(global_pruning=everywhere, prune_head_dims=dims, options={"across": across})
    soft = step(pruner)
    heads = counts_of(pruner)
    assert sum(heads) == 4
    assert min(heads) >= 1
    assert everywhere or heads == [2, 2]
    widths = [b.attn.qkv.out_features // 3 // count for b, count in zip(pruner.model.blocks, heads, strict=True)]
    assert max(widths) <= 8 if dims else widths == [8, 8]
    assert deviation(soft, pruner.model) < 1e-5
    assert deviation(build("transformer"), pruner.model) > 1e-3
    sum(out.sum() for out in pruner.model(batches()[0]).values()).backward()


def test_a_head_goes_only_if_every_task_ranks_it_low() -> None:
    """From the definition: percentile of each head's mean score per task, the larger one, the lowest half goes."""
    pruner = fused(prune_head_dims=False, options={"across": None})
    order = {block.attn.proj: number for number, block in enumerate(pruner.model.blocks)}
    scores: dict[int, dict[str, torch.Tensor]] = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        attention = pruner._downstream_node_as_root_if_attention(group)
        if attention is not None:
            raw = pruner.importance.task_scores(attention)
            scores[order[attention[0].dep.target.module]] = {t: v.view(4, -1).mean(1) for t, v in raw.items()}
    worst = torch.zeros(8, dtype=torch.int64)
    for task in ("dense", "label"):
        ranks = torch.cat([scores[0][task], scores[1][task]]).argsort().argsort()
        worst = torch.maximum(worst, ranks)
    recording = record_removal(pruner)
    pruner.step()
    gone = {cut.target: cut.positions for cut in recording.plan.cuts if cut.side == "in"}
    removed = {
        4 * number + int(position) // 8
        for number in range(2)
        for position in gone.get(f"blocks.{number}.attn.proj", torch.tensor([]))
    }
    assert len(removed) == 4
    kept = set(range(8)) - removed
    assert max(int(worst[head]) for head in removed) <= min(int(worst[head]) for head in kept)


def test_heads_go_in_several_steps() -> None:
    pruner = fused(iterative_steps=2, prune_head_dims=False, pruning_ratio=0.4)
    found = []
    for _ in range(2):
        soft = step(pruner)
        assert deviation(soft, pruner.model) < 1e-5
        found.append(sum(counts_of(pruner)))
    assert found == [6, 4]


def test_a_step_in_which_no_head_goes() -> None:
    """Four heads of eight in six steps: in some of them, none; torch-pruning alone fails there."""
    pruner = fused(iterative_steps=6, prune_head_dims=False)
    found = []
    for _ in range(6):
        step(pruner)
        found.append(sum(counts_of(pruner)))
    assert found == [7, 6, 6, 5, 4, 4]


def test_each_attention_its_own_ratio() -> None:
    model = build("transformer")
    ratios = {model.blocks[0].attn.qkv: 0.25, model.blocks[1].attn.qkv: 0.75}
    options = {"head_pruning_ratio_dict": ratios, "prune_head_dims": False, "global_pruning": False}
    pruner = make_pruner(model, **{**SETTINGS, **options})
    soft = step(pruner)
    assert counts_of(pruner) == [3, 1]
    assert deviation(soft, model) < 1e-5


def test_all_heads_of_a_layer_is_refused() -> None:
    pruner = fused(head_pruning_ratio=0.9, global_pruning=False)
    with pytest.raises(ValueError, match="head_pruning_ratio"):
        pruner.step()
    assert pruner.model.blocks[0].attn.qkv.out_features == 96


def test_heads_without_channels_are_refused() -> None:
    """torch-pruning would do nothing, without a word."""
    with pytest.raises(ValueError, match="pruning_ratio: must be above 0"):
        fused(pruning_ratio=0.0)


@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "local"])
def test_query_key_and_value_in_three_layers(everywhere: bool) -> None:
    pruner = separate("separate", 4, 4, global_pruning=everywhere, prune_head_dims=False)
    attention = pruner.model.attn
    soft = step(pruner)
    attention.heads = attention.key_heads = pruner.num_heads[attention.q]  # one's own module: one's own attributes
    assert attention.heads == 2
    assert [layer.out_features for layer in (attention.q, attention.k, attention.v)] == [16, 16, 16]
    assert pruner.model.patch.out_channels == (22 if everywhere else 24)  # globally, the heads' width counts too
    assert deviation(soft, pruner.model) < 1e-5


def test_fewer_keys_than_queries_are_left_alone() -> None:
    pruner = separate("grouped-query", 4, 2)
    assert "grouped-query attention" in pruner.importance.skipped["attn.q"]
    soft = step(pruner)
    assert pruner.model.attn.q.out_features == 32
    assert pruner.model.patch.out_channels < 32
    assert deviation(soft, pruner.model) < 1e-5
    alone = build("grouped-query")
    counts = {alone.attn.q: 4, alone.attn.k: 2, alone.attn.v: 2}
    theirs = tp.pruner.BasePruner(
        alone,
        (batches()[0],),
        importance=tp.importance.GroupMagnitudeImportance(),
        ignored_layers=[alone.dense_out, alone.label_out],
        num_heads=counts,
        **SETTINGS,
    )
    theirs.step()
    alone.attn.heads, alone.attn.key_heads = counts[alone.attn.q], counts[alone.attn.k]
    with pytest.raises(RuntimeError):  # why we leave it alone
        alone(batches()[0])


class UnlikeAttention(nn.Module):
    """Attention with values wider than queries and keys, as in EfficientFormer, and a scale of its own."""

    def __init__(self, width, heads, key_dim, value_dim, scale):
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim, self.scale = heads, key_dim, value_dim, scale
        self.qkv = nn.Linear(width, heads * (2 * key_dim + value_dim))
        self.proj = nn.Linear(heads * value_dim, width)

    def forward(self, x):
        batch, length, _ = x.shape
        parts = self.qkv(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        query, key, value = parts.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        mixed = ((query @ key.transpose(-2, -1)) * self.scale).softmax(-1) @ value
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Tokens, one attention layer, and two heads."""

    def __init__(self, attention):
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 12), attention
        self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x):
        features = self.attention(self.embed(x))
        return self.a(features), self.b(features)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(2, 8), (4, 4)], ids=["unlike widths", "a scale of its own"])
def test_attention_that_loses_only_inputs_keeps_its_scale(key_dim, value_dim):
    torch.manual_seed(0)
    model = Tokens(UnlikeAttention(12, 2, key_dim, value_dim, scale=0.37)).eval()
    x = torch.randn(4, 5, 6)
    ignored = [model.attention.qkv]
    report = remove_channels(model, square_sums, [x], x, amount=0.5, exclude=ignored)
    assert model.attention.scale == 0.37
    assert model.embed.out_features < 12
    assert report.deviation < 1e-5


def square_sums(model, x):
    return {str(task): output.square().mean() for task, output in enumerate(model(x))}


def test_only_attention_of_three_like_parts_is_known_as_such():
    like, unlike = UnlikeAttention(12, 2, 4, 4, 0.5), UnlikeAttention(12, 2, 2, 8, 0.5)
    assert attention_heads(nn.ModuleList([like, unlike])) == {like.qkv: 2}
