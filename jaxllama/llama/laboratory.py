"""What looks into a model and changes it: the plain forward pass, traces, patches, other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllama.decode.prompts import token_ids
from jaxllama.engine.engine import Engine
from jaxllama.errors import CheckpointError, ContextLengthError, RequestError, quote
from jaxllama.model import dense
from jaxllama.model.config import LlamaConfig
from jaxllama.model.dense import POINTS, Patch
from jaxllama.model.int8 import quantization, quantize_rows
from jaxllama.model.mesh import param_shardings
from jaxllama.model.params import Params, QuantizedWeight, build_params, get_param, param_specs
from jaxllama.weights.forms import fit


@dataclass(frozen=True)
class Trace:
    """What a forward pass went through. `trace["resid_post"]` is `[layers, T, …]`, as `POINTS` says for one sequence.

    `layers` are those that were asked for, in their order along the first axis; `logits` are float32 `[T, V]`.
    """

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    logits: Float[Array, "tokens vocab"]
    values: dict[str, Array] = field(repr=False)

    def __getitem__(self, what: str) -> Array:
        if what not in self.values:
            raise RequestError(f"{quote(what)} was not traced; there are {', '.join(self.values)}", "what")
        return self.values[what]


class Laboratory:
    """The part of `Llama` that goes around the engine. `params_version` counts the calls of `update_params`."""

    config: LlamaConfig
    params: Params
    mesh: jax.sharding.Mesh
    engine: Engine
    params_version: int = 0

    def forward(
        self,
        tokens: Int[Any, "batch tokens"] | Float[Any, "batch tokens embed"],
        mask: Bool[Any, "batch tokens"] | None = None,
        *,
        params: Params | None = None,
        patches: Sequence[Patch] = (),
        remat: bool = False,
    ) -> Float[Array, "batch tokens vocab"]:
        """Float32 logits after each token, of a plain forward pass without a cache, to differentiate and to `jit`.

        `tokens` are ids, or embeddings as `embed` gives them, for gradients with respect to the input. Tokens where
        `mask` is false are padding, on either side. `params` are others than the model's, such as `plain_params`
        changed, for gradients with respect to weights. `patches` change what is within. `remat` keeps only what goes
        from layer to layer for the gradient, and computes the rest again. On a mesh rows lie over `data` if it divides
        them. A `jit` around this makes the model's own weights constants of its program: give it `params`.

        Raises: RequestError for patches of layers that are not there, ContextLengthError for more than the context.
        """
        tokens = jnp.asarray(tokens)
        mask = jnp.ones(tokens.shape[:2], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
        logits, _ = self._dense(tokens, mask, patches, params=params, remat=remat)
        return logits

    def trace(
        self,
        ids: Sequence[int],
        what: Sequence[str] = ("resid_post",),
        layers: Sequence[int] | None = None,
        *,
        patches: Sequence[Patch] = (),
    ) -> Trace:
        """What one sequence's forward pass goes through: each of `what` (names of `POINTS`), in `layers` (None: all).

        `patches` change what is within, before it is seen. The logit lens is `unembed(trace["resid_post"])`.

        Raises: RequestError for a name, a layer or ids that are not there, ContextLengthError for too many ids.
        """
        tokens = token_ids(ids, "ids")
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise RequestError(f"ids must be token ids from 0 to {self.config.vocab_size - 1}, at least one", "ids")
        names = (what,) if isinstance(what, str) else tuple(what)
        if unknown := [name for name in names if name not in POINTS]:
            raise RequestError(f"no {', '.join(map(quote, unknown))} to trace; there are {', '.join(POINTS)}", "what")
        wanted = tuple(range(self.config.num_layers)) if layers is None else tuple(int(layer) for layer in layers)
        self._check_layers(wanted, "layers")
        mask = jnp.ones((1, len(tokens)), jnp.bool_)
        once = tuple(sorted(set(wanted)))
        logits, values = self._dense(jnp.asarray([tokens]), mask, patches, record=names, layers=once)
        order = np.searchsorted(once, wanted)
        return Trace(
            tuple(tokens), wanted, logits[0], {name: values[name][order, 0] for name in names if name in values}
        )

    def embed(self, tokens: Int[Any, "*batch"]) -> Float[Array, "*batch embed"]:
        """What enters the first layer for `tokens`."""
        return dense.embed(self.config, self.params, jnp.asarray(tokens), platform=self.engine.platform)

    def unembed(self, hidden: Float[Any, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of a residual stream, wherever it was taken, through the last norm and the head.

        Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
        """
        return dense.unembed(self.config, self.params, jnp.asarray(hidden), platform=self.engine.platform)

    def plain_params(self) -> Params:
        """A copy of the weights as floats, each matrix `[out, in]`: to differentiate by, change and give back.

        Its layout is that of `jaxllama.model.params`: `params["layers"][3]["q_proj"]`. Of int8 weights it has what they
        stand for. Not for feed-forward matrices in parts, as large models have them on TPUs.
        """
        return jax.jit(dense.plain)(self.params)

    def update_params(self, params: Params) -> None:
        """Puts `params`, laid out as `plain_params`, in the place of the weights, for all calls from now on.

        They are rounded and laid out as the model's own are: to its dtype, or int8. What the prefix cache holds is
        dropped, and `params_version`, which is part of the server's fingerprint, rises. Nothing compiles again.

        Raises: CheckpointError listing every array that is missing or of another shape; RequestError while requests
            run, and for a model over many processes.
        """
        wrong = []
        for spec in param_specs(self.config):
            try:
                found = np.shape(get_param(params, spec))
            except (KeyError, IndexError, TypeError, ValueError):
                wrong.append(f"{spec.name} is missing")
                continue
            if found != spec.shape:
                wrong.append(f"{spec.name} has shape {found}, expected {spec.shape}")
        if wrong:
            raise CheckpointError(f"update_params: {'; '.join(wrong[:20])}")
        fitted = self._fitted(params)
        own: Any = jax.tree.structure(self.params)
        if jax.tree.structure(fitted) != own:
            raise CheckpointError("update_params: these weights take another form than the model's own on its devices")
        self.engine.update_params(fitted)
        self.params = fitted
        self.params_version += 1

    def _fitted(self, params: Params) -> Params:
        quantize, dtype = quantization(self.params), self.params["norm"].dtype

        def own(spec: Any) -> Any:
            array = jnp.asarray(get_param(params, spec))
            if quantize and array.ndim == 2:
                return QuantizedWeight(*_quantize(array))
            return array.astype(dtype)

        arrays = build_params(self.config, own)
        shardings = param_shardings(self.config, self.mesh, quantize)
        return fit(jax.device_put(arrays, shardings), self.engine.platform)

    def _dense(
        self,
        tokens: Int[Array, "batch tokens"] | Float[Array, "batch tokens embed"],
        mask: Bool[Array, "batch tokens"],
        patches: Sequence[Patch],
        *,
        params: Params | None = None,
        **options: Any,
    ) -> tuple[Array, dict[str, Array]]:
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"{tokens.shape[1]} tokens exceed the context of {self.config.max_position_embeddings}", "tokens"
            )
        self._check_layers([patch.layer for patch in patches], "patches")
        weights = self.params if params is None else params
        return dense.forward(
            self.config, weights, tokens, mask, tuple(patches), platform=self.engine.platform, **options
        )

    def _check_layers(self, layers: Sequence[int], param: str) -> None:
        most = self.config.num_layers - 1
        if wrong := sorted({layer for layer in layers if not 0 <= layer <= most}):
            raise RequestError(f"{param}: no layer {', '.join(map(str, wrong))}; there are 0 to {most}", param)


_quantize = jax.jit(quantize_rows)
