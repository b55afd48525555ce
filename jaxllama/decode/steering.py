"""A vector that is added to one request's residual stream while it decodes. No JAX."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxllama.errors import RequestError, quote


class Steering:
    """`scale * vector` is added to what `layer` puts out, at the prompt's last token and at every generated one.

    `vector` is `[hidden_size]`, in the units of the residual stream (`Llama.trace`'s `resid_post`), and is kept as
    float32. Other requests are not changed in any bit, and a vector of zeros changes none of this one. No new vector
    compiles anything. What comes of it is never found in the prefix cache.

    Raises: RequestError for a vector that is no list of finite numbers, or a layer below 0.

    Source: Turner et al. 2023, arXiv:2308.10248; Rimsky et al. 2023, arXiv:2312.06681.
    """

    def __init__(self, layer: int, vector: Any, scale: float = 1.0) -> None:
        try:
            values = np.asarray(vector, np.float32) * np.float32(scale)
        except (TypeError, ValueError):
            raise RequestError(f"steering: vector must be numbers, got {quote(vector)}", "steering") from None
        if values.ndim != 1 or not np.isfinite(values).all():
            raise RequestError(
                f"steering: vector must be [hidden_size], all finite, got an array of shape {values.shape}", "steering"
            )
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise RequestError(f"steering: layer must be an integer of 0 or more, got {quote(layer)}", "steering")
        self.layer = layer
        self.vector: Float[np.ndarray, " embed"] = values
        self.vector.flags.writeable = False

    def __repr__(self) -> str:
        norm = float(np.linalg.norm(self.vector))
        return f"Steering(layer={self.layer}, vector=<{len(self.vector)} numbers of norm {norm:.4g}>)"

    def check_model(self, num_layers: int, hidden_size: int) -> None:
        """Raises: RequestError for a layer or a vector that a model of these sizes does not have."""
        if self.layer >= num_layers:
            raise RequestError(f"steering: no layer {self.layer}; there are 0 to {num_layers - 1}", "steering")
        if len(self.vector) != hidden_size:
            raise RequestError(
                f"steering: vector has {len(self.vector)} numbers, expected hidden_size={hidden_size}", "steering"
            )
