"""Tokenizers of public families, tiny and by hand: the same rules and chat templates, without their vocabularies.

``FAMILIES[name]`` is what the family publishes beside its tokenizer, ``tokenizer(name)`` the tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.families import templates
from tests.families.vocabularies import by_gpt2, by_words, byte_level, finished, sentence_piece, unigram
from trainer.models.attention import NAME
from trainer.models.policy import Policy

Make = Callable[[], PreTrainedTokenizerFast]
LLAMA = ("<unk>", "<s>", "</s>")
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


class Family(NamedTuple):
    """What is known of a family besides its tokenizer."""

    make: Make
    ends: tuple[str, ...]  # of generation_config; the first is what a reply ends with
    before: tuple[str, ...] = ()  # the tokenizer's own tokens before every text
    system: bool = True  # whether a conversation may begin with a system message
    lead: str = ""  # what a template writes between the prompt and the text of a reply
    tail: str = ""  # and between the text and the end
    writes_end: bool = True


FAMILIES: dict[str, Family] = {}


def _family(ends: str, before: str = "", **more: bool | str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        FAMILIES[make.__name__] = Family(make, tuple(ends.split()), tuple(before.split()), **more)
        return make

    return enter


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Made once; who changes it takes ``FAMILIES[name].make()``."""
    return FAMILIES[name].make()


def policy(name: str, seed: int = 0) -> Policy:
    """A Llama of random weights that ends as the family does, by its generation_config."""
    tok, family = tokenizer(name), FAMILIES[name]
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    config._attn_implementation = NAME
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [tok.convert_tokens_to_ids(end) for end in family.ends]
    return Policy(model, tok)


@_family("</s>", "<s>", tail=" ")
def llama2() -> PreTrainedTokenizerFast:
    return finished(sentence_piece(LLAMA, blank="legacy"), templates.LLAMA2, before=["<s>"], **NAMED)


@_family("<|eot_id|> <|eom_id|> <|end_of_text|>", "<|begin_of_text|>")
def llama3() -> PreTrainedTokenizerFast:
    extra = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"]
    return finished(
        byte_level(by_words()), templates.LLAMA3, extra=extra, before=["<|begin_of_text|>"],
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    )  # fmt: skip


@_family("</s>", "<s>", system=False)
def mistral1() -> PreTrainedTokenizerFast:
    return finished(sentence_piece(LLAMA, blank="legacy"), templates.MISTRAL1, before=["<s>"], **NAMED)


@_family("</s>", "<s>", system=False)  # it takes one, and drops it once the question is answered
def mistral3() -> PreTrainedTokenizerFast:
    control = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
    made = sentence_piece([*LLAMA, *control], blank="first")
    return finished(made, templates.MISTRAL3, extra=control, before=["<s>"], **NAMED)


@_family("<end_of_turn> <eos>", "<bos>", system=False)
def gemma2() -> PreTrainedTokenizerFast:
    turns = ["<start_of_turn>", "<end_of_turn>"]
    made = sentence_piece(["<pad>", "<eos>", "<bos>", "<unk>", *turns], blank="none", breaks=True)
    # In theirs, pieces are cut at blanks that the normalizer has already replaced.
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return finished(made, templates.GEMMA2, extra=turns, before=["<bos>"], **named)


@_family("<|im_end|> <|endoftext|>")
def qwen2() -> PreTrainedTokenizerFast:
    made = byte_level(by_words(), normalizers.NFC())
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return finished(made, templates.QWEN2, extra=["<|im_start|>"], **named)


@_family("<|im_end|> <|endoftext|>", lead="<think>\n\n</think>\n\n")
def qwen3() -> PreTrainedTokenizerFast:
    made, words = byte_level(by_words(), normalizers.NFC()), ["<think>", "</think>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return finished(made, templates.QWEN3, extra=["<|im_start|>"], words=words, **named)


@_family("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
def deepseek_r1() -> PreTrainedTokenizerFast:
    first, words = "<｜begin▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    named = {"bos_token": first, "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜end▁of▁sentence｜>"}
    return finished(byte_level(by_words()), templates.DEEPSEEK_R1, words=words, before=[first], **named)


@_family("<|end|> <|endoftext|> <|assistant|>")
def phi3() -> PreTrainedTokenizerFast:
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    extra = [AddedToken(n, rstrip=True, normalized=False, special=True) for n in names]  # they swallow line breaks
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return finished(sentence_piece(LLAMA, blank="legacy"), templates.PHI3, extra=extra, **named)


@_family("</s>", "<s>")
def zephyr() -> PreTrainedTokenizerFast:
    return finished(sentence_piece(LLAMA, blank="legacy"), templates.ZEPHYR, before=["<s>"], pad_token="</s>", **NAMED)


@_family("<|endoftext|> <|user|> <|observation|>", "[gMASK] <sop>", lead="\n", writes_end=False)
def glm4() -> PreTrainedTokenizerFast:
    extra = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return finished(byte_level(by_words()), templates.GLM4, extra=extra, before=["[gMASK]", "<sop>"], **named)


@_family("<|im_end|>")
def smollm2() -> PreTrainedTokenizerFast:
    made = byte_level(by_gpt2(pre_tokenizers.Digits(individual_digits=True)))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return finished(made, templates.SMOLLM2, pad_token="<|im_end|>", **named)


@_family("<|endoftext|>")
def olmo2() -> PreTrainedTokenizerFast:
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return finished(byte_level(by_words()), templates.OLMO2, **named)


@_family("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>")
def command_r() -> PreTrainedTokenizerFast:
    made = byte_level(by_gpt2(pre_tokenizers.Digits(individual_digits=True)), normalizers.NFC())
    extra = [f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "SYSTEM", "USER", "CHATBOT")]
    named = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
    return finished(made, templates.COMMAND_R, extra=extra, before=["<BOS_TOKEN>"], **named)


@_family("<|endoftext|>")
def falcon() -> PreTrainedTokenizerFast:
    return finished(byte_level(by_gpt2(pre_tokenizers.Punctuation("contiguous"))), eos_token="<|endoftext|>")


@_family("<|endoftext|>")
def pythia() -> PreTrainedTokenizerFast:
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return finished(byte_level(by_gpt2(), normalizers.NFC()), extra=["<|padding|>"], **named)


@_family("</s>", "</s>")  # what begins a text is what ends it
def opt() -> PreTrainedTokenizerFast:
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return finished(byte_level(by_gpt2()), before=["</s>"], **named)


@_family("</s>", "</s>")  # here too, and yet it has a token for the beginning
def xglm() -> PreTrainedTokenizerFast:
    made = unigram(["<s>", "<pad>", "</s>", "<unk>"])
    return finished(made, before=["</s>"], pad_token="<pad>", **NAMED)


@_family("</s>", "<s>")
def llama_base() -> PreTrainedTokenizerFast:
    """With ``add_eos_token``: it ends every text, a prompt as well."""
    return finished(sentence_piece(LLAMA, blank="legacy"), before=["<s>"], behind=["</s>"], **NAMED)


CHATS = [name for name in FAMILIES if tokenizer(name).chat_template]
PLAIN = [name for name in FAMILIES if name not in CHATS]
