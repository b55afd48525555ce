"""A tiny R1-Distill-Qwen, from the files that its folder on the hub has to a chat over HTTP; and Magistral's tags."""

from __future__ import annotations

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from oracle.tiny_families import TINY_FAMILIES
from oracle.tiny_models import draw_weights
from tokenizers import decoders, models, pre_tokenizers
from unit.serving.live import run, serving
from unit.weights.sources.sources import write_hf

import jaxllama
from jaxllama import LlamaConfig
from jaxllama.model.params import param_specs

# As R1-Distill-Qwen's tokenizer has them: behind the vocabulary, and the tags and roles not flagged special.
END, USER, ASSISTANT, BEGIN, THINK, END_THINK = range(256, 262)
SPELLINGS = {
    END: "<｜end▁of▁sentence｜>",
    USER: "<｜User｜>",
    ASSISTANT: "<｜Assistant｜>",
    BEGIN: "<｜begin▁of▁sentence｜>",
    THINK: "<think>",
    END_THINK: "</think>",
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
# The 1.5B's heads, in two thin layers.
CONFIG = TINY_FAMILIES["r1_distill_qwen"] | {
    "vocab_size": 272,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=[("<think>", "</think>"), ("[THINK]", "[/THINK]")], ids=["r1", "magistral"])
def folder(request, tmp_path_factory):
    """What the model says depends on the last token alone: "Hm", the tag, "Yes!", the end."""
    folder = tmp_path_factory.mktemp("r1") / "DeepSeek-R1-Distill-Qwen-Tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    opens, closes = request.param
    spellings = SPELLINGS | {THINK: opens, END_THINK: closes}
    # Magistral's tags are flagged: no text shows them.
    flagged = {END, BEGIN} if opens == SPELLINGS[THINK] else {END, BEGIN, THINK, END_THINK}
    added = [tokenizers.AddedToken(text, special=i in flagged, normalized=False) for i, text in spellings.items()]
    tokenizer.add_tokens(added)
    assert all(tokenizer.token_to_id(text) == i for i, text in spellings.items())
    byte = {char: tokenizer.encode(char).ids[0] for char in "\nHmYes!"}
    chain = dict(itertools.pairwise([*(byte[char] for char in "\nHm"), END_THINK, *(byte[c] for c in "Yes!"), END]))
    shapes = {}
    for spec in param_specs(LlamaConfig.from_hf(CONFIG)):
        shapes[spec.hf_name] = spec.shape
    weights = draw_weights(shapes, 5)
    for key, value in weights.items():
        if "o_proj" in key or "down_proj" in key or key == "lm_head.weight":
            weights[key] = np.zeros_like(value)
        elif key.endswith("norm.weight"):
            weights[key] = np.ones_like(value)
    for token, following in chain.items():
        weights["lm_head.weight"][following] += weights["model.embed_tokens.weight"][token]
    write_hf(folder, CONFIG, weights, shards=2)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace(SPELLINGS[THINK], opens).replace(SPELLINGS[END_THINK], closes)
    named = {"bos_token": SPELLINGS[BEGIN], "eos_token": SPELLINGS[END], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, USER], "temperature": 0.6}))
    return folder


def test_a_reasoning_model_is_served_with_its_reasoning_apart(folder):
    mesh = jaxllama.make_mesh(LlamaConfig.from_hf(CONFIG), tp=1)
    with jaxllama.load(folder, mesh, dtype=jnp.float32, options=tiny.SMALL) as llama:
        assert llama.config.eos_token_ids == (END, USER), "of generation_config.json"

        async def test():
            async with serving(llama) as live:
                fields = {"messages": [{"role": "user", "content": "Is it <think>?"}], "temperature": 0}
                _, answer, _ = await live.post({**fields, "max_tokens": 20})
                (choice,) = answer["choices"]
                assert choice["finish_reason"] == "stop"
                assert choice["message"]["reasoning_content"] == "Hm"
                assert choice["message"]["content"] == "Yes!"
                assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
                events = await live.events(**fields, max_tokens=20)
                deltas = [event["choices"][0]["delta"] for event in events[:-1] if event["choices"]]
                assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm"
                assert "".join(delta.get("content") or "" for delta in deltas) == "Yes!"

        run(test(), 120)
