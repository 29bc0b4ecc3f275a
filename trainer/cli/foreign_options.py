"""Options that people type from habit of TRL, transformers, OpenRLHF and verl, and what each of them is called here.

An answer that names an option is for stages that have it: of several answers to one name the first one fits whose
options all exist. So no answer can name what a stage does not know, and an answer without options comes last.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

COMMON = frozenset({"config", "threads", "overwrite", "allow_code", "traceback"})  # of every stage, on the command line
NAMED = re.compile(r"--([a-z][a-z-]*)")
# Names as programs have them. What else begins with dashes is left to the parser, whose errors hide secrets.
DASHED = re.compile(r"--(?!tyro-)[A-Za-z][A-Za-z0-9_.-]*(?==|\Z)")
# `actor_rollout_ref.actor.optim.lr=1e-6`, as verl writes its options. A value of ours with a dot before its first `=`
# begins otherwise.
HYDRA = re.compile(
    r"\+{0,2}(?:data|actor_rollout_ref|algorithm|critic|trainer|reward_model|reward|custom_reward_function|ray_kwargs)"
    r"(?:\.\w+)+(?==)"
)

STEPS = "want --steps, a number of steps of --batch-size records each: epochs x records / batch size"
ROLLOUTS = "want --steps, a number of rollouts of --batch-size prompts each (--epochs are passes over one rollout)"
PASSES = "want --epochs, the passes over each rollout"
WHOLE = "want --batch-size, the records of a whole step over all processes; --max-tokens bounds the memory"
PIECES = "want --max-tokens, the tokens of a micro-batch: it bounds the memory and does not change the result"
LONGEST = "want --max-length, of prompt and response together"
NEW = "want --max-new-tokens"
HELD = "want --eval-data, which is looked at once, at the end"
LOGS = "not here: a run writes metrics.jsonl and report.html to --out"
SINKS = "want --log-to: tensorboard, wandb or trackio; metrics.jsonl and report.html are in --out anyway"
PLACES = "not here: --log-to tensorboard writes to --out, W&B and Trackio read WANDB_PROJECT and their other variables"
LORA = "not here: all weights are trained, adapters and quantised models are not"
HUB = "not here: the folder model in --out can be uploaded with `hf upload`"
CLIP = "want --clip, two numbers: how far a ratio may fall below one, and rise above it"
VLLM = "not here: the trainer samples by itself (--sampler, --sample-batch)"
SPREAD = "not here: torchrun spreads a run over processes (docs/distributed.md)"
FIELDS = "not here: fields of the records are known by their names (docs/data.md)"
ATTENTION = "not here: flash-attn is taken where it is installed"
NOTHING = "not here: this stage has nothing like it"
REFERENCE = ("want --reference", "not here: the reference of --kl-coef is --model as the run finds it")
PRECISION = ("want --precision, float32 or bfloat16, of the matrix products; weights stay in float32",)

# Names of others, parted by blanks, with underscores; a star stands for the rest of a name. Then the answers.
TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    # how long, how fast
    ("learning_rate actor_learning_rate actor_lr lr_actor", ("want --lr",)),
    ("critic_learning_rate critic_lr value_learning_rate", ("want --value-lr", "not here: there is no value model")),
    ("num_train_epochs num_epochs total_epochs", (ROLLOUTS, STEPS)),
    ("max_epochs", (f"{PASSES}; for passes over the prompts --steps counts rollouts", STEPS)),
    ("num_iterations num_ppo_epochs ppo_epochs", (PASSES,)),
    ("num_episodes total_episodes", (ROLLOUTS,)),
    ("epochs", (STEPS,)),
    ("max_steps total_training_steps num_steps", ("want --steps, a number of rollouts, each "
     "followed by --epochs x --minibatches optimizer steps", "want --steps")),
    ("rollout_batch_size generation_batch_size train_batch_size batch_size per_device_train_batch_size "
     "per_gpu_train_batch_size", ("want --batch-size, the prompts of a rollout over all processes; --minibatches is "
     "the number of steps in a pass over it, --max-tokens bounds the memory", WHOLE, PIECES)),
    ("per_device_eval_batch_size micro_train_batch_size micro_batch_size *_micro_batch_size_per_gpu "
     "ppo_max_token_len_per_gpu max_tokens_per_gpu", (PIECES,)),
    ("micro_rollout_batch_size local_rollout_forward_batch_size vllm_generate_batch_size", ("want --sample-batch",)),
    ("num_mini_batches ppo_mini_batch_size mini_batch_size steps_per_generation",
     ("want --minibatches, the optimizer steps in a pass over a rollout",)),
    ("gradient_accumulation_steps",
     ("not needed: --batch-size is the whole step, and --max-tokens bounds the memory",)),
    ("warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio lr_warmup_steps", ("want --warmup-steps",)),
    ("lr_scheduler_type lr_scheduler scheduler", ("want --schedule: constant, linear or cosine",)),
    ("max_norm grad_clip gradient_clipping clip_grad max_gradient_norm", ("want --max-grad-norm",)),
    ("l2", ("want --weight-decay",)),
    ("adam_epsilon", ("want --adam-eps",)),
    ("optim optimizer adam_beta* adam_betas", ("not here: the optimizer is AdamW with betas 0.9 and 0.95",)),
    # models, files and folders
    ("model_name_or_path pretrain model_name model_path actor_model_path", ("want --model",)),
    ("tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path", ("not here: the tokenizer is that of --model",)),
    ("ref_model ref_model_path sft_model_path ref_pretrain reference_model", REFERENCE),
    ("precompute_ref_log_probs", ("want --reference-once",)),
    ("sync_ref_model ref_model_sync_steps ref_model_mixup_alpha", ("not here: the reference stays as it is",)),
    ("reward_model_path reward_pretrain reward_model_name_or_path reward_funcs reward_model remote_rm_url "
     "reward_fn reward_function", ("want --reward: a folder, module:function, http://... or exact_answer",
     "want --judge: a folder, module:function or compare:module:function")),
    ("reward_weights", ("want --reward, SOURCE@WEIGHT",)),
    ("critic_pretrain critic_model_path value_model_path", ("want --value-model", "not here: there is no value model")),
    ("dataset_name dataset prompt_data train_file train_files data_path dataset_path train_dataset prompt_dataset "
     "input_data", ("want --data, a file in jsonl, jsonl.gz or parquet",)),
    ("eval_dataset eval_dataset_name eval_files val_files validation_file dataset_test_split",
     (HELD, "want --tax-data or --gold-reward, watched while training; stage eval compares afterwards")),
    ("eval_strategy evaluation_strategy eval_steps eval_freq test_freq", ("want --eval-every", HELD)),
    ("dataset_config dataset_train_split dataset_split prompt_split data_files split",
     ("not here: --data is one file, and stage split makes two of it",)),
    ("test_size test_split_size", ("want --held-out",)),
    ("pretrain_data", ("want --ptx-data",)),
    ("output_dir save_path default_local_dir save_dir", ("want --out",)),
    ("overwrite_output_dir", ("want --overwrite",)),
    ("save_steps save_freq save_strategy", ("want --save-every, a number of steps",)),
    ("save_total_limit max_ckpt_num ckpt_max_num", ("want --keep-last",)),
    ("resume_from_checkpoint load_checkpoint load_enable resume_mode",
     ("not here: `rlhf-train resume RUN` goes on with a run",)),
    ("ckpt_path", ("not here: checkpoints are in --out",)),
    ("push_to_hub push_to_hub_* hub_*", (HUB,)),
    ("report_to log_with logger use_wandb use_tensorboard", (SINKS, LOGS)),
    ("run_name experiment_name", ("want --out, whose last part is the name of the run (--log-to)", LOGS)),
    ("project_name wandb_* tensorboard_dir", (PLACES, LOGS)),
    ("logging_* log_completions", (LOGS,)),
    ("disable_tqdm", ("want --quiet",)),
    # lengths and records
    ("max_prompt_length prompt_max_len max_len max_seq_length max_seq_len cutoff_len model_max_length",
     (LONGEST,)),
    ("max_completion_length max_new_tokens generate_max_len response_length max_response_length max_target_length",
     (NEW, LONGEST)),
    ("packing packing_samples padding_free sample_packing use_remove_padding",
     ("not needed: sequences are packed without padding, up to --max-tokens",)),
    ("dataset_text_field input_key output_key label_key prompt_key chosen_key rejected_key", (FIELDS,)),
    ("apply_chat_template chat_template chat_template_path tokenizer_chat_template input_template",
     ("not needed: a tokenizer's own chat template is used",)),
    ("eos_token pad_token eos_token_id pad_token_id", ("not here: they are those of the tokenizer of --model",)),
    ("dataset_num_proc streaming dataset_streaming dataloader_* preprocessing_num_workers",
     ("not needed: --data is read as it is",)),
    ("max_samples", ("not here: all records of --data are used; cut the file itself",)),
    # sampling
    ("num_generations n_samples_per_prompt rollouts_per_prompt num_return_sequences",
     ("want --num-generations", "not here: --reward sees one response to each prompt; stage grpo has several")),
    ("top_k min_p top_p repetition_penalty",
     ("not here: responses are to be samples of the policy; --top-p and --allow-top-p change that",
      "not here: responses of up to --max-new-tokens are samples of the policy")),
    ("use_vllm vllm_* gpu_memory_utilization tensor_model_parallel_size", (VLLM,)),
    ("missing_eos_penalty non_eos_penalty", ("want --truncation-score, what a response gets that the limit cut off",)),
    ("mask_truncated_completions", ("want --truncation mask",)),
    # losses
    ("beta init_kl_coef kl_penalty_coef kl_loss_coef kl_beta init_coef", ("want --kl-coef",)),
    ("kl_coef", ("want --beta",)),
    ("use_kl_loss use_kl_in_reward kl_use_loss", ("want --kl-in, loss or reward",)),
    ("kl_estimator kl_loss_type kl_penalty", ("want --kl",)),
    ("kl_target target_kl", ("want --kl-target-per-seq",)),
    ("epsilon epsilon_high cliprange eps_clip eps_clip_low_high clip_ratio clip_ratio_low clip_ratio_high clip_range",
     (CLIP,)),
    ("cliprange_value value_clip cliprange_value_loss", ("want --value-clip", "not here: there is no value model")),
    ("delta clip_ratio_c", ("want --dual-clip",)),
    ("vf_coef value_loss_coef critic_loss_coef", ("want --value-coef, on a shared backbone; a value model of its own "
     "has --value-lr", "not here: there is no value model")),
    ("ent_coef entropy_coeff entropy_loss_coef", ("want --entropy-coef",)),
    ("lambd gae_lambda", ("want --lam",)),
    ("scale_rewards", ("want --scale: group_std, batch_std or none",)),
    ("whiten_rewards normalize_reward normalize_enable", ("want --reward-normalize",)),
    ("reward_clip_range", ("want --reward-clip",)),
    ("overlong_buffer_len", ("want --overlong-tokens",)),
    ("loss_agg_mode", ("want --reduction",)),
    ("importance_sampling_level", ("want --ratio, token or sequence",)),
    ("advantage_estimator adv_estimator estimator",
     ("want --baseline and --scale; PPO is the stage ppo", "not here: ppo has GAE, the others are in stage grpo")),
    ("loss_type policy_loss_type", ("want --reduction, --scale and --ratio (docs/trainer.md has a table)",
     "want --loss, sigmoid or hinge; IPO, ORPO, SimPO and KTO are stages", "not here: every loss is a stage")),
    ("simpo_gamma gamma_beta_ratio", ("want --margin",)),
    ("rpo_alpha cpo_alpha nll_loss_coef", ("want --sft-coef",)),
    ("label_smoothing_factor", ("want --label-smoothing",)),
    ("undesirable_loss_weight", ("want --undesirable-weight",)),
    ("desirable_loss_weight", ("want --desirable-weight",)),
    ("center_rewards_coefficient", ("want --center-coef",)),
    # machines
    ("bf16", ("want --precision bfloat16",)),
    ("fp16", ("not here: --precision is float32 or bfloat16",)),
    ("torch_dtype dtype param_dtype mixed_precision bf16_full_eval", PRECISION),
    ("tf32", ("not here: what --precision does not say is float32",)),
    ("use_cpu no_cuda", ("want --device cpu",)),
    ("gradient_checkpointing gradient_checkpointing_* activation_offloading enable_gradient_checkpointing",
     ("not here: a smaller --max-tokens takes less memory",)),
    ("use_peft use_lora lora_* use_rslora use_dora load_in_4bit load_in_8bit bnb_* peft_config qlora", (LORA,)),
    ("attn_implementation flash_attn use_flash_attn* flash_attention", (ATTENTION,)),
    ("use_liger_kernel use_liger_loss use_fused_kernels", ("not needed: losses are fused with the head",)),
    ("deepspeed zero_stage adam_offload fsdp fsdp_* ddp_* local_rank num_processes num_nodes nnodes "
     "num_gpus_per_node n_gpus_per_node *_num_nodes *_num_gpus_per_node colocate_*", (SPREAD,)),
    ("trust_remote_code", ("not here: the code of models is not run",)),
)  # fmt: skip

# Names with dots whose parts would mean something else.
DOTTED = {
    "actor_rollout_ref.model.path": "model_name_or_path",
    "actor_rollout_ref.rollout.n": "num_generations",
    "critic.optim.lr": "critic_learning_rate",
    "critic.adam.lr": "critic_learning_rate",
    "critic.model.path": "critic_pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    "ref.model_name_or_path": "ref_model",
    "reward.model_name_or_path": "reward_model",
    "reward.remote_url": "reward_model",
    "reward_model.model.path": "reward_model",
    "custom_reward_function.path": "reward_model",
}


def refuse(names: Iterable[str], known: Collection[str], where: str, unsure: str | None = None) -> None:
    """Refuses names that are no options, all of them at once, each with what it may have meant.

    Args:
        names: As they were typed, `--learning-rate`, or as they stand in a file, `learning_rate`.
        known: Options of the stage, with underscores.
        where: For the message.
        unsure: What to say of a name that is like none; by default which names there are.

    Raises:
        ValueError: One of `names` is not in `known`.

    >>> refuse(["--learning-rate", "--stepz"], ["lr", "steps"], "sft")
    Traceback (most recent call last):
    ValueError: sft: unknown option '--learning-rate'; want --lr. Unknown option '--stepz'; did you mean '--steps'?
    >>> refuse(["learning_rate"], ["lr", "steps"], "options.yaml")
    Traceback (most recent call last):
    ValueError: options.yaml: unknown option 'learning_rate'; want lr
    """
    told = ""
    for name in dict.fromkeys(names):
        if name.lstrip("-").replace("-", "_") not in known:
            told += f" Unknown option {name!r}; {_hint(name, known, unsure)}"
            told += "" if told.endswith("?") else "."
    if told:
        raise ValueError(f"{where}: u{told[2:].removesuffix('.')}")


def typed(flags: Iterable[str]) -> list[str]:
    """The names among words of a command line; none where help is asked for.

    >>> typed(["--lr=1e-5", "--clip", "0.1", "-0.2", "data.train_files=x", "--", "."])
    ['--lr', '--clip', 'data.train_files']
    """
    flags = list(flags)
    if "-h" in flags or "--help" in flags:
        return []
    return [found[0] for pattern in (DASHED, HYDRA) for word in flags if (found := pattern.match(word))]


def answer(name: str, known: Collection[str]) -> str | None:
    """What an option of another program is here, or None for a name that is not in the table.

    Args:
        name: With underscores or dashes, perhaps with dots.
        known: Options of the stage, with underscores.

    >>> answer("init_kl_coef", {"kl_coef"}), answer("actor.adam.lr", {"lr"}), answer("beta", {"lr"})
    ('want --kl-coef', 'want --lr', 'not here: this stage has nothing like it')
    """
    plain = name.lstrip("-+").replace("-", "_")
    parts = DOTTED.get(plain, plain).split(".")
    # `eval.dataset` is `eval_dataset` rather than `dataset`, and `actor.adam.lr` is `lr` in the end.
    for looked_up in ("_".join(parts[i:]) for i in range(len(parts))):
        if looked_up in known and "." in plain:
            return f"want --{looked_up.replace('_', '-')}"
        for names, answers in TABLE:
            if any(fnmatchcase(looked_up, pattern) for pattern in names.split()):
                return next((a for a in answers if named(a) <= COMMON | set(known)), NOTHING)
    return None


def named(text: str) -> set[str]:
    """Options that an answer names, with underscores."""
    return {option.replace("-", "_") for option in NAMED.findall(text)}


def _hint(name: str, known: Collection[str], unsure: str | None) -> str:
    dashed = name.startswith("--")
    if found := answer(name, known):
        # In a file options stand without dashes; those of every stage are for the command line only.
        return found if dashed or "." in name or named(found) & COMMON else NAMED.sub(_in_a_file, found)
    spelled = {f"--{k.replace('_', '-')}" if dashed else k for k in known if not k.startswith("no_")}
    near = difflib.get_close_matches(name.replace("_", "-") if dashed else name, sorted(spelled), n=1)
    return f"did you mean {near[0]!r}?" if near else unsure or f"want one of {', '.join(sorted(known))}"


def _in_a_file(option: re.Match[str]) -> str:
    return option[1].replace("-", "_")
