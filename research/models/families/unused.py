"""Fields of a config.json that are not applied: those without effect, and those of training."""

import warnings
from collections.abc import Mapping
from typing import Any

from research.models.fields import Fields, spelt

_HISTORY = "says where the file comes from"
_TYPES = "the weights' dtype: `load` takes param_dtype"
_OUTPUTS = "what a call returns besides logits"
_TOKENS = "a token: the tokenizer's, or of generation"
_GENERATION = "a default of generation"
_TASKS = "for another task than the next token"
_SPEED = "computes the same function in another way"
_INITIAL = "initial weights, which the checkpoint replaces"


def _named(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


# name → why it changes nothing, in any family
EVERYWHERE: Mapping[str, str] = {
    **_named(
        _HISTORY,
        "_name_or_path name_or_path _commit_hash transformers_version auto_map unsloth_version "
        "unsloth_fixed model_name license finetuning_task",
    ),
    **_named(_TYPES, "dtype torch_dtype use_bfloat16 torchscript"),
    **_named(
        _OUTPUTS,
        "output_attentions output_hidden_states output_router_logits return_dict "
        "return_dict_in_generate output_scores use_return_dict use_cache",
    ),
    **_named(
        _TOKENS,
        "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id "
        "unk_token_id decoder_start_token_id tokenizer_class bos_token eos_token pad_token",
    ),
    **_named(
        _GENERATION,
        "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams "
        "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
        "num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix "
        "cache_implementation generation_config",
    ),
    **_named(
        _TASKS,
        "id2label label2id num_labels problem_type task_specific_params classifier_dropout "
        "tie_encoder_decoder cross_attention_hidden_size is_decoder",
    ),
    **_named(
        _SPEED,
        "attn_implementation _attn_implementation _attn_implementation_autoset "
        "_attn_implementation_internal experts_implementation _experts_implementation_internal "
        "chunk_size_feed_forward pretraining_tp use_flash_attn fused_add_norm tf_legacy_loss",
    ),
    **_named(_INITIAL, "initializer_range"),
}
# a value other than these describes another function, in any family
SUPPORTED: Mapping[str, Any] = {
    "compression_config": None,
    "per_layer_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# endings of the names of fields that change training alone; the last one: the balance loss of
# DeepSeek is of each sequence, and here of a micro-batch
_TRAINING = ("dropout", "pdrop", "seq_aux")
_NAMED = 12  # fields in one warning


def refuse_other_functions(fields: Fields) -> None:
    """Raise `ConfigError` for a field of `SUPPORTED` with another value."""
    fields.only(**{name: value for name, value in SUPPORTED.items() if name in fields})
    for name in SUPPORTED:
        fields.unused(name)


def warn_of_the_rest(fields: Fields, unused: Mapping[str, str], architecture: str) -> None:
    """Warn once, naming each field that was not read and is not known to change nothing.

    Args:
      fields: after the family has read it.
      unused: name → why, of the family.
    """
    training, unknown = [], []
    for name, value in fields.unread():
        if name in EVERYWHERE or name in unused:
            continue
        if name.endswith(_TRAINING):
            if value:
                training.append(name)
        else:
            unknown.append(name)
    reasons = [
        f"{_listed(names)}: {why}"
        for names, why in (
            (training, "not applied in training"),
            (unknown, f"not applied; no known field of a {architecture}"),
        )
        if names
    ]
    if reasons:
        warnings.warn(f"config.json: {'. '.join(reasons)}", stacklevel=4)


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(spelt, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")
