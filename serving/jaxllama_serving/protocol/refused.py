"""Fields that would change the answer and are not supported: each is refused by name, and says what to send instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """One field that is refused, unless its value asks for nothing: one of `harmless`.

    `switch` names a field that turns this one's feature off where it is there with a harmless value of its own: then
    this one has no effect. `instead` ends the sentence "Leave it out, or …".
    """

    instead: str = ""
    harmless: tuple[Any, ...] = ()
    switch: str | None = None


type Refusals = Mapping[str, Refused]


def refusals_in(data: Mapping[str, Any], table: Refusals) -> Iterator[tuple[str, Refused]]:
    """The fields of `data`, none of them null, that `table` refuses."""
    for name, value in data.items():
        refused = table.get(name)
        if refused is None or _is_one_of(value, refused.harmless):
            continue
        switch = table.get(refused.switch) if refused.switch is not None else None
        if switch is None or not _is_one_of(data.get(refused.switch or ""), switch.harmless):
            yield name, refused


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    # By type too: False == 0 and True == 1 in Python, not in JSON. Of numbers only the value counts, as in JSON.
    return any(value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in harmless)


def _all(
    names: str, instead: str = "", harmless: tuple[Any, ...] = (), switch: str | None = None
) -> dict[str, Refused]:
    return dict.fromkeys(names.split(), Refused(instead, harmless, switch))


# Of vLLM, SGLang, TGI, llama.cpp, Ollama, text-generation-webui and the libraries that speak to them.
_SAMPLING: Refusals = {
    **_all("use_beam_search do_beam_search early_stopping", harmless=(False,)),
    **_all("num_beams", harmless=(1,)),
    **_all("length_penalty diversity_penalty", harmless=(1,)),
    **_all("typical_p typical typ_p tfs tfs_z", harmless=(1,)),
    **_all("epsilon_cutoff eta_cutoff", harmless=(0,)),
    **_all("top_a smoothing_factor dynatemp_range penalty_alpha no_repeat_ngram_size", harmless=(0,)),
    **_all("dynatemp_exponent", switch="dynatemp_range"),
    **_all("smoothing_curve", switch="smoothing_factor"),
    **_all("guidance_scale cfg_scale encoder_repetition_penalty", harmless=(1,)),
    **_all("negative_prompt", harmless=("",)),
    **_all("top_n_sigma", harmless=(-1, 0)),
    **_all("min_keep", harmless=(0, 1)),
    **_all("mirostat mirostat_mode", harmless=(0,)),
    **_all("mirostat_tau mirostat_eta", switch="mirostat"),
    **_all("dry_multiplier", harmless=(0,)),
    **_all("dry_base dry_allowed_length dry_sequence_breakers dry_penalty_last_n dry_range", switch="dry_multiplier"),
    **_all("xtc_probability", harmless=(0,)),
    **_all("xtc_threshold", switch="xtc_probability"),
    **_all("repeat_penalty rep_pen", "use repetition_penalty", (1,)),
    **_all("repeat_last_n repetition_penalty_range", switch="repeat_penalty"),
    **_all("do_sample", "use temperature: 0 for the likeliest tokens", (True,)),
    **_all("random_seed", "use seed"),
    **_all("samplers sampler_order sampler_priority sampler_seed_order logits_processors custom_logit_processor"),
    **_all("custom_params temperature_last watermark", harmless=(False,)),
    **_all("bad_words bad_words_ids banned_tokens banned_strings custom_token_bans", "use logit_bias", ([], "")),
    **_all("allowed_token_ids", "use structured_outputs"),
    **_all("ban_eos_token", "use ignore_eos or min_tokens", (False,)),
    **_all("lora lora_path adapter_id", harmless=([], "")),
}
_BUDGETS_AND_STOPS: Refusals = {
    **_all("max_new_tokens max_length max_tokens_to_sample n_predict num_predict", "use max_tokens"),
    **_all("min_length min_new_tokens", "use min_tokens", (0,)),
    **_all("stop_sequences stop_words stop_strings", "use stop", ([], "")),
    **_all("stop_regex", harmless=([], "")),
    **_all("no_stop_trim", "use include_stop_str_in_output", (False,)),
    **_all("truncate truncate_prompt_tokens", harmless=(-1, 0, False)),
}
_GRAMMARS: Refusals = {
    **_all("grammar ebnf", "use structured_outputs: {grammar}", ("",)),
    **_all("regex", "use structured_outputs: {regex}", ("",)),
    **_all("json_schema format", "use response_format", ("",)),
    **_all("grammar_type grammar_lazy grammar_triggers structural_tag guided_whitespace_pattern", harmless=(False,)),
}
_SHAPES: Refusals = {
    **_all("skip_special_tokens", harmless=(True,)),
    **_all("spaces_between_special_tokens", harmless=(True,), switch="skip_special_tokens"),
    **_all("return_tokens_as_token_ids return_logprob return_hidden_states post_sampling_probs", harmless=(False,)),
    **_all("n_probs top_logprobs_num top_n_tokens logprob_start_len", "use logprobs", (0, -1)),
    **_all("logprob_token_ids", harmless=([],)),
    **_all("reasoning_format", harmless=("parsed", "auto", "deepseek")),
    **_all("separate_reasoning", harmless=(True,)),
    **_all("response_fields"),
}
_MEDIA: Refusals = {
    **_all("audio image images image_data video video_data files file input_audio", harmless=([],)),
    **_all("modalities", "ask for text only", (["text"], [])),
}
_OTHER_APIS: Refusals = {
    **_all("documents", "write them into the messages", ([],)),
    **_all("template chat_template", "change the checkpoint's: the server uses no other"),
    **_all("raw", harmless=(False,)),
    **_all("options", "give its fields beside messages", ({},)),
    **_all("thinking_token_budget", "use thinking_budget"),
    **_all("web_search_options search_parameters"),
    **_all("background", harmless=(False,)),
}
SHARED: Refusals = {**_SAMPLING, **_BUDGETS_AND_STOPS, **_GRAMMARS, **_SHAPES, **_MEDIA, **_OTHER_APIS}
"""Of every route that generates."""

CHAT: Refusals = {
    **SHARED,
    **_all("functions", "use tools", ([],)),
    **_all("function_call", "use tool_choice", ("none",)),
    **_all("best_of", "use n", (1,)),
    **_all("echo", "use continue_final_message to go on with a message", (False,)),
    **_all("prompt suffix system input", "use messages", ("",)),
    **_all("enable_thinking", "use chat_template_kwargs: {enable_thinking} or reasoning: {enabled}"),
    **_all("thinking", "use reasoning: {enabled}, or thinking_budget"),
    **_all("add_special_tokens", harmless=(False,)),
}
COMPLETIONS: Refusals = {
    **SHARED,
    **_all("suffix", harmless=("",)),
    **_all("messages", "use the route for chats"),
    **_all("tools functions", "use the route for chats", ([],)),
    **_all("tool_choice function_call", "use the route for chats", ("none", "auto")),
    **_all("response_format", "use the route for chats", ({"type": "text"},)),
    **_all("structured_outputs guided_json guided_regex guided_choice guided_grammar", "use the route for chats"),
    **_all("top_logprobs", "use logprobs, a number", (0,)),
    **_all("reasoning reasoning_effort thinking_budget enable_thinking thinking", "use the route for chats"),
    **_all("chat_template_kwargs", "use the route for chats", ({},)),
    **_all("continue_final_message", "use the route for chats", (False,)),
    **_all("prediction", "use the route for chats"),
    **_all("add_special_tokens", harmless=(True,)),
}
MESSAGE: Refusals = {
    **_all("audio image images image_url video files file attachments", "write text", ([],)),
    **_all("function_call", "use tool_calls"),
    **_all("refusal", "use content", ("",)),
}
TOKENIZE: Refusals = {
    **_all("chat_template", "change the checkpoint's: the server uses no other"),
    **_all("documents", harmless=([],)),
}
