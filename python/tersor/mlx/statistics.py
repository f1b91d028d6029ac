"""What a coded model holds, counted."""

from dataclasses import dataclass

import mlx.nn as nn

from .layers import coded_layers


@dataclass(frozen=True)
class ModelStatistics:
    """Sizes in bytes. ``bits`` count blobs and scales, everything included."""

    layers: int
    weights: int
    coded_nbytes: int  # blobs
    side_nbytes: int  # scales and biases
    plain_nbytes: int  # the same layers as MLX packs them, with scales and biases
    decoded_nbytes: int  # decoded weights that are held now, buffers included
    mode: str

    @property
    def coded_bits(self) -> float:
        return 8 * (self.coded_nbytes + self.side_nbytes) / self.weights

    @property
    def plain_bits(self) -> float:
        return 8 * self.plain_nbytes / self.weights

    def __str__(self) -> str:
        return (
            f"Coded weights: {self.coded_bits:.3f} bits per weight (MLX {self.plain_bits:.3f}), "
            f"{(self.coded_nbytes + self.side_nbytes) / 1e9:.3f} GB in {self.layers} layers, "
            f"decode mode {self.mode} holds {self.decoded_nbytes / 1e9:.3f} GB decoded"
        )


def statistics(model: nn.Module) -> ModelStatistics:
    """Statistics of the coded layers of ``model``.

    Raises:
        ValueError: it has none.
    """
    layers = [layer for _, layer in coded_layers(model)]
    if not layers:
        raise ValueError("the model has no coded layers")
    side = sum(layer["scales"].nbytes + layer["biases"].nbytes for layer in layers)
    decoders = {id(layer.decoder): layer.decoder for layer in layers}
    return ModelStatistics(
        layers=len(layers),
        weights=sum(layer.matrix.rows * layer.matrix.cols for layer in layers),
        coded_nbytes=sum(layer["coded"].nbytes for layer in layers),
        side_nbytes=side,
        plain_nbytes=side + sum(layer.matrix.decoded_nbytes for layer in layers),
        decoded_nbytes=sum(decoder.resident_nbytes() for decoder in decoders.values()),
        mode=" + ".join(sorted({decoder.name for decoder in decoders.values()})),
    )
