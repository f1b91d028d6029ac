"""`mlx_lm.generate` with one more line of statistics."""

from typing import Any

from .load import coded_layers
from .statistics import statistics


def generate(model, tokenizer, prompt, verbose: bool = False, **kwargs: Any) -> str:
    """Generates a completion; arguments are those of `mlx_lm.generate`. ``verbose`` prints its statistics and ours."""
    import mlx_lm

    text = mlx_lm.generate(model, tokenizer, prompt, verbose=verbose, **kwargs)
    if verbose and coded_layers(model):
        print(statistics(model))
    return text
