"""Coded layers against MLX's quantized ones: bit-equal in every mode, and well-behaved members of an MLX model."""

import copy

import numpy as np
import pytest
from mlx_models import need_mlx

need_mlx()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear  # noqa: E402
from mlx_lm.utils import compute_bits_per_weight, dequantize_model, get_total_parameters  # noqa: E402
from tersor.mlx import (  # noqa: E402
    MODES,
    AutoMode,
    EntropyCodedEmbedding,
    EntropyCodedLinear,
    LruMode,
    coded_layers,
    entropy_code,
    entropy_decode,
    set_decode_mode,
    statistics,
)
from tersor.mlx.kernels import device, layout, mirror  # noqa: E402
from tersor.mlx.modes import GpuAsyncMode  # noqa: E402


class Block(nn.Module):
    """Linear layers of several shapes and a tied embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(300, 128)
        self.layers = [nn.Linear(128, 128) for _ in range(3)]
        self.up = nn.Linear(128, 1024, bias=False)
        self.down = nn.Linear(1024, 128)

    def __call__(self, tokens):
        h = self.embedding(tokens)
        for layer in self.layers:
            h = h + nn.relu(layer(h))
        return self.embedding.as_linear(h + self.down(self.up(h)))


TOKENS = mx.array([[0, 5, 299, 7], [5, 5, 128, 1]])


@pytest.fixture
def quantized() -> Block:
    mx.random.seed(0)
    model = Block()
    nn.quantize(model, 64, 4)
    return model


@pytest.fixture
def coded(quantized) -> Block:
    model = copy.deepcopy(quantized)
    entropy_code(model)
    return model


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.mark.parametrize("mode", MODES)
def test_from_linear_equals_mlx(mode):
    linear = nn.Linear(512, 512)
    plain = nn.QuantizedLinear.from_linear(linear, 64, 4)
    layer = EntropyCodedLinear.from_linear(linear, decode_mode=mode)
    assert layer.decode_mode == mode
    for tokens in (1, 3):
        x = mx.random.normal((2, tokens, 512))
        for _ in range(3):  # later calls run ahead of the first
            assert same(layer(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_blocks_equal_the_whole(mode, group_size, dtype):
    """Wide enough for several blocks of the fused mode, rows that fill no chunk."""
    linear = nn.Linear(1024, 2500, bias=False)
    linear.set_dtype(dtype)
    plain = nn.QuantizedLinear.from_linear(linear, group_size, 4)
    layer = EntropyCodedLinear.from_quantized(plain, decode_mode=mode)
    assert layer.matrix.block_rows < 2500
    x = mx.random.normal((1, 1024)).astype(dtype)
    assert same(layer(x), plain(x))
    assert same(layer.weight, plain.weight)
    assert same(layer.to_quantized().weight, plain.weight)


@pytest.mark.parametrize("codec", ["rans", "rans-precise", "huffman", "block-ans", "tiered", "rans-pairs", "fixed"])
@pytest.mark.parametrize("mode", MODES)
def test_every_codec_equals_mlx(mode, codec):
    plain = nn.QuantizedLinear.from_linear(nn.Linear(256, 300), 64, 4)
    layer = EntropyCodedLinear.from_quantized(plain, decode_mode=mode, codec=codec)
    x = mx.random.normal((2, 256))
    for _ in range(2):
        assert same(layer(x), plain(x))


@pytest.mark.parametrize("mode", [*MODES, LruMode(70_000), LruMode(70_000, "lru"), LruMode(70_000, "mru"), AutoMode(70_000)])
def test_models_equal_mlx(quantized, coded, mode):
    decoder = set_decode_mode(coded, mode)
    expected = quantized(TOKENS)
    for _ in range(3):
        assert same(coded(TOKENS), expected)
    if isinstance(decoder, LruMode) and decoder.budget_nbytes < 1 << 20:
        assert decoder.resident_nbytes() <= 70_000
        assert decoder.misses > 0


def test_mode_switches_at_run_time(quantized, coded):
    expected = quantized(TOKENS)
    for mode in [*MODES, *reversed(MODES)]:
        set_decode_mode(coded, mode)
        assert same(coded(TOKENS), expected)
        coded.up.decode_mode = "fused"  # one layer may differ
        assert same(coded(TOKENS), expected)


def test_residency_of_modes(coded):
    decoded = sum(layer.matrix.decoded_nbytes for _, layer in coded_layers(coded))
    largest = max(layer.matrix.decoded_nbytes for _, layer in coded_layers(coded))
    resident = {}
    for mode in MODES:
        decoder = set_decode_mode(coded, mode)
        for _ in range(2):
            mx.eval(coded(TOKENS))
        resident[mode] = decoder.resident_nbytes()
    assert resident["cached"] == resident["lru"] == resident["auto"] == decoded
    assert 0 < resident["prefetch"] <= 2 * largest
    assert 0 < resident["fused"] <= 2 * largest


@pytest.mark.parametrize("mode", [*MODES, LruMode(0), AutoMode(0)])
def test_peak_memory(mode):
    """MLX's graphs are lazy: a mode that did not evaluate in time would hold all decoded layers at once."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
    entropy_code(model, class_predicate=lambda *_: True)
    decoder = set_decode_mode(model, mode)
    layer_nbytes = model.layers[0].matrix.decoded_nbytes
    x = mx.ones((1, 1024))
    mx.eval(x, model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(2):
        mx.eval(model(x))
    held = (mx.get_peak_memory() - before) / layer_nbytes
    everything = mode in ("cached", "lru", "auto")
    assert 8 <= held < 9 if everything else held < 3, f"{decoder.name} held {held:.1f} layers"


def test_pin_beats_lru_in_a_sweep(coded):
    hits = {}
    for policy in ("pin", "lru", "mru"):
        decoder = set_decode_mode(coded, LruMode(90_000, policy))
        for _ in range(4):
            mx.eval(coded(TOKENS))
        hits[policy] = decoder.hits
        assert decoder.resident_nbytes() <= 90_000
    assert hits["lru"] == 0 < hits["pin"]
    assert hits["mru"] > 0


def test_auto_caches_while_the_budget_lasts(coded):
    layers = [layer for _, layer in coded_layers(coded)]
    decoder = set_decode_mode(coded, AutoMode(0))
    mx.eval(coded(TOKENS))
    assert {decoder.choice(layer).name for layer in layers} == {"fused"}
    decoder = set_decode_mode(coded, AutoMode(30_000))
    mx.eval(coded(TOKENS))
    assert {decoder.choice(layer).name for layer in layers} == {"fused", "cached"}


def test_unknown_names_are_refused(coded):
    linear = nn.Linear(512, 512)
    with pytest.raises(ValueError, match="unknown decode mode 'quick'.*fused"):
        EntropyCodedLinear.from_linear(linear, decode_mode="quick")
    with pytest.raises(ValueError, match="unknown decode mode"):
        coded.up.decode_mode = "quick"
    with pytest.raises(ValueError, match="quick"):
        EntropyCodedLinear.from_linear(linear, codec="quick")
    with pytest.raises(ValueError, match="policy"):
        LruMode(1, "fifo")


@pytest.mark.parametrize("arguments", [{"group_size": 16}, {"group_size": 48}, {"bits": 8}, {"mode": "mxfp4"}])
def test_unsupported_quantizations_are_refused(arguments):
    with pytest.raises(ValueError, match="group size|4 bits"):
        EntropyCodedLinear.from_linear(nn.Linear(512, 512), **arguments)


def test_wrong_shapes_are_refused(quantized):
    with pytest.raises(ValueError, match="groups of 64"):
        EntropyCodedLinear.from_linear(nn.Linear(96, 64))
    layer = EntropyCodedLinear.from_quantized(quantized.up)
    with pytest.raises(ValueError, match="scales"):
        EntropyCodedLinear.from_coded(layer.coded, layer.scales[:5], layer.biases)
    with pytest.raises(ValueError, match="bias"):
        EntropyCodedLinear.from_coded(layer.coded, layer.scales, layer.biases, mx.zeros((3,)))
    with pytest.raises(ValueError):
        EntropyCodedLinear.from_coded(layer.coded[:100], layer.scales, layer.biases)
    eight = nn.QuantizedLinear.from_linear(nn.Linear(128, 128), 64, 8)
    with pytest.raises(ValueError, match="8 bits"):
        EntropyCodedLinear.from_quantized(eight)
    with pytest.raises(ValueError, match="without loss"):
        layer.to_quantized(group_size=32, bits=4)


@pytest.mark.parametrize("mode", MODES)
def test_wrong_inputs_are_refused(quantized, mode):
    layer = EntropyCodedLinear.from_quantized(quantized.up, decode_mode=mode)
    for x in (mx.zeros((2, 64)), mx.zeros((256,)), mx.array(1.0)):
        with pytest.raises(ValueError, match="last dimension must be 128"):
            layer(x)
    x = mx.ones((1, 128))
    assert same(layer(x), quantized.up(x))


def test_damage_is_refused(quantized):
    layer = EntropyCodedLinear.from_quantized(quantized.down)
    bytes_ = np.array(layer.coded)
    bytes_[len(bytes_) // 2] ^= 1
    with pytest.raises(ValueError):
        EntropyCodedLinear.from_coded(mx.array(bytes_), layer.scales, layer.biases)


def test_embedding_lookups(quantized):
    for mode in MODES:
        layer = EntropyCodedEmbedding.from_quantized(quantized.embedding, decode_mode=mode)
        for ids in (TOKENS, mx.array([299]), mx.array([[-1, 0]])):
            assert same(layer(ids), quantized.embedding(ids))
        assert (layer.num_embeddings, layer.dims) == (300, 128)
    fused = EntropyCodedEmbedding.from_quantized(quantized.embedding, decode_mode="fused")
    with pytest.raises(IndexError, match="300"):
        fused(mx.array([300]))


def test_constructors():
    x = mx.random.normal((2, 64))
    layer = EntropyCodedLinear(64, 96, decode_mode="fused")
    assert layer(x).shape == (2, 96) and "bias" in layer
    assert "decode_mode=fused" in repr(layer)
    embedding = EntropyCodedEmbedding(50, 64, 32)
    assert embedding(mx.array([1, 2])).shape == (2, 64)
    assert "coded_bits" in repr(embedding)


@pytest.mark.parametrize("mode", MODES)
def test_compiles(quantized, coded, mode):
    set_decode_mode(coded, mode)
    expected = mx.compile(quantized)(TOKENS)
    compiled = mx.compile(coded)
    for _ in range(2):
        assert same(compiled(TOKENS), expected)
    captured = mx.compile(lambda tokens: coded(tokens), inputs=[coded.state])
    assert same(captured(TOKENS), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_mlx(quantized, coded, mode):
    """Buffers are reused after the forward pass; the backward pass must not read them."""
    set_decode_mode(coded, mode)

    def loss(model):
        def of(h):
            for layer in (*model.layers, model.up, model.down):
                h = nn.relu(layer(h))
            return (model.embedding.as_linear(h) ** 2).sum()

        return of

    h = mx.random.normal((3, 128))
    expected = mx.grad(loss(quantized))(h)
    for _ in range(2):
        assert same(mx.grad(loss(coded))(h), expected)


def test_lora_on_top(quantized, coded):
    models = []
    for model in (quantized, coded):
        mx.random.seed(1)
        model.freeze()
        model.up = LoRALinear.from_base(model.up, r=4)
        model.up.lora_b = mx.random.normal(model.up.lora_b.shape)
        models.append(model)
    assert [name for name, _ in tree_flatten(coded.trainable_parameters())] == ["up.lora_a", "up.lora_b"]
    for mode in MODES:
        set_decode_mode(coded, mode)
        losses = [nn.value_and_grad(m, lambda m=m: (m(TOKENS) ** 2).mean())() for m in models]
        assert same(losses[0][0], losses[1][0])
        for (_, a), (_, b) in zip(tree_flatten(losses[0][1]), tree_flatten(losses[1][1]), strict=True):
            assert same(a, b)
    assert same(coded.up.fuse().weight, quantized.up.fuse().weight)


def test_size_tools(quantized, coded):
    assert get_total_parameters(coded) == get_total_parameters(quantized)
    plain, small = compute_bits_per_weight(quantized), compute_bits_per_weight(coded)
    for mode in MODES:
        set_decode_mode(coded, mode)
        mx.eval(coded(TOKENS))
        assert compute_bits_per_weight(coded) == small  # buffers and caches are no parameters
    assert small < plain + 0.5
    counted = statistics(coded)
    assert counted.weights == sum(layer.matrix.rows * layer.matrix.cols for _, layer in coded_layers(coded))
    assert counted.plain_bits == pytest.approx(5.0)  # f32 scales and biases in groups of 64
    assert "bits per weight" in str(counted)


def test_large_layers_shrink():
    plain = nn.QuantizedLinear.from_linear(nn.Linear(1024, 1024), 64, 4)
    plain.weight, plain.scales, plain.biases = mx.quantize(mx.random.normal((1024, 1024)), 64, 4)
    coded = EntropyCodedLinear.from_quantized(plain)
    bits = 8 * coded.coded.nbytes / (1024 * 1024)
    assert bits < 3.9
    precise = EntropyCodedLinear.from_quantized(plain, codec="rans-precise")
    assert precise.coded.nbytes < coded.coded.nbytes


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_saving_and_loading(coded, tmp_path, suffix):
    names = {name for name, _ in tree_flatten(coded.parameters())}
    assert "up.coded" in names and "up.weight" not in names and "embedding.coded" in names
    file = str(tmp_path / f"weights.{suffix}")
    coded.save_weights(file)
    expected = coded(TOKENS)
    for mode in MODES:
        other = copy.deepcopy(coded)
        set_decode_mode(other, mode)
        mx.eval(other(TOKENS))
        # Other weights, then back: what was decoded before must not be used.
        mx.random.seed(7)
        changed = nn.Linear(128, 1024, bias=False)
        replacement = EntropyCodedLinear.from_linear(changed)
        other.load_weights([(f"up.{name}", replacement[name]) for name in ("coded", "scales", "biases")], strict=False)
        assert same(other.up(expected[..., :128]), replacement(expected[..., :128]))
        other.load_weights(file)
        assert same(other(TOKENS), expected)


def test_predicate(quantized):
    model = copy.deepcopy(quantized)
    entropy_code(model, class_predicate=lambda path, module: path.startswith("layers.") and {"codec": "huffman"})
    assert [path for path, _ in coded_layers(model)] and all(path.startswith("layers.") for path, _ in coded_layers(model))
    assert same(model(TOKENS), quantized(TOKENS))
    with pytest.raises(ValueError, match="bool or a dict"):
        entropy_code(model, class_predicate=lambda *_: "yes")
    with pytest.raises(ValueError, match="nothing to code"):
        entropy_code(Block())
    with pytest.raises(ValueError, match="LayerNorm"):
        entropy_code(nn.Sequential(nn.LayerNorm(4)), class_predicate=lambda *_: True)


def test_predicate_quantizes_plain_layers():
    mx.random.seed(0)
    model = Block()
    plain = copy.deepcopy(model)
    nn.quantize(plain, 32, 4)
    entropy_code(model, group_size=32, class_predicate=lambda _, module: isinstance(module, (nn.Linear, nn.Embedding)))
    assert same(model(TOKENS), plain(TOKENS))


def test_back_to_quantized(quantized, coded):
    entropy_decode(coded)
    assert not coded_layers(coded)
    for (name, a), (other, b) in zip(
        tree_flatten(coded.parameters()), tree_flatten(quantized.parameters()), strict=True
    ):
        assert name == other and same(a, b)


def test_mlx_tools_treat_them_as_quantized(quantized, coded):
    nn.quantize(coded, 64, 4)  # calls to_quantized
    assert not coded_layers(coded)
    entropy_code(coded)
    assert same(dequantize_model(coded).up.weight, dequantize_model(quantized).up.weight)


class MirrorKernels:
    """`device.DeviceKernels` by the NumPy mirror: tests what the modes do with a GPU's kernels."""

    tokens_max = 2
    streams = 0

    def upload(self, coded_layout):
        return coded_layout

    def decode(self, matrix, stream=None):
        self.streams += stream is not None
        return mx.add(mx.array(mirror.decode(matrix)), mx.array(0, mx.uint32), stream=stream)

    def decode_rows(self, matrix, ids):
        return mx.array(mirror.decode_rows(matrix, np.array(ids)))

    def gemv(self, matrix, scales, biases, group_size, x):
        y = mirror.gemv(matrix, np.array(scales), np.array(biases), group_size, np.array(x))
        return mx.array(y).astype(x.dtype)


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_device_kernels(quantized, coded, mode, monkeypatch):
    kernels = MirrorKernels()
    monkeypatch.setattr(device, "for_default_device", lambda: kernels)
    decoder = set_decode_mode(coded, mode)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        expected = quantized(tokens)
        for _ in range(3):
            actual = coded(tokens)
            if mode == "fused":
                assert mx.allclose(actual, expected, rtol=1e-4, atol=1e-5).item()
            else:
                assert same(actual, expected)
    if mode == "gpu_async":
        assert isinstance(decoder, GpuAsyncMode) and kernels.streams > 10
        largest = max(layer.matrix.decoded_nbytes for _, layer in coded_layers(coded))
        assert 0 < decoder.resident_nbytes() <= 2 * largest


def test_device_layout_of_a_layer(coded):
    packed = np.array(coded.up.weight)
    assert np.array_equal(mirror.decode(layout.transcode(packed)), packed)
