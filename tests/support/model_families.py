"""Every causal-LM family that transformers ships, built tiny at random, taken apart and put together again.

`python -m tests.support.model_families` writes the table into docs/models.md.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import Parts, take_apart
from tests.support.problems import A_FEW, ulp

DOC = Path(__file__).parents[2] / "docs" / "models.md"


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What is small, by the names that configs use for it.
SMALL: dict[str, Any] = {
    **_all(
        96, "vocab_size audio_vocab_size decoder_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"
    ),
    **_all(96, "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base"),
    **_all(
        32,
        "hidden_size hidden_size_global d_model n_embd dim emb_dim embedding_dim embedding_size lru_width",
    ),
    **_all(32, "word_embed_proj_dim input_embedding_size output_embedding_size backbone_hidden_size"),
    **_all(32, "pronunciation_embed_dim shape_embed_dim ple_embed_dim hc_lowrank router_hidden_size"),
    **_all(
        48, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dim_ff dff ffn_hidden_size feed_forward_size"
    ),
    **_all(48, "d_inner dense_intermediate_size intermediate_size_mlp shared_intermediate_size n_inner"),
    **_all(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_all(16, "moe_shared_expert_intermediate_size hidden_size_per_layer_input"),
    **_all(2, "num_hidden_layers decoder_layers encoder_layers n_layer n_layers num_layers num_blocks"),
    **_all(2, "num_decoder_layers num_encoder_layers num_mem_blocks"),
    **_all(4, "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads num_heads"),
    **_all(4, "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads"),
    **_all(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads num_query_groups"),
    **_all(
        8, "head_dim swa_head_dim index_head_dim attention_head_size dim_head d_head kv_channels d_kv linear_head_dim"
    ),
    **_all(8, "qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar"),
    **_all(4, "qk_rope_head_dim rotary_dim linear_num_heads linear_num_value_heads"),
    **_all(2, "linear_num_key_heads"),
    **_all(16, "kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank gated_norm_rank"),
    **_all(8, "qk_head_dim"),
    **_all(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    **_all(1, "n_group topk_group n_groups mamba_n_groups n_shared_experts"),
    **_all(64, "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions"),
    **_all(64, "context_length prompt_length sliding_window"),
    **_all(16, "chunk_size mamba_chunk_size block_size state_size mamba_d_state ssm_state_size"),
    **_all(8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_all(8, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_all(4, "time_step_rank mamba_dt_rank"),
    **_all(0, "bos_token_id pad_token_id"),
    **_all(1, "eos_token_id"),
}
LATENT = {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
BOTH = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64}
# Where a config, by its model_type, has numbers that must agree with the small ones.
ESPECIALLY: dict[str, dict[str, Any]] = {
    **_all(
        LATENT, "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu"
    ),
    **_all(MIXED, "granitemoehybrid qwen3_5_text qwen3_5_moe_text qwen3_next"),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 96},
    "cohere_compass_text": {"layer_types": BOTH, "rope_parameters": dict.fromkeys(BOTH, ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": BOTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling_text": {"unpadded_vocab_size": 80},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {**INDEXER, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
    },
    "xlstm": {"chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA | {"kv_channels": 16, "attention_head_dim": 16},
    "zamba2": ZAMBA | {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "lm_head_bias": True},
}
NOT_TRIED = {"gemma3n": "its vision tower comes from timm; gemma3n_text has the same head"}
SCALED = {"logit_scale": 0.25, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "logits_mup_width_multiplier": 2.0}
SCALED |= {"final_logit_softcapping": 12.0, "logits_soft_cap": 12.0, "output_logit_soft_cap": 12.0}


def tiny(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A config that makes a model of a few thousand parameters, with every option of the head that it has."""
    own = ESPECIALLY.get(kind.model_type, {})
    standard: Any = kind()
    names = {*standard.to_dict(), *kind.attribute_map}
    wanted = {k: v for k, v in (SMALL | SCALED).items() if k in names}
    wanted = {k: v for k, v in wanted.items() if kind.attribute_map.get(k, "") not in wanted}
    inner = {k: v for k, v in vars(standard).items() if isinstance(v, PreTrainedConfig) and k not in own}
    options: dict[str, Any] = wanted | {k: tiny(type(v)).to_dict() for k, v in inner.items()} | own | more
    return kind(**options)


for of in ("gemma4", "gemma4_unified"):  # an assistant has the same text model, without inputs of its own to layers
    bare = tiny(CONFIG_MAPPING[f"{of}_text"], hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    ESPECIALLY[f"{of}_assistant"] = {"text_config": bare.to_dict()}


def build(family: str, **more: Any) -> Any:
    """A model of the family with random weights, none of them zero, and logits large enough to feel a softcap."""
    torch.manual_seed(0)
    kind = getattr(transformers, NAMES[family])
    config = tiny(kind.config_class or CONFIG_MAPPING[family], **more)
    config.use_cache = False
    config.is_decoder = True  # asked for by encoders that can also decode; others do not look
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
        head = getattr(model.get_output_embeddings(), "weight", None)
        if head is not None:
            head.mul_(4 / (head.shape[1] ** 0.5 * head.std()))
    return model


def tokens(vocab: int) -> Tensor:
    return torch.randint(2, vocab, (2, 16), generator=torch.Generator().manual_seed(1))


@dataclass
class Row:
    """A line of the table."""

    family: str
    kind: str
    verdict: str
    tied: bool = False
    bias: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    plain: bool = True

    def __str__(self) -> str:
        marks = ["yes" if x else "" for x in (self.tied, self.bias, not self.plain)]
        constants = ", ".join(f"{k} {v:g}" for k, v in self.constants.items())
        return " | ".join(("| " + self.family, self.kind, marks[0], marks[1], constants, marks[2], self.verdict + " |"))


def rebuilt(model: Any, parts: Parts, ids: Tensor) -> None:
    """Logits of the parts are the model's own, so is the loss, and a plain backbone may be called alone."""
    with torch.no_grad():
        own = model(input_ids=ids).logits.double()
        hidden = parts.hidden_states(input_ids=ids)
        mine = parts.logits(hidden).double()
        assert mine.shape == own.shape
        assert own.std() > 0.5, "these logits are too small to tell a softcap"
        budget = A_FEW * ulp(torch.float32) * max(1.0, own.abs().max().item())
        error = (mine - own).abs().max().item()
        assert error <= budget, f"logits: error {error:.1e}, budget {budget:.1e}"
        got = rk.sft_loss(hidden[:, :-1], parts.weight, ids[:, 1:], **parts.options).loss.double()
        want = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert abs(got - want).item() <= budget, f"loss: {got.item()}, wants {want.item()}"
        if parts.plain:
            assert parts.backbone(input_ids=ids).last_hidden_state.equal(hidden)


def tried(family: str) -> Row:
    """Builds a family, takes it apart, puts it together, and says how it went. Only refusals are expected to fail."""
    kind = NAMES[family]
    if family in NOT_TRIED:
        return Row(family, kind, f"not tried: {NOT_TRIED[family]}")
    model = build(family)
    try:
        parts = take_apart(model)
    except ValueError as error:
        return Row(family, kind, f"refused: {str(error).partition('apart: ')[2]}")
    rebuilt(model, parts, tokens(parts.constants.get("vocab_size", len(parts.weight))))
    tied = getattr(model.get_input_embeddings(), "weight", None) is parts.weight
    return Row(family, kind, "passes", tied, "bias" in parts.options, dict(parts.constants), parts.plain)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what tiny configs make transformers say."""
    logger = logging.getLogger("transformers")
    level, logger.level = logger.level, logging.CRITICAL
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def table() -> str:
    """All families, and how many of them there are of each verdict."""
    with quiet():
        rows = [tried(family) for family in NAMES]
    count = Counter(row.verdict.partition(":")[0] for row in rows)
    number = ", ".join(f"{count[x]} {x}" for x in ("passes", "refused", "not tried")).replace("passes", "pass")
    head = "| family | class | tied | bias | options | more than a backbone | verdict |"
    return "\n".join(
        (
            f"Of {len(rows)} families of transformers {transformers.__version__} {number}.",
            "",
            head,
            "|---" * 7 + "|",
            *map(str, rows),
        )
    )


def in_document() -> tuple[str, str, str]:
    """What docs/models.md has before its table, the table, and what it has after."""
    before, begin, rest = DOC.read_text().partition("<!-- table -->\n")
    inside, end, after = rest.partition("\n<!-- end of table -->")
    return before + begin, inside, end + after


if __name__ == "__main__":
    before, _, after = in_document()
    DOC.write_text(before + table() + after)
