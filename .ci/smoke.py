"""What a fresh installation must do: import everything, show every command, convert a model, load it and answer.

Run by `make release` with the installation's Python, in an empty folder. Needs nothing but jaxllama[convert,serve].
"""

import json
import pkgutil
import subprocess
import sys
from importlib import import_module, resources
from pathlib import Path

import numpy as np

VOCAB, HIDDEN, FFN, HEADS, LAYERS = 64, 32, 48, 4, 2


def write_model(folder: Path) -> None:
    """A Llama of random weights as Hugging Face writes it: one safetensors file and a config."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    header, body = {}, b""
    for name, shape in shapes.items():
        data = rng.normal(0, 0.1, shape).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Fails at the first thing that does not work."""
    for package in ("jaxllama", "jaxllama_convert", "jaxllama_serving"):
        module = import_module(package)
        assert "site-packages" in (module.__file__ or ""), f"{package} was imported from {module.__file__}"
        assert resources.files(package).joinpath("py.typed").is_file(), f"{package} has no py.typed"
        for inner in pkgutil.walk_packages(module.__path__, f"{package}."):
            # The kernels lie beside modules, and are none.
            if not inner.name.endswith("__main__") and "-" not in inner.name:
                import_module(inner.name)
    assert resources.files("jaxllama_serving").joinpath("web/index.html").is_file(), "the chat page is missing"

    command = [sys.executable, "-m", "jaxllama"]
    for args in (["--version"], ["serve", "--help"], ["convert", "--help"], ["chat", "--help"], ["plan", "--help"]):
        subprocess.run([*command, *args], check=True, stdout=subprocess.DEVNULL)
    folder = Path("tiny")
    if not folder.exists():
        write_model(folder)
    subprocess.run([*command, "convert", "tiny", "checkpoint", "--force", "--verify"], check=True)

    import jaxllama

    params = jaxllama.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with jaxllama.load("checkpoint", options=jaxllama.EngineOptions(compilation_cache="off")) as llama:
        first, second = (llama.generate([3, 5, 7], params).token_ids for _ in range(2))
    assert len(first) == 8
    assert first == second


if __name__ == "__main__":
    main()
