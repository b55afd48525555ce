"""Which source tensor becomes which parameter: every one exactly once."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxllama.errors import ConversionError, listed, one_line
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, param_specs
from jaxllama.weights.sources.source import BLOCK_TYPES, FLOATS, SourceTensor

LM_HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
# Old checkpoints store the rotary frequencies, which follow from config.json.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_COMPARED_BYTES = 16 * 2**20


def match_tensors(
    config: LlamaConfig, tensors: Mapping[str, SourceTensor], where: str, *, reads: bool = True
) -> tuple[tuple[ParamSpec, SourceTensor], ...]:
    """Pairs every parameter with its source tensor, in the order of the bytes in the source.

    Rotary buffers are ignored. A tied model may ship an lm_head.weight if it equals the embedding; unless `reads`,
    which looks at the values, that is assumed.

    Raises: ConversionError listing every missing, unexpected, misshapen or unreadable tensor.
    """
    # Before the names of a billion layers are made up.
    if config.num_layers > len(tensors):
        raise ConversionError(
            f"{where}: config.json says {config.num_layers} layers, but there are {len(tensors)} tensors"
        )
    specs: dict[str, list[ParamSpec]] = {}
    for spec in param_specs(config):
        specs.setdefault(spec.hf_name, []).append(spec)
    problems = [f"missing {name}" for name in specs if name not in tensors]
    for name, tensor in tensors.items():
        if name in specs:
            problems += _problems(specs[name], tensor)
        elif name == LM_HEAD and config.tie_word_embeddings:
            problems += _tied_head_problems(tensor, tensors.get(EMBED)) if reads else []
        elif not _IGNORED.fullmatch(name):
            problems.append(f"unexpected {one_line(name, 80)}")
    if problems:
        raise ConversionError(
            f"{where}: {len(problems)} tensor(s) do not fit config.json: {listed(problems)}. "
            "Is config.json from this model?"
        )
    pairs = [
        (spec, tensors[name] if spec.hf_rows is None else tensors[name].part(*spec.hf_rows))
        for name, held in specs.items()
        for spec in held
    ]
    return tuple(sorted(pairs, key=lambda pair: (pair[1].file.name, pair[1].offset)))


def _problems(held: list[ParamSpec], tensor: SourceTensor) -> list[str]:
    """What is wrong with a tensor that holds these parameters, one after the other."""
    if not tensor.is_readable:
        return [f"{tensor.name} has dtype {tensor.dtype}, expected one of {', '.join((*FLOATS, *BLOCK_TYPES))}"]
    shape = (sum(spec.shape[0] for spec in held), *held[0].shape[1:])
    if tensor.shape != shape:
        return [f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}"]
    return []


def _tied_head_problems(head: SourceTensor, embed: SourceTensor | None) -> list[str]:
    if embed is None:
        return []
    if (head.shape, head.dtype) != (embed.shape, embed.dtype) or not same_bytes(head, embed):
        return [f"{LM_HEAD} differs from {EMBED} although tie_word_embeddings is true"]
    return []


def same_bytes(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors of the same size have the same bytes."""
    for start in range(0, a.num_bytes, _COMPARED_BYTES):
        num_bytes = min(_COMPARED_BYTES, a.num_bytes - start)
        if a.file.read(a.offset + start, num_bytes).tobytes() != b.file.read(b.offset + start, num_bytes).tobytes():
            return False
    return True
