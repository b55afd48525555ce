"""One table describes every tensor: paths, names and shapes agree and are unique."""

from __future__ import annotations

import math

import pytest
import tiny
from oracle.tiny_models import TINY_MODELS, hf_shapes

from jaxllama.model.mesh import RULES
from jaxllama.model.params import build_params, get_param, param_specs


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_hf_tensor_maps_exactly_once(name):
    specs = param_specs(tiny.config_of(name))
    assert len({spec.hf_name for spec in specs}) == len({spec.path for spec in specs}) == len(specs)
    assert {spec.hf_name: spec.shape for spec in specs} == hf_shapes(tiny.MODELS[name])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_dimension_has_a_known_logical_axis(name):
    for spec in param_specs(tiny.config_of(name)):
        assert len(spec.axes) == len(spec.shape)
        assert set(spec.axes) <= set(RULES)
        assert spec.size == math.prod(spec.shape)


def test_logical_axes_follow_the_letters():
    config = tiny.config_of("biased")
    size = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
    }
    assert len(set(size.values())) == len(size)
    for spec in param_specs(config):
        assert tuple(size[axis] for axis in spec.axes) == spec.shape, spec.name


@pytest.mark.parametrize("name", ["biased", "wide_heads_tied"])
def test_the_tree_holds_each_leaf_where_its_path_says(name):
    config = tiny.config_of(name)
    tree = build_params(config, lambda spec: spec.name)
    for spec in param_specs(config):
        assert get_param(tree, spec) == spec.name
    assert ("lm_head" in tree) == (not config.tie_word_embeddings)
    assert len(tree["layers"]) == config.num_layers
    # Plain dicts and lists: jit flattens them in C++.
    assert type(tree) is dict
    assert type(tree["layers"]) is list
    assert all(type(layer) is dict for layer in tree["layers"])


def test_biases_are_there_exactly_when_configured():
    def biases(**changes: bool) -> set[str]:
        specs = param_specs(tiny.config_of("biased", **changes))
        return {spec.hf_name.split(".", 3)[3] for spec in specs if spec.hf_name.endswith(".bias")}

    attention = {f"self_attn.{name}_proj.bias" for name in "qkvo"}
    mlp = {f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}
    assert biases() == attention | mlp
    assert biases(mlp_bias=False) == attention
    assert biases(attention_bias=False) == mlp
    assert biases(attention_bias=False, mlp_bias=False) == set()
