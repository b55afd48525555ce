"""Which keys of a config.json may be passed over in silence.

Keys that this library computes with, and those that it refuses unless they change nothing, are in `model.config`.
What follows belongs to training, to other tasks, to PyTorch, or to how transformers generates.

Source: LlamaConfig, PreTrainedConfig and GenerationConfig of transformers 4.31 to 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllama.errors import listed, one_line
from jaxllama.model.config import KNOWN_KEYS

# PreTrainedConfig: where it comes from, its classes, and what it returns.
_OF_ANY_MODEL = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _flash_attn_2_enabled _name_or_path attn_implementation chunk_size_feed_forward
    decoder_start_token_id dtype finetuning_task id2label is_decoder label2id name_or_path num_labels
    output_attentions output_hidden_states prefix problem_type pruned_heads return_dict sep_token_id
    task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers_version
    use_bfloat16 use_cache use_return_dict
"""
# LlamaConfig: training, and slices of the same products.
_OF_LLAMA = """
    attention_dropout cls_token_id embd_pdrop hidden_dropout initializer_range mask_token_id pad_token_id
    pretraining_tp resid_pdrop router_aux_loss_coef unk_token_id
"""
# GenerationConfig, once kept in config.json.
_OF_GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind
    bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config constraints
    continuous_batching_config disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids
    forced_eos_token_id generation_kwargs guidance_scale is_assistant length_penalty low_memory max_cache_len
    max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate return_legacy_cache
    sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature token_healing
    top_h top_k top_p typical_p use_mtp watermarking_config
"""
# Other libraries' notes to themselves.
_OF_OTHERS = """
    _unsloth_version max_sequence_length max_window_layers mlx_version model_max_length num_parameters
    transformers.js_config unsloth_fixed unsloth_version
"""
_HARMLESS = frozenset((_OF_ANY_MODEL + _OF_LLAMA + _OF_GENERATION + _OF_OTHERS).split())


def unknown_key_warnings(config: Mapping[str, Any]) -> list[str]:
    """One warning that names the keys nobody here knows, if there are any. transformers' Llama would ignore them too.

    Keys that are null say nothing.
    """
    unknown = [key for key, value in config.items() if value is not None and key not in KNOWN_KEYS | _HARMLESS]
    if not unknown:
        return []
    names = listed([one_line(key, 80) for key in sorted(unknown)])
    return [f"config.json has {len(unknown)} key(s) that no Llama knows, which are ignored: {names}"]
