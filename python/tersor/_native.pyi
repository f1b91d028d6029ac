"""What the Rust module offers. Arrays are NumPy's; shapes are in the docstrings."""

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__version__: str

class CorruptError(ValueError):
    """Coded bytes or a model directory that contradict the format or their checksums."""

class _Bar(Protocol):
    total: Any
    def update(self, n: int, /) -> object: ...

_Progress = Callable[[int, int], object] | _Bar
_Path = str | PathLike[str]
_Blob = NDArray[np.uint8] | bytes
_Symbols = NDArray[np.int8] | NDArray[np.int16]
_Reals = NDArray[Any]
_Scheme = Literal["ecsq", "affine4", "affine4-g32", "affine4-g64", "affine4-g128", "q4_0", "int4-row", "int4-tensor"]
_Strategy = Literal["auto", "fused", "cached", "prefetch", "lru", "gpu-async"]

def command(arguments: Sequence[str]) -> int:
    """Runs the command line, whose first argument is the program's name; returns the exit code. Takes over the process's signals."""

def set_launcher(program_and_arguments: Sequence[str]) -> None:
    """How the command is started in a process of its own. The first call counts."""

def encode(symbols: _Symbols, *, codec: str = "rans") -> NDArray[np.uint8]:
    """Codes symbols, (rows, cols), to a blob: (bytes). The blob says scheme ``tensor`` with scale 1: scales are the caller's business.

    ``codec``: rans, rans-precise, huffman, block-ans, tiered, rans-pairs, fixed, or a full id such as ``rans/s16-w8-p7-l64``.
    """

def encode_affine4(packed: NDArray[np.uint32], *, codec: str = "rans") -> NDArray[np.uint8]:
    """Codes 4-bit weights in MLX's layout, (rows, cols / 8), to the blob of their symbols, nibble - 8."""

def entropy(symbols: _Symbols) -> float:
    """Empirical entropy of symbols of any shape, bits per symbol."""

def quantize_array(
    w: _Reals, *, scheme: str = "ecsq", bpw: float | None = None, group_size: int | None = None
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.float32]]: ...
def quantize(
    src: _Path,
    dst: _Path,
    *,
    scheme: _Scheme = "ecsq",
    bpw: float | None = None,
    group_size: Literal[32, 64, 128] | None = None,
    codec: str = "rans",
    threads: int | None = None,
    force: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Quantizes and codes a Hugging Face checkpoint, as ``tersor quantize`` does. ``bpw``: of the whole model with everything counted, 4.0
    unless given; for ``ecsq`` only. Returns the report that ``tersor quantize --json`` prints. The unit of progress is a weight; ``ecsq``
    has two phases. With ``threads`` given, Ctrl-C is heeded only when the work is done."""

def encode_dir(
    src: _Path,
    dst: _Path,
    *,
    codec: str = "rans-precise",
    threads: int | None = None,
    force: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Codes an MLX 4-bit directory without loss, as ``tersor encode`` does; :func:`export` gives the same files back. Returns the report
    that ``tersor encode --json`` prints."""

def export(
    src: _Path,
    dst: _Path,
    *,
    to: Literal["mlx"] = "mlx",
    threads: int | None = None,
    force: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Turns what :func:`encode_dir` wrote back into the original files, each the same to the byte. The unit of progress is a byte."""

def inspect(directory: _Path, *, progress: _Progress | None = None) -> dict[str, Any]:
    """Where the bits of a directory go, with the keys of ``tersor inspect --json``. Decodes every tensor."""

class Coded:
    """A blob, opened: header, table, index and the checksums of all chunks are checked once.

    A blob of any scheme will do, such as ``X.coded`` of a model directory: symbols are what comes out, scales are not applied.
    """

    def __init__(self, blob: _Blob) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def codec(self) -> str:
        """The codec's full id."""
    @property
    def scheme(self) -> str:
        """How symbols become weights, by the header: tensor, row, group affine, group symmetric."""
    @property
    def group_size(self) -> int:
        """Columns that share a scale, by the header; 0 for schemes without groups."""
    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
    @property
    def bits_per_weight(self) -> float:
        """All bytes of the blob, in bits per weight."""
    @property
    def rows_per_chunk(self) -> int:
        """Rows that are coded together: the least that decoding some rows takes."""
    def blob(self) -> NDArray[np.uint8]:
        """A copy of the blob."""
    def decode(self) -> NDArray[np.int16]:
        """The symbols: (rows, cols)."""
    def decode_affine4(
        self, out: NDArray[np.uint32] | None = None, *, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint32]:
        """Rows ``start`` to ``stop`` in MLX's layout: (stop - start, cols / 8). ``out``, C-contiguous, is filled and returned if given."""
    def entropy(self) -> float:
        """Empirical entropy of the symbols, bits per weight; decodes them."""
    def info(self) -> dict[str, Any]:
        """See :func:`tersor.blob_info`."""

class CodedLinear:
    """A blob with its group scales, ready to be multiplied without being materialized."""

    def __init__(self, blob: _Blob | Coded, scales: _Reals, biases: _Reals | None, group_size: int) -> None:
        """``scales``, ``biases``: (rows, cols / group_size), float16, float32, or bfloat16 (``ml_dtypes``, or its bits as uint16)."""
    @property
    def shape(self) -> tuple[int, int]: ...
    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """``x``: (cols) or (tokens, cols). Returns (rows) or (tokens, rows). Activations are rounded to int8 with one scale for each group."""

class Model:
    """A model whose weights are held under a strategy. One thread at a time runs it; others wait."""

    @staticmethod
    def open(
        directory: _Path,
        *,
        strategy: _Strategy = "auto",
        memory_budget: int | str | None = None,
        threads: int | None = None,
        context: int | None = None,
        device: str = "cpu",
        lru_policy: Literal["pin", "lru", "mru"] = "pin",
    ) -> Model:
        """Opens a Tersor directory, or an unquantized Hugging Face one, which runs as it is.

        ``memory_budget``: bytes, or text such as ``"2GiB"``; bounds weights, buffers, tables and a KV cache of ``context`` positions, and a
        ``MemoryError`` names the least that would do. ``context``: what the model was made for unless given. ``device``: ``cpu``, ``cuda`` or
        ``cuda:1`` (NVIDIA). All strategies of a device give the same bits.
        """
    @property
    def context(self) -> int:
        """Positions: prompt and generated tokens."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def bits_per_weight(self) -> float:
        """Of all tensors as stored, everything counted."""
    @property
    def load_seconds(self) -> float: ...
    @property
    def strategy(self) -> str: ...
    @property
    def strategy_detail(self) -> str: ...
    @property
    def resident_weight_bytes(self) -> int: ...
    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds."""
    def decode(self, tokens: Sequence[int]) -> str: ...
    def logits(self, tokens: str | Sequence[int]) -> NDArray[np.float32]:
        """(tokens, vocab_size): row i scores what follows token i."""
    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Stream:
        """Continues a text piece by piece; greedy unless ``temperature`` is given. ``repetition_penalty``: what the model's
        generation_config.json advises unless given. Equal arguments give equal tokens."""
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> str:
        """The whole continuation; arguments as for :meth:`stream`."""

class Stream(Iterator[str]):
    """A text on its way: each item is what one token adds to it, empty inside a character."""

    def __iter__(self) -> Stream: ...
    def __next__(self) -> str: ...
    @property
    def tokens(self) -> list[int]:
        """Generated so far."""
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def stop(self) -> Literal["eos", "length", "context", "interrupted"] | None:
        """Why it ended, if it has."""
    @property
    def logits_hash(self) -> str:
        """64-bit hash, in hex, of the float32 logits of every generated token: equal hashes mean bit-identical runs."""
