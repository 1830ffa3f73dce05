"""remove_channels on transformers: whole heads, RMSNorm, torch's own attention, side branches, stored widths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disparse_plugin.structured import remove_channels, replay_removal
from disparse_plugin.structured.cuts import Cut
from disparse_plugin.structured.masked_copy import masked_copy
from disparse_plugin.structured.means import over_kept
from structured_networks import build, deviation
from structured_networks import losses as dense_and_label


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def two_losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    a, b = model(**batch) if isinstance(batch, dict) else model(batch)
    return {"a": a.square().mean() + a.mean(), "b": b.square().mean() + b.mean()}


def check(model: nn.Module, x: Any, path: Path, amount: float = 0.5) -> Any:
    """Remove; the smaller model equals masking on other data, trains, and is replayed from the file."""
    full, fresh = copy.deepcopy(model), copy.deepcopy(model)
    report = remove_channels(model, two_losses, [x], x, amount)
    assert report.deviation < 1e-6
    other = {k: v.flip(0) for k, v in x.items()} if isinstance(x, dict) else torch.randn_like(x)
    soft = masked_copy(full, report.plan.cuts)
    with torch.no_grad():
        call = (lambda m: m(**other)) if isinstance(x, dict) else (lambda m: m(other))
        for one, two in zip(call(soft), call(model.eval()), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    sum(two_losses(model.train(), x).values()).backward()
    report.save(path / "removal.safetensors")
    replay_removal(fresh, path / "removal.safetensors")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(call(model.eval()), call(fresh.eval()), strict=True))
    return report


class LlamaNorm(nn.Module):
    """As in the models of Hugging Face: a class of its own, with a bare weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ZeroCentredNorm(LlamaNorm):
    """As Gemma's: the gain is one more than the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Three layers and a head width that is stored, as in BERT, ViT, CLIP, Whisper and Llama."""

    def __init__(self, width: int, heads: int, named: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        if named:
            self.num_heads = heads
        self.embed_dim, self.head_dim, self.scale = width, width // heads, (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        count = getattr(self, "num_heads", None)
        assert count is None or mixed.shape[1] == count
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Stream(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], named: bool = True) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2, self.last = nn.Linear(10, 32), norm(32), norm(32), norm(32)
        self.attention = Attention(32, 4, named)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.post, self.pooler = norm(32), nn.Linear(32, 32)
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        h = h + self.attention(self.norm1(h))
        h = self.last(h + self.down(self.up(self.norm2(h)).relu()))
        self.pooler(self.post(h[:, 0])).tanh()  # a side branch that nobody reads
        return self.a(h[:, 0]), self.b(h.mean(1))


NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "Llama": LlamaNorm, "Gemma": ZeroCentredNorm}


@pytest.mark.filterwarnings("ignore:parameters.*reached by no task")
@pytest.mark.parametrize("named", [True, False], ids=["heads stored", "head width only"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_streams_of_every_norm_lose_channels_and_heads_go_whole(norm: str, named: bool, tmp_path: Path) -> None:
    model = Stream(NORMS[norm], named).eval()
    report = check(model, torch.randn(3, 7, 10), tmp_path)
    assert report.parameters.removed > 0.4
    assert set(report.skipped) == {"a", "b", "pooler"}
    attention = model.attention
    assert attention.q_proj.out_features % 8 == 0
    assert attention.q_proj.out_features == attention.v_proj.out_features == attention.o_proj.in_features
    assert (attention.head_dim, attention.scale) == (8, 8**-0.5)
    assert attention.q_proj.in_features == model.pooler.in_features == model.embed.out_features < 32
    assert model.pooler.out_features == 32
    assert model.post.weight.shape == (model.embed.out_features,)
    if named:
        assert attention.num_heads == attention.q_proj.out_features // 8


@pytest.mark.filterwarnings("ignore:parameters.*reached by no task")
def test_the_heads_that_go_are_those_that_all_tasks_rank_low() -> None:
    model = Stream(nn.LayerNorm).eval()
    with torch.no_grad():
        model.attention.v_proj.weight[8:16] *= 1e-4
        model.attention.q_proj.weight[8:16] *= 1e-4
    x = torch.randn(3, 7, 10)
    kept = model.attention.q_proj.weight.clone()
    report = remove_channels(model, two_losses, [x], x, 8, exclude=["embed", "up", "down"])
    assert report.groups["attention.v_proj"].channels.after == 24
    cut = next(cut for cut in report.plan.cuts if cut.target == "attention.q_proj" and cut.side == "out")
    assert cut.positions.tolist() == list(range(8, 16))
    torch.testing.assert_close(model.attention.q_proj.weight, torch.cat([kept[:8], kept[16:]]))


def test_separate_layers_of_a_test_network_lose_whole_heads() -> None:
    model = build("separate")
    full = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    report = remove_channels(model, dense_and_label, [x], x, 0.6)
    assert model.attn.heads * 8 == model.attn.q.out_features
    assert model.attn.key_heads == model.attn.heads
    assert deviation(masked_copy(full, report.plan.cuts), model) < 1e-5


class Biased(nn.Module):
    """An attention with a table of relative positions: one number for each distance and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Linear(10, 24), nn.Embedding(13, 4)
        self.n_heads, self.head_dim = 4, 8
        self.q, self.k, self.v, self.o = *(nn.Linear(24, 32) for _ in range(3)), nn.Linear(32, 24)
        self.a, self.b = nn.Linear(24, 4), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        q, k, v = (layer(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1])
        bias = self.table(places[None] - places[:, None] + 6).permute(2, 0, 1)
        mixed = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        h = x + self.o(mixed.transpose(1, 2).flatten(2))
        return self.a(h[:, 0]), self.b(h.mean(1))


def test_a_table_of_relative_positions_loses_the_columns_of_the_heads(tmp_path: Path) -> None:
    model = Biased().eval()
    report = check(model, torch.randn(2, 7, 10), tmp_path)
    assert set(report.skipped) == {"a", "b"}
    assert model.table.weight.shape == (13, model.n_heads)
    assert model.q.out_features == 8 * model.n_heads < 32


class Twins(nn.Module):
    """Two streams that read one embedding under two names, as an encoder and a decoder do; a third never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.shared = (nn.Embedding(20, 16) for _ in range(3))
        self.one.weight = self.two.weight = self.shared.weight
        self.up, self.down, self.deep = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.one(ids), self.two(ids.flip(1))
        first = first + self.down(self.up(first).relu())
        return self.a(first).mean(1), self.b(second + self.deep(second).relu()).mean(1)


def test_streams_with_one_embedding_lose_the_same_channels(tmp_path: Path) -> None:
    model, ids = Twins().eval(), torch.randint(0, 20, (3, 7))
    full, fresh = copy.deepcopy(model), copy.deepcopy(model)
    report = remove_channels(model, two_losses, [ids], ids, 0.5)
    assert model.one.weight is model.two.weight is model.shared.weight
    assert model.a.in_features == model.b.in_features == model.one.embedding_dim == model.shared.embedding_dim < 16
    assert report.parameters.after == sum(p.numel() for p in model.parameters())
    for one, other in zip(masked_copy(full, report.plan.cuts)(ids), model(ids), strict=True):
        torch.testing.assert_close(one, other)
    report.save(tmp_path / "removal.safetensors")
    replay_removal(fresh, tmp_path / "removal.safetensors")
    assert fresh.one.weight is fresh.shared.weight


class Encoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(self.embed(x))
        return self.a(h[:, 0]), self.b(h.mean(1))


def test_multihead_attention_takes_the_scale_of_its_new_width(tmp_path: Path) -> None:
    model = Encoder().eval()
    report = check(model, torch.randn(2, 7, 10), tmp_path)
    attention = model.body.layers[0].self_attn
    assert report.parameters.removed > 0.5
    assert attention.embed_dim == 4 * attention.head_dim == model.embed.out_features < 32
    assert attention.in_proj_weight.shape == (3 * attention.embed_dim, attention.embed_dim)


class Signed(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.sign() * x.sum(-1, keepdim=True)


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2: norms over places, divided by their mean over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * x * (size / size.mean(-1, keepdim=True)) + self.bias


@pytest.mark.parametrize("norm", [LlamaNorm(8), ZeroCentredNorm(8), ResponseNorm(8)])
def test_means_over_channels_are_found_by_trying(norm: nn.Module) -> None:
    x, gone, kept = torch.randn(2, 3, 5, 8), torch.tensor([1, 4]), [0, 2, 3, 5, 6, 7]
    cuts = [Cut(f"norm.{name}", "parameter", 0, 8, gone) for name, _ in norm.named_parameters()]
    narrow = type(norm)(6)
    narrow.load_state_dict({name: value[kept] for name, value in norm.state_dict().items()})
    hook = over_kept(norm, cuts)
    assert hook is not None
    found = hook(norm, (x,), norm(x))
    torch.testing.assert_close(found[..., kept], narrow(x[..., kept]))
    assert not found[..., gone].any()


def test_a_sum_over_channels_is_no_mean() -> None:
    x, norm = torch.randn(2, 8), Signed(8)
    hook = over_kept(norm, [Cut("norm.weight", "parameter", 0, 8, torch.tensor([1, 4]))])
    assert hook is not None
    assert hook(norm, (x,), norm(x)) is None


class StandardConv(nn.Conv2d):
    """As in NFNet: each output's weights are standardised over its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(
            x, weight / weight.std((1, 2, 3), keepdim=True, correction=0), self.bias, padding=1, groups=self.groups
        )


class Standardised(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.body = StandardConv(3, 16, 3), StandardConv(16, 16, 3, groups=groups)
        self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(self.stem(x).relu()).relu()
        return self.a(h.mean((2, 3))), self.b(h.amax((2, 3)))


@pytest.mark.parametrize("groups", [1, 4])
def test_standardised_weights_are_standardised_over_what_is_left(groups: int, tmp_path: Path) -> None:
    report = check(Standardised(groups).eval(), torch.randn(2, 3, 8, 8), tmp_path)
    assert report.parameters.removed > 0.4
    assert set(report.skipped) == {"a", "b"}


class Fused(nn.Module):
    """Layers for queries and for keys with values, and an attention that takes its own scale, as in PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.kv, self.proj = (nn.Linear(n, m) for n, m in ((10, 32), (32, 32), (32, 64), (32, 32)))
        self.heads, self.head_dim = 4, 8
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        n, t, width = h.shape
        q = self.q(h).reshape(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(h).reshape(n, t, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        return self.a(h[:, 0]), self.b(h.mean(1))


def test_the_masked_attention_takes_the_scale_of_what_is_left(tmp_path: Path) -> None:
    model = Fused().eval()
    report = check(model, torch.randn(2, 5, 10), tmp_path)
    assert set(report.skipped) == {"a", "b"}
    assert model.q.out_features == 4 * model.head_dim == model.embed.out_features < 32


def test_a_weight_that_another_module_multiplies_with_is_followed(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Linear(10, 16), nn.Linear(16, 16)
            self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.linear(self.embed(x).relu(), self.inner.weight, self.inner.bias).relu()  # inner itself never runs
            return self.a(h), self.b(h)

    report = check(Reader().eval(), torch.randn(4, 10), tmp_path)
    assert set(report.skipped) == {"a", "b"}
    assert report.parameters.removed > 0.4


class Halved(nn.Module):
    """A gated unit that splits its own layer in two by a width that it stores."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner, self.both, self.out = inner, nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.both(x).split(self.inner, -1)
        return self.out(F.silu(one) * two)


class Viewed(nn.Module):
    """Scales its channels through a shape that it stores as a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape, self.scale = (1, 1, width), nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scaled = nn.Linear(10, 24), Viewed(24)
        self.deep, self.a, self.b = nn.Linear(24, 20), nn.Linear(20, 4), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.deep(self.scaled(self.embed(x)).relu()).relu()
        return self.a(h), self.b(h)


def test_widths_that_modules_store_are_rewritten(tmp_path: Path) -> None:
    model = Stored().eval()
    report = check(model, torch.randn(2, 7, 10), tmp_path)
    assert model.embed.out_features < 24
    assert model.scaled.shape == (1, 1, model.embed.out_features)
    assert report.plan.attributes == {"scaled": {"shape": model.scaled.shape}}


def huggingface(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    t = pytest.importorskip("transformers", reason="needs transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"input_ids": torch.randint(3, 99, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    decoder = {**small, "vocab_size": 99, "max_position_embeddings": 64, "use_cache": False}
    image = {**small, "image_size": 32, "patch_size": 8}

    def bert() -> nn.Module:
        return t.BertModel(t.BertConfig(vocab_size=99, **small))

    def llama() -> nn.Module:
        return t.LlamaModel(t.LlamaConfig(**decoder, num_key_value_heads=4))

    def gpt2() -> nn.Module:
        config = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=1,
                              eos_token_id=2)  # fmt: skip
        return t.GPT2Model(config)

    builders: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "bert": (bert, ids),
        "llama": (llama, ids),
        "gpt2": (gpt2, ids),
        "vit": (lambda: t.ViTModel(t.ViTConfig(**image)), pixels),
        "qwen3": (lambda: t.Qwen3Model(t.Qwen3Config(**decoder, num_key_value_heads=4, head_dim=8)), ids),
    }
    build_body, inputs = builders[name]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = build_body(), nn.Linear(32, 4), nn.Linear(32, 3)

        def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(**inputs).last_hidden_state[:, -1]
            return self.a(h), self.b(h)

    return Two().eval(), inputs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parameters.*reached by no task")
@pytest.mark.parametrize(
    ("name", "least"), [("bert", 0.6), ("llama", 0.6), ("gpt2", 0.4), ("vit", 0.6), ("qwen3", 0.6)]
)
def test_models_of_hugging_face(name: str, least: float, tmp_path: Path) -> None:
    model, inputs = huggingface(name)
    assert check(model, inputs, tmp_path).parameters.removed > least
