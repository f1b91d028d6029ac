"""A coded matrix as the decode modes see it: the blob, its decoding by Rust, and the layouts of devices."""

import copy
from collections.abc import Callable

import mlx.core as mx
import numpy as np

import tersor

from .kernels import device
from .kernels.layout import transcode

# Scratch of the fused mode, decoded: fits a level-2 cache beside the activations.
BLOCK_BYTES = 512 << 10


def evaluated(*arrays: mx.array) -> bool:
    """Evaluates ``arrays``; False where that cannot be, because they are placeholders of `mx.compile` or `mx.vmap`."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def started(*arrays: mx.array) -> bool:
    """Starts to evaluate ``arrays``; False inside of a transformation, `mx.grad` included, which forbids that."""
    try:
        mx.async_eval(*arrays)
    except ValueError:
        return False
    return True


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where host memory is its memory."""
    return mx.default_device().type == mx.DeviceType.cpu


class Buffer:
    """Memory for decoded rows, written by Rust and read by MLX.

    On the CPU it is one MLX array that is written in place: whatever reads an array that `fill` returned must be evaluated before the next
    `fill`. Elsewhere each `fill` copies, and nothing need be waited for.
    """

    def __init__(self, words: int):
        self._words = words
        if on_cpu():
            self._array = mx.zeros((words,), mx.uint32)
            mx.eval(self._array)
            self._memory = np.array(self._array, copy=False)
        else:
            self._array = None
            self._memory = np.empty((words,), np.uint32)

    @property
    def words(self) -> int:
        return self._words

    @property
    def nbytes(self) -> int:
        return 4 * self._words

    def fill(self, matrix: "CodedMatrix", start: int = 0, stop: int | None = None) -> mx.array:
        """Decodes rows ``start`` to ``stop`` of ``matrix``: (stop - start, cols / 8) ``uint32``."""
        return self.array(matrix, self.decode(matrix, start, stop))

    def decode(self, matrix: "CodedMatrix", start: int = 0, stop: int | None = None) -> int:
        """The part of `fill` that may run in any thread: no MLX in it. Returns the number of rows."""
        stop = matrix.rows if stop is None else stop
        count = stop - start
        out = self._memory[: count * matrix.words_per_row].reshape(count, matrix.words_per_row)
        matrix.decode_into(out, start, stop)
        return count

    def array(self, matrix: "CodedMatrix", count: int) -> mx.array:
        """What `decode` wrote, as MLX's packed rows."""
        if self._array is None:
            return mx.array(self._memory[: count * matrix.words_per_row].reshape(count, -1))
        return self._array[: count * matrix.words_per_row].reshape(count, matrix.words_per_row)


class CodedMatrix:
    """One blob of FORMAT.md that holds 4-bit weights: (rows, cols), symbols -8..=7, MLX's nibbles minus 8.

    Args:
        blob: (bytes,) ``uint8``; copied.
        reload: returns the blob again. With it the bytes can be given up while they are not needed.

    Raises:
        ValueError: ``blob`` is not such a blob, or it is corrupt.
    """

    def __init__(self, blob: np.ndarray, reload: Callable[[], np.ndarray] | None = None):
        self._reload = reload
        self._handle: tersor.Coded | None = tersor.Coded(blob)
        self.rows, self.cols = self._handle.shape
        self.words_per_row = self.cols // 8
        self._chunk_rows = self._handle.rows_per_chunk
        self._device_matrix = None
        self.parameter: mx.array | None = None  # the layer's parameter that the blob came from
        if self.cols % 32:
            raise ValueError(f"a coded matrix of {self.rows} x {self.cols}: MLX's layout needs columns in multiples of 32")
        self._handle.decode_affine4(start=0, stop=0)  # refuses symbols that are no nibbles

    def __deepcopy__(self, memo):
        """A copied layer has a copied parameter; the rest does not change and is shared."""
        copied = copy.copy(self)
        copied.parameter = copy.deepcopy(self.parameter, memo)
        return copied

    def give_up_bytes(self) -> None:
        """Frees the coded bytes, if they can be had again."""
        if self._reload:
            self._handle = None

    @property
    def coded_resident_nbytes(self) -> int:
        """Bytes of the blob that are held."""
        return self._handle.nbytes if self._handle else 0

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of MLX's packed form, scales not counted."""
        return 4 * self.rows * self.words_per_row

    @property
    def block_rows(self) -> int:
        """Rows that the fused mode decodes at a time: whole chunks, about `BLOCK_BYTES`."""
        chunk_nbytes = 4 * self._chunk_rows * self.words_per_row
        return min(self.rows, self._chunk_rows * max(1, BLOCK_BYTES // chunk_nbytes))

    def decode_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Decodes rows ``start`` to ``stop`` into ``out`` (stop - start, cols / 8) ``uint32``. Releases the GIL."""
        handle = self._handle
        if handle is None:
            handle = self._handle = tersor.Coded(self._reload())
        handle.decode_affine4(out, start=start, stop=stop)

    def decode(self) -> mx.array:
        """The whole packed matrix in memory of its own."""
        return Buffer(self.rows * self.words_per_row).fill(self)

    def lookup(self, ids: mx.array) -> mx.array:
        """Packed rows ``ids`` (n,), of which only the chunks that hold them are decoded: (n, cols / 8) ``uint32``.

        Raises:
            IndexError: an id is not a row.
        """
        wanted = np.array(ids, dtype=np.int64)
        wanted = np.where(wanted < 0, wanted + self.rows, wanted)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"row {int(wanted.min() if wanted.min() < 0 else wanted.max())} of a matrix of {self.rows} rows")
        out = np.empty((wanted.size, self.words_per_row), np.uint32)
        scratch = np.empty((self._chunk_rows, self.words_per_row), np.uint32)
        chunk_of = wanted // self._chunk_rows
        for chunk in np.unique(chunk_of):
            start = int(chunk) * self._chunk_rows
            stop = min(self.rows, start + self._chunk_rows)
            self.decode_into(scratch[: stop - start], start, stop)
            here = chunk_of == chunk
            out[here] = scratch[wanted[here] - start]
        return mx.array(out)

    def on_device(self, kernels: device.DeviceKernels):
        """The matrix in the layout of ``kernels``, transcoded on first use."""
        if self._device_matrix is None:
            packed = np.empty((self.rows, self.words_per_row), np.uint32)
            self.decode_into(packed, 0, self.rows)
            self._device_matrix = kernels.upload(transcode(packed))
            self.give_up_bytes()
        return self._device_matrix
