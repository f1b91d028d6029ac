"""Quantizers, model directories, generation: the Rust runtime from Python."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tersor

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/demo"
# A random Llama of two layers in bf16.
CHECKPOINT = ROOT / "crates/runtime/tests/golden/llama3"
PROMPT = "It was a dark and stormy night"
STRATEGIES = ["fused", "cached", "prefetch", "lru", "auto"]


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The machine's profile is measured once a session and goes nowhere else."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def write_safetensors(path, tensors, metadata):
    header, start = {"__metadata__": metadata}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (start, start + array.nbytes)}
        start += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for _, a in tensors.values()))


@pytest.fixture
def mlx_dir(tmp_path):
    """What mlx_lm.convert -q writes, with two layers' worth of random codes."""
    rng = np.random.default_rng(3)
    path = tmp_path / "mlx"
    path.mkdir()
    tensors = {"norm.weight": ("BF16", np.full(256, 0x3F80, np.uint16))}
    for layer in range(2):
        codes = np.clip(np.rint(rng.normal(7.5, 2.4, (192, 32, 8))), 0, 15).astype(np.uint32)
        packed = (codes << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)
        tensors[f"layers.{layer}.up_proj.weight"] = ("U32", packed)
        for part in ("scales", "biases"):
            tensors[f"layers.{layer}.up_proj.{part}"] = ("BF16", rng.integers(0x3C00, 0x3D00, (192, 4), dtype=np.uint16))
    write_safetensors(path / "model.safetensors", tensors, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}}, indent=4))
    (path / "README.md").write_text("---\nlibrary_name: mlx\n---\n")
    return path


def hashes(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.mark.parametrize("scheme", ["ecsq", "affine4", "affine4-g128", "q4_0", "int4-row", "int4-tensor"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_symbols_and_scales_give_the_dequantized_weights(scheme, dtype):
    w = np.random.default_rng(0).normal(0, 0.02, (48, 256)).astype(dtype)
    q = tersor.quantize_array(w, scheme=scheme)
    assert q.symbols.shape == q.dequantized.shape == w.shape and q.symbols.dtype == np.int16
    if scheme.startswith("affine4"):
        size = 256 // q.scales.shape[1]
        grouped = (q.symbols + 8).reshape(48, -1, size).astype(np.float32) * q.scales[..., None] + q.biases[..., None]
        want = grouped.reshape(48, 256)
    elif scheme == "q4_0":
        want = (q.symbols.reshape(48, -1, 32).astype(np.float32) * q.scales[..., None]).reshape(48, 256)
    else:
        want = q.symbols * (q.scales[:, None] if q.scales.size == 48 else q.scales[0])
    assert (q.biases is not None) == scheme.startswith("affine4")
    np.testing.assert_array_equal(q.dequantized, want)
    error = np.linalg.norm(q.dequantized - w) / np.linalg.norm(w)
    assert error < 0.25


def test_bpw_is_what_symbols_and_scales_take():
    w = np.random.default_rng(1).normal(0, 0.02, (256, 1024)).astype(np.float32)
    errors = []
    for bpw in (2.5, 3.5, 4.5):
        q = tersor.quantize_array(w, bpw=bpw)
        assert tersor.entropy(q.symbols) + 16 * q.scales.size / w.size == pytest.approx(bpw, abs=0.01)
        errors.append(np.linalg.norm(q.dequantized - w))
    # A bit more halves the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05) and errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheme": "int3"}, "int3"),
        ({"scheme": "q4_0", "bpw": 3.0}, "bpw"),
        ({"scheme": "ecsq", "group_size": 64}, "group_size"),
        ({"scheme": "affine4", "group_size": 48}, "48"),
        ({"scheme": "affine4", "group_size": 128}, "192 columns"),
        ({"bpw": 0.0001}, "out of reach"),
    ],
)
def test_quantizers_refuse_by_value_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        tersor.quantize_array(np.ones((16, 192), np.float32) * np.arange(192, dtype=np.float32), **arguments)


def test_weights_must_be_finite():
    w = np.ones((4, 64), np.float32)
    w[2, 5] = np.nan
    with pytest.raises(ValueError, match="row 2, column 5"):
        tersor.quantize_array(w)


def test_encoded_directories_come_back_identical(mlx_dir, tmp_path):
    report = tersor.encode_dir(mlx_dir, tmp_path / "coded")
    assert report["lossless"] and report["coded_tensors"] == 2
    # What the entropy says, and the overhead of small tensors.
    assert 0 < report["bpw"] - (report["entropy_bits"] + 0.5) < 0.1
    inspected = tersor.inspect(tmp_path / "coded")
    assert inspected["entropy_bits"] == pytest.approx(report["entropy_bits"], abs=1e-4)
    assert [t["name"] for t in inspected["tensors"]][:1] == ["layers.0.up_proj.weight"]
    exported = tersor.export(tmp_path / "coded", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(mlx_dir)
    assert exported["files"] == 3
    with pytest.raises(ValueError, match="already exists"):
        tersor.export(tmp_path / "coded", tmp_path / "back")
    tersor.export(tmp_path / "coded", tmp_path / "back", force=True)


def test_blobs_of_a_directory_open_without_their_scales(mlx_dir, tmp_path):
    tersor.encode_dir(mlx_dir, tmp_path / "coded", codec="rans")
    raw = (tmp_path / "coded/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["layers.1.up_proj.coded"]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    coded = tersor.Coded(raw[start:stop])
    assert (coded.scheme, coded.group_size, coded.shape) == ("group affine", 64, (192, 256))
    original = (mlx_dir / "model.safetensors").read_bytes()
    assert coded.decode_affine4().tobytes() in original


def test_progress_is_told_and_may_stop_the_work(mlx_dir, tmp_path):
    calls = []
    tersor.encode_dir(mlx_dir, tmp_path / "coded", progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] == 2 * 192 * 256 + 256
    assert calls == sorted(calls)

    class Enough(Exception):
        pass

    def stop(done, total):
        if done:
            raise Enough

    with pytest.raises(Enough):
        tersor.encode_dir(mlx_dir, tmp_path / "other", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coded", "mlx"]


def test_tqdm_bars_count(tmp_path):
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(disable=False, file=open(os.devnull, "w")) as bar:
        tersor.quantize(CHECKPOINT, tmp_path / "coded", scheme="int4-row", progress=bar)
        assert bar.n == bar.total > 0


def test_quantize_meets_its_options(tmp_path):
    report = tersor.quantize(CHECKPOINT, tmp_path / "coded", bpw=6.0, codec="rans-precise", threads=1)
    assert report["bpw"] == pytest.approx(tersor.inspect(tmp_path / "coded")["bpw"])
    assert report["codec"] == "rans/s32-w16-p12-l32"
    for arguments, words in [({"scheme": "nf4"}, "nf4"), ({"codec": "zip"}, "zip"), ({"bpw": -1}, "bpw"), ({"threads": 0}, "threads")]:
        with pytest.raises(ValueError, match=words):
            tersor.quantize(CHECKPOINT, tmp_path / "other", **arguments)
    with pytest.raises(ValueError, match="already exists"):
        tersor.quantize(CHECKPOINT, tmp_path / "coded")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tersor.quantize(tmp_path / "nowhere", tmp_path / "other")


def test_strategies_give_the_same_bits():
    texts, streams, logits = set(), set(), []
    for strategy in STRATEGIES:
        model = tersor.Model.open(DEMO, strategy=strategy)
        assert model.strategy == strategy
        stream = model.stream(PROMPT, max_tokens=24)
        text = "".join(stream)
        assert stream.stop == "length" and len(stream.tokens) == 24 and next(stream, None) is None
        streams.add((tuple(stream.tokens), stream.logits_hash))
        texts.update([text, model.generate(PROMPT, max_tokens=24)])
        logits.append(model.logits(PROMPT))
    assert len(texts) == len(streams) == 1 and text.strip()
    assert all(np.array_equal(other, logits[0]) for other in logits)


def test_logits_predict_what_generate_takes():
    model = tersor.Model.open(DEMO, strategy="cached", threads=1)
    tokens = model.encode(PROMPT)
    logits = model.logits(tokens)
    assert logits.shape == (len(tokens), model.vocab_size) and logits.dtype == np.float32
    stream = model.stream(tokens, max_tokens=1, repetition_penalty=1.0)
    piece = next(stream)
    assert stream.tokens == [int(logits[-1].argmax())]
    assert stream.prompt_tokens == len(tokens)
    assert model.decode(stream.tokens) == piece
    # Sampling follows its seed.
    sample = lambda seed: model.generate(PROMPT, max_tokens=16, temperature=1.0, seed=seed)
    assert sample(1) == sample(1) != sample(2)


def test_models_refuse_by_kind(tmp_path):
    with pytest.raises(FileNotFoundError):
        tersor.Model.open(tmp_path)
    with pytest.raises(ValueError, match="quick"):
        tersor.Model.open(DEMO, strategy="quick")
    with pytest.raises(ValueError, match="parsecs"):
        tersor.Model.open(DEMO, memory_budget="12 parsecs")
    with pytest.raises(ValueError, match="context"):
        tersor.Model.open(DEMO, context=1 << 30)
    with pytest.raises(MemoryError, match="at least"):
        tersor.Model.open(DEMO, strategy="fused", memory_budget=1000)
    model = tersor.Model.open(DEMO, strategy="fused", memory_budget="1GiB")
    with pytest.raises(ValueError, match="vocabulary"):
        model.logits([1 << 30])
    with pytest.raises(ValueError, match="token"):
        model.logits([])
    with pytest.raises(ValueError, match="temperature"):
        model.generate(PROMPT, temperature=-1)
    with pytest.raises(ValueError, match="prompt"):
        model.generate(3.5)
    with pytest.raises(TypeError):
        model.generate(PROMPT, tokens=3)


def test_a_damaged_model_is_corrupt(tmp_path):
    for file in DEMO.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(tersor.CorruptError, match="model.safetensors"):
        tersor.Model.open(tmp_path, strategy="cached")


def test_the_command_line_is_there():
    run = lambda *arguments: subprocess.run([sys.executable, "-m", "tersor", *arguments], capture_output=True, text=True)
    assert run("--version").stdout == f"tersor {tersor.__version__}\n"
    info = json.loads(run("inspect", str(DEMO), "--json").stdout)
    assert info["weights"] == tersor.inspect(DEMO)["weights"]
    failed = run("inspect", "nowhere")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ")
    assert run("inspect").returncode == 2


def test_import_needs_numpy_alone():
    code = "import sys, tersor; assert not {'mlx', 'mlx_lm', 'torch'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
