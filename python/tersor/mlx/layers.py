"""MLX layers whose 4-bit weights are entropy coded.

They are MLX's quantized layers in every respect but one: instead of ``weight`` they hold the parameter ``coded``, a blob of FORMAT.md
(bytes ``uint8``). The decoded form is bit-identical to MLX's affine 4-bit layout, so results are those of `nn.QuantizedLinear`. ``weight``
is still there to read, decoded on demand, because `mlx_lm`'s size tools and LoRA ask for it.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

import tersor

from .coded import CodedMatrix
from .modes import DecodeMode, make_mode

GROUP_SIZES = (32, 64, 128)


class _EntropyCoded:
    """What the linear layer and the embedding share."""

    @classmethod
    def from_coded(
        cls,
        coded: mx.array,
        scales: mx.array,
        biases: mx.array,
        bias: mx.array | None = None,
        *,
        group_size: int = 64,
        decode_mode: str | DecodeMode = "auto",
        reload: Callable[[], mx.array] | None = None,
    ):
        """A layer from its parts.

        Args:
            coded: the blob, (bytes,) ``uint8``.
            scales, biases: (rows, cols / group_size), MLX's.
            bias: (rows,) or None.
            group_size: 32, 64 or 128 columns.
            decode_mode: a name or a mode object; layers that are given the same object share its buffers and budget.
            reload: returns ``coded`` again, not yet evaluated (as `mx.load` does). With it the blob's bytes are given up once
                they are decoded for good or transcoded for a GPU.

        Raises:
            ValueError: parts that do not fit each other, or an unknown mode.
        """
        check_quantization(group_size, 4, "affine")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.group_size, layer.bits, layer.mode = group_size, 4, "affine"
        layer.coded, layer.scales, layer.biases = coded, scales, biases
        if bias is not None:
            layer.bias = bias
        layer._matrix = None
        layer._reload = reload
        layer.decoder = make_mode(decode_mode)
        matrix = layer.matrix
        expected = (matrix.rows, matrix.cols // group_size)
        if matrix.cols % group_size or scales.shape != expected or biases.shape != expected:
            raise ValueError(
                f"weights of {matrix.rows} x {matrix.cols} in groups of {group_size} do not go with scales {scales.shape} "
                f"and biases {biases.shape}"
            )
        if bias is not None and bias.shape != (matrix.rows,):
            raise ValueError(f"weights of {matrix.rows} x {matrix.cols} do not go with a bias {bias.shape}")
        layer.freeze()
        return layer

    @classmethod
    def from_quantized(cls, layer: nn.Module, *, decode_mode: str | DecodeMode = "auto", codec: str = "rans"):
        """Codes a layer that MLX quantized (affine, 4 bits), losslessly.

        Raises:
            ValueError: other bits, modes or group sizes; an unknown decode mode or codec.
        """
        decoder = make_mode(decode_mode)
        check_quantization(layer.group_size, layer.bits, layer.mode)
        return cls.from_coded(
            mx.array(encode_packed(layer.weight, codec)),
            layer.scales,
            layer.biases,
            layer.get("bias"),
            group_size=layer.group_size,
            decode_mode=decoder,
        )

    @property
    def matrix(self) -> CodedMatrix:
        """The coded weights. Follows a change of the parameter ``coded``, by `load_weights` for instance."""
        coded = self["coded"]
        if self._matrix is not None and self._matrix.parameter is coded:
            return self._matrix
        try:
            blob = np.array(coded, copy=False)
        except ValueError:
            # A placeholder of mx.compile, which captures parameters among its inputs: the weights are those of before.
            if self._matrix is not None:
                return self._matrix
            raise ValueError("the coded weights are placeholders of mx.compile; build the layer outside of it") from None
        reload = self._reload
        matrix = CodedMatrix(blob, (lambda: np.array(reload(), copy=False)) if reload else None)
        if reload:
            # The matrix has a copy: let the parameter be the file's bytes again, which are read when it is saved.
            self.coded = coded = reload()
        matrix.parameter = coded
        self._matrix = matrix  # an attribute, no parameter: size tools do not count it
        return matrix

    @property
    def decode_mode(self) -> str:
        """Name of the mode in use. May be set at any time to another name or mode object."""
        return self.decoder.name

    @decode_mode.setter
    def decode_mode(self, mode: str | DecodeMode) -> None:
        decoder = make_mode(mode)
        self.decoder.forget(self)
        self.decoder = decoder

    @property
    def weight(self) -> mx.array:
        """The weights in MLX's packed layout, (rows, cols / 8) ``uint32``, decoded for the asking."""
        return self.decoder.packed(self)

    def _multiply(self, x: mx.array) -> mx.array:
        cols = self.matrix.cols
        if x.ndim == 0 or x.shape[-1] != cols:
            raise ValueError(f"an input of shape {x.shape} for weights of {self.matrix.rows} x {cols}: its last dimension must be {cols}")
        return self.decoder.matmul(self, x)

    def _check_same_quantization(self, group_size, bits, mode) -> None:
        own = (self.group_size, self.bits, self.mode)
        asked = (group_size or self.group_size, bits or self.bits, mode or self.mode)
        if asked != own:
            raise ValueError(f"weights in groups of {own[0]} with {own[1]} bits ({own[2]}) cannot become {asked} without loss")


class EntropyCodedLinear(_EntropyCoded, nn.QuantizedLinear):
    """`nn.QuantizedLinear` with entropy-coded weights.

    Args:
        input_dims, output_dims, bias, group_size, bits, mode: as `nn.QuantizedLinear`; ``group_size`` 32, 64 or 128, 4 bits, affine.
        decode_mode: ``'fused'``, ``'cached'``, ``'prefetch'``, ``'lru'``, ``'gpu_async'``, ``'auto'``, or a mode object.
        codec: a codec of `tersor.encode`.

    Raises:
        ValueError: unknown modes and codecs, sizes that do not fit.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        decode_mode: str | DecodeMode = "auto",
        codec: str = "rans",
    ):
        layer = self.from_linear(
            nn.Linear(input_dims, output_dims, bias), group_size, bits, mode, decode_mode=decode_mode, codec=codec
        )
        self.__dict__.update(layer.__dict__)
        dict.update(self, layer)  # parameters

    @classmethod
    def from_linear(
        cls,
        linear_layer: nn.Module,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        *,
        decode_mode: str | DecodeMode = "auto",
        codec: str = "rans",
    ):
        """Quantizes an `nn.Linear` as MLX does, and codes it.

        Raises:
            ValueError: a weight that is no matrix of whole groups; unknown modes and codecs; unsupported bits and group sizes.
        """
        decoder = make_mode(decode_mode)
        check_quantization(group_size, bits, mode)
        _check_weight(linear_layer.weight, group_size)
        quantized = nn.QuantizedLinear.from_linear(linear_layer, group_size, bits, mode)
        return cls.from_quantized(quantized, decode_mode=decoder, codec=codec)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_):
        """The plain `nn.QuantizedLinear`, losslessly. Takes `nn.quantize`'s arguments, which must name what the layer has.

        Raises:
            ValueError: they name something else.
        """
        self._check_same_quantization(group_size, bits, mode)
        layer = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
        nn.Module.__init__(layer)
        layer.group_size, layer.bits, layer.mode = self.group_size, self.bits, self.mode
        layer.weight, layer.scales, layer.biases = self.matrix.decode(), self.scales, self.biases
        if "bias" in self:
            layer.bias = self.bias
        layer.freeze()
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` (..., input_dims) to (..., output_dims)."""
        y = self._multiply(x)
        return y + self["bias"] if "bias" in self else y

    def _extra_repr(self) -> str:
        rows, cols = self.matrix.rows, self.matrix.cols
        return (
            f"input_dims={cols}, output_dims={rows}, bias={'bias' in self}, group_size={self.group_size}, bits={self.bits}, "
            f"mode={self.mode}, decode_mode={self.decode_mode}, coded_bits={8 * self.coded.size / (rows * cols):.2f}"
        )


class EntropyCodedEmbedding(_EntropyCoded, nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding` with entropy-coded weights. Looking tokens up decodes no more than the chunks that hold them.

    Args:
        num_embeddings, dims, group_size, bits, mode: as `nn.QuantizedEmbedding`; ``group_size`` 32, 64 or 128, 4 bits, affine.
        decode_mode, codec: as `EntropyCodedLinear`.

    Raises:
        ValueError: unknown modes and codecs, sizes that do not fit.
    """

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        decode_mode: str | DecodeMode = "auto",
        codec: str = "rans",
    ):
        layer = self.from_embedding(
            nn.Embedding(num_embeddings, dims), group_size, bits, mode, decode_mode=decode_mode, codec=codec
        )
        self.__dict__.update(layer.__dict__)
        dict.update(self, layer)  # parameters

    @classmethod
    def from_embedding(
        cls,
        embedding_layer: nn.Module,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        *,
        decode_mode: str | DecodeMode = "auto",
        codec: str = "rans",
    ):
        """Quantizes an `nn.Embedding` as MLX does, and codes it.

        Raises:
            ValueError: as `EntropyCodedLinear.from_linear`.
        """
        decoder = make_mode(decode_mode)
        check_quantization(group_size, bits, mode)
        _check_weight(embedding_layer.weight, group_size)
        quantized = nn.QuantizedEmbedding.from_embedding(embedding_layer, group_size, bits, mode)
        return cls.from_quantized(quantized, decode_mode=decoder, codec=codec)

    @property
    def num_embeddings(self) -> int:
        return self.matrix.rows

    @property
    def dims(self) -> int:
        return self.matrix.cols

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_):
        """The plain `nn.QuantizedEmbedding`, losslessly; as `EntropyCodedLinear.to_quantized`."""
        self._check_same_quantization(group_size, bits, mode)
        layer = nn.QuantizedEmbedding.__new__(nn.QuantizedEmbedding)
        nn.Module.__init__(layer)
        layer.group_size, layer.bits, layer.mode = self.group_size, self.bits, self.mode
        layer.num_embeddings, layer.dims = self.num_embeddings, self.dims
        layer.weight, layer.scales, layer.biases = self.matrix.decode(), self.scales, self.biases
        layer.freeze()
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens ``x`` (...) to (..., dims)."""
        ids = x.reshape(-1)
        rows = mx.dequantize(
            self.decoder.lookup(self, ids),
            scales=self["scales"][ids],
            biases=self["biases"][ids],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return rows.reshape(*x.shape, rows.shape[-1])

    def as_linear(self, x: mx.array) -> mx.array:
        """``x`` (..., dims) to (..., num_embeddings): the output projection of models that tie it to the embedding."""
        return self._multiply(x)

    def _extra_repr(self) -> str:
        rows, cols = self.matrix.rows, self.matrix.cols
        return (
            f"{rows}, {cols}, group_size={self.group_size}, bits={self.bits}, mode={self.mode}, "
            f"decode_mode={self.decode_mode}, coded_bits={8 * self.coded.size / (rows * cols):.2f}"
        )


def encode_packed(packed: mx.array, codec: str = "rans") -> np.ndarray:
    """The blob (bytes,) ``uint8`` of weights in MLX's packed layout (rows, cols / 8) ``uint32``.

    Raises:
        ValueError: another shape or type, an unknown codec.
    """
    if packed.ndim != 2 or packed.dtype != mx.uint32:
        raise ValueError(f"packed weights must be a uint32 matrix, not {packed.dtype} {packed.shape}")
    return tersor.encode_affine4(np.array(packed, copy=False), codec=codec)


def entropy_code(
    model: nn.Module,
    *,
    decode_mode: str | DecodeMode = "auto",
    codec: str = "rans",
    group_size: int = 64,
    class_predicate: Callable[[str, nn.Module], bool | dict] | None = None,
) -> None:
    """Codes sub-modules of ``model`` in place, as `nn.quantize` quantizes them.

    Args:
        model: its leaf modules may be coded.
        decode_mode, codec: of all coded layers, which share one mode object.
        group_size: for layers that are not quantized yet.
        class_predicate: takes path and module; False leaves the module, True codes it, a dict codes it with ``codec`` or ``group_size`` of
            its own. By default all layers that MLX quantized affinely to 4 bits are coded, losslessly, and others are left.
            `nn.Linear` and `nn.Embedding` are quantized to 4 bits first if the predicate accepts them.

    Raises:
        ValueError: nothing was accepted, or something that cannot be coded; unknown modes and codecs.
    """
    decoder = make_mode(decode_mode)
    predicate = class_predicate or (lambda _, module: is_codable(module))
    accepted = 0

    def code(path: str, module: nn.Module) -> nn.Module:
        nonlocal accepted
        answer = predicate(path, module)
        if not answer:
            return module
        if not isinstance(answer, (bool, dict)):
            raise ValueError(f"class_predicate must return a bool or a dict, not {answer!r}")
        options = {"codec": codec, "group_size": group_size, **(answer if isinstance(answer, dict) else {})}
        accepted += 1
        if isinstance(module, _EntropyCoded):
            module.decode_mode = decoder
            return module
        if isinstance(module, nn.QuantizedLinear):
            return EntropyCodedLinear.from_quantized(module, decode_mode=decoder, codec=options["codec"])
        if isinstance(module, nn.QuantizedEmbedding):
            return EntropyCodedEmbedding.from_quantized(module, decode_mode=decoder, codec=options["codec"])
        if isinstance(module, nn.Linear):
            return EntropyCodedLinear.from_linear(module, options["group_size"], decode_mode=decoder, codec=options["codec"])
        if isinstance(module, nn.Embedding):
            return EntropyCodedEmbedding.from_embedding(
                module, options["group_size"], decode_mode=decoder, codec=options["codec"]
            )
        raise ValueError(f"cannot code {path}, a {type(module).__name__}")

    leaves = tree_map_with_path(code, model.leaf_modules(), is_leaf=nn.Module.is_module)
    if not accepted:
        raise ValueError("nothing to code: the model has no affine 4-bit layers; quantize it (nn.quantize) or give a class_predicate")
    model.update_modules(leaves)


def entropy_decode(model: nn.Module) -> None:
    """Replaces all coded layers of ``model`` by MLX's quantized ones, in place and losslessly."""

    def decode(module: nn.Module) -> nn.Module:
        return module.to_quantized() if isinstance(module, _EntropyCoded) else module

    model.update_modules(tree_map_with_path(lambda _, m: decode(m), model.leaf_modules(), is_leaf=nn.Module.is_module))


def coded_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the coded layers of ``model``."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, _EntropyCoded)]


def set_decode_mode(model: nn.Module, mode: str | DecodeMode) -> DecodeMode:
    """Gives all coded layers of ``model`` one mode object, and returns it.

    Raises:
        ValueError: an unknown mode.
    """
    decoder = make_mode(mode)
    for _, layer in coded_layers(model):
        layer.decode_mode = decoder
    return decoder


def is_codable(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that MLX quantized in the way that can be coded losslessly."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or isinstance(module, _EntropyCoded):
        return False
    return module.mode == "affine" and module.bits == 4 and module.group_size in GROUP_SIZES


def check_quantization(group_size: int, bits: int, mode: str) -> None:
    """Refuses by ``ValueError`` what cannot be coded."""
    if mode != "affine" or bits != 4:
        raise ValueError(f"only MLX's affine mode with 4 bits can be coded, not {mode} with {bits} bits")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"unsupported group size {group_size}: one of {', '.join(map(str, GROUP_SIZES))}")


def _check_weight(weight: mx.array, group_size: int) -> None:
    if weight.ndim != 2 or weight.shape[1] % group_size or 0 in weight.shape:
        raise ValueError(f"a weight of shape {weight.shape} cannot be quantized in groups of {group_size} columns")
