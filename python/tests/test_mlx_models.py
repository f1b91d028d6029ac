"""Whole models: books-52m as mlx_lm.convert -q writes it, its coded twin in every mode, generation, directories, the server."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from mlx_models import need_books, need_mlx

need_mlx()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
import numpy as np  # noqa: E402
import tersor  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import compute_bits_per_weight, save_config, save_model  # noqa: E402
from mlx_lm.utils import load_model as mlx_load_model  # noqa: E402
from tersor import mlx as tm  # noqa: E402
from tersor.mlx.load import is_tersor_directory  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"

PROMPT = "It was a dark and stormy night"


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.fixture(scope="session")
def books_4bit(tmp_path_factory):
    """``mlx_lm.convert -q`` of books-52m: bfloat16, groups of 64."""
    target = tmp_path_factory.mktemp("books") / "4bit"
    mlx_lm.convert(str(need_books()), str(target), quantize=True)
    return target


@pytest.fixture(scope="session")
def books_f32(tmp_path_factory):
    """The same in float32, in which MLX's CPU kernels are eight times faster."""
    target = tmp_path_factory.mktemp("books") / "f32"
    mlx_lm.convert(str(need_books()), str(target), quantize=True, dtype="float32")
    return target


@pytest.fixture(scope="session")
def books_coded(books_f32, tmp_path_factory):
    """Tersor's directory of the latter."""
    target = tmp_path_factory.mktemp("books") / "coded"
    tm.convert(str(books_f32), str(target))
    return target


def test_every_mode_gives_mlx_logits(books_4bit):
    plain, _ = mlx_load_model(books_4bit)
    tokens = mx.array([[17, 4000]])
    expected = plain(tokens)
    assert expected.dtype == mx.bfloat16
    model, _ = tm.load(str(books_4bit))
    assert len(tm.coded_layers(model)) == 14 * 7 + 1
    for mode in tm.MODES:
        tm.set_decode_mode(model, mode)
        assert same(model(tokens), expected)
        assert same(model(tokens), expected)  # the order of layers is known now


def test_coding_is_lossless_and_near_the_entropy(books_4bit):
    plain, _ = mlx_load_model(books_4bit)
    model, _ = tm.load(str(books_4bit), codec="rans-precise")
    assert compute_bits_per_weight(model) < compute_bits_per_weight(plain) - 0.2
    coded_bits = entropy_bits = weights = 0
    for _, layer in tm.coded_layers(model):
        count = layer.matrix.rows * layer.matrix.cols
        coded_bits += 8 * layer.coded.nbytes
        entropy_bits += count * tersor.blob_info(np.array(layer.coded))["entropy_bits"]
        weights += count
    assert coded_bits / weights < entropy_bits / weights + 0.02
    tm.entropy_decode(model)
    for (name, a), (other, b) in zip(tree_flatten(model.parameters()), tree_flatten(plain.parameters()), strict=True):
        assert name == other and same(a, b)


def test_directories_come_back_identical_and_near_the_entropy(books_4bit, tmp_path):
    """`tersor encode` and `tersor export`, as commands, on what `mlx_lm.convert -q` wrote."""
    for arguments in (["encode", books_4bit, "-o", tmp_path / "coded"], ["export", tmp_path / "coded", "--to", "mlx", "-o", tmp_path / "back"]):
        subprocess.run([sys.executable, "-m", "tersor", *arguments], check=True, capture_output=True, timeout=120)
    files = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in books_4bit.iterdir()}
    assert files == {file.name: hashlib.sha256(file.read_bytes()).digest() for file in (tmp_path / "back").iterdir()}
    report = tersor.inspect(tmp_path / "coded")
    # A scale and a bias of 16 bits for 64 weights are the half bit.
    assert 0 < report["coded_bpw"] - (report["entropy_bits"] + 0.5) < 0.02


@pytest.mark.parametrize("mode", tm.MODES)
def test_generates_mlx_tokens(books_f32, books_coded, mode, capsys):
    plain, tokenizer = mlx_lm.load(str(books_f32))
    expected = mlx_lm.generate(plain, tokenizer, PROMPT, max_tokens=12)
    model, tokenizer = tm.load(str(books_coded), decode_mode=mode)
    assert tm.generate(model, tokenizer, PROMPT, verbose=True, max_tokens=12) == expected
    printed = capsys.readouterr().out
    assert "Generation:" in printed and "tokens-per-sec" in printed  # mlx_lm's statistics
    assert "bits per weight" in printed and f"decode mode {mode}" in printed


def test_directories_equal_what_they_code(books_f32, books_coded, tmp_path):
    assert is_tersor_directory(books_coded) and not is_tersor_directory(books_f32)
    plain, _ = mlx_load_model(books_f32)
    model, _ = tm.load_model(books_coded)
    matrices = {path: layer.matrix for path, layer in tm.coded_layers(model)}
    assert len(matrices) == 14 * 7 + 1
    assert all(matrix.coded_resident_nbytes > 0 for matrix in matrices.values())
    tokens = mx.array([[17, 4000]])
    expected = plain(tokens)
    tm.set_decode_mode(model, "cached")
    assert same(model(tokens), expected)
    # Decoded for good, so the bytes are left in the file; saving and other modes read them again.
    assert all(matrix.coded_resident_nbytes == 0 for matrix in matrices.values())
    tm.set_decode_mode(model, "fused")
    assert same(model(tokens), expected)
    model.save_weights(str(tmp_path / "weights.safetensors"))
    stored = mx.load(str(books_coded / "model.safetensors"))
    saved = mx.load(str(tmp_path / "weights.safetensors"))
    assert saved.keys() == stored.keys()
    assert all(same(saved[name], stored[name]) for name in stored)


def test_mlx_lm_saves_coded_models(books_coded, tmp_path):
    """What `mlx_lm`'s own writer makes of a coded model loads again."""
    model, config = tm.load_model(books_coded)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    again, _ = tm.load_model(tmp_path, decode_mode="fused")
    tokens = mx.array([[17, 4000]])
    assert len(tm.coded_layers(again)) == len(tm.coded_layers(model))
    assert same(again(tokens), model(tokens))


def test_convert_prints_and_refuses(books_f32, books_coded, tmp_path, capsys):
    with pytest.raises(ValueError, match="exists"):
        tm.convert(str(books_f32), str(books_coded))
    with pytest.raises(ValueError, match="coded already"):
        tm.convert(str(books_coded), str(tmp_path / "again"))
    tm.convert(str(books_f32), str(tmp_path / "model"))
    assert "less than before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="8 bits"):
        tm.convert(str(books_f32), str(tmp_path / "other"), quantize=True, q_bits=8)
    with pytest.raises(ValueError, match="not quantized"):
        tm.convert(str(need_books()), str(tmp_path / "other"), quantize=False)


def test_convert_command(books_f32, books_coded, tmp_path):
    """On full precision with `mlx_lm.convert`'s arguments; the result is the one by way of `mlx_lm.convert`."""
    command = [sys.executable, "-m", "tersor.mlx.convert", "--hf-path", str(need_books()), "--mlx-path", str(tmp_path / "model")]
    done = subprocess.run([*command, "-q", "--q-bits", "4", "--dtype", "float32"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "model", books_coded)]
    assert weights[0] == weights[1]
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and again.stderr.startswith("error: cannot save") and again.stderr.count("\n") == 1


@pytest.mark.parametrize("scheme, coded", [("affine4", True), ("q4_0", True), ("int4-row", True), ("ecsq", False)])
def test_other_schemes_load(scheme, coded, tmp_path, capsys):
    """Symmetric weights are affine ones with the bias -8 scale; unbounded symbols are dequantized, and that is said."""
    tersor.quantize(need_books(), tmp_path / "model", scheme=scheme)
    model, _ = tm.load_model(tmp_path / "model")
    layers = tm.coded_layers(model)
    printed = capsys.readouterr().out
    if coded:
        assert len(layers) == 14 * 7 + 1 and "dequantized" not in printed
    else:
        assert not layers and "99 coded tensors" in printed
    reference = tersor.Model.open(tmp_path / "model")
    expected = reference.logits([17, 4000])[-1]
    actual = model(mx.array([[17, 4000]]))[0, -1].astype(mx.float32)
    # Two arithmetics: Tersor's activations are int8, MLX's bfloat16.
    error = mx.square(actual - mx.array(expected)).mean() / mx.square(mx.array(expected)).mean()
    assert error.item() < 0.05**2


def test_other_bit_widths_are_left_alone(tmp_path):
    mlx_lm.convert(str(need_books()), str(tmp_path / "8bit"), quantize=True, q_bits=8)
    with pytest.raises(ValueError, match="nothing to code"):
        tm.load_model(tmp_path / "8bit")


def test_unknown_modes_are_refused_before_loading(books_f32):
    with pytest.raises(ValueError, match="unknown decode mode"):
        tm.load(str(books_f32), decode_mode="quick")


def test_lora_adapters(books_f32, books_coded, tmp_path):
    """An adapter trained on MLX's layers fits the coded ones."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    plain, _ = mlx_load_model(books_f32)
    settings = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    plain.freeze()
    linear_to_lora_layers(plain, 2, settings)
    mx.random.seed(0)
    adapters = {name: mx.random.normal(a.shape) * 0.1 for name, a in tree_flatten(plain.trainable_parameters())}
    plain.load_weights(list(adapters.items()), strict=False)
    plain.eval()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapters)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model, _ = tm.load(str(books_coded), adapter_path=str(tmp_path), decode_mode="fused")
    tokens = mx.array([[17, 4000]])
    assert same(model(tokens), plain(tokens))


def test_generate_command(books_coded):
    command = [sys.executable, "-m", "tersor.mlx.generate", "--model", str(books_coded), "--decode-mode", "prefetch"]
    command += ["--prompt", PROMPT, "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "decode mode prefetch" in done.stdout and "Warning" not in done.stderr


def test_server(books_coded):
    """Loopback: the same completion as MLX's generation, twice, so that the second request meets a warm mode."""
    model, tokenizer = tm.load(str(books_coded))
    expected = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=6)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tersor.mlx.server", "--model", str(books_coded), "--port", str(port)]
    process = subprocess.Popen([*command, "--decode-mode", "fused"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_healthy(process, port)
        body = json.dumps({"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0}).encode()
        for _ in range(2):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=240) as response:
                answer = json.load(response)
            assert answer["choices"][0]["text"] == expected
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(process, port: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended: {process.stderr.read()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not come up")


def test_selftest_passes():
    command = [sys.executable, "-m", "tersor.mlx.selftest", "--rows", "256", "--cols", "256", "--layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout
    assert all(f"| {mode} |" in done.stdout for mode in tm.MODES)
    assert "FAIL" not in done.stdout
