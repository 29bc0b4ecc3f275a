"""What the chat templates of public families write, as text."""

from __future__ import annotations

# Family: what stands before the first question "Hi", between it and the reply "Yes.", between that and the question
# "Why?", behind that where the next reply begins, and behind "Yes." where it is the last.
WRITTEN: dict[str, tuple[str, str, str, str, str]] = {
    "llama2": ("<s>[INST] ", " [/INST] ", " </s><s>[INST] ", " [/INST]", " </s>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: DATE\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "mistral1": ("<s>[INST] ", " [/INST]", "</s> [INST] ", " [/INST]", "</s> "),
    "mistral3": ("<s>[INST] ", "[/INST] ", "</s>[INST] ", "[/INST]", "</s>"),
    "gemma2": (
        "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n",
    ),
    "qwen3": (
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n",
    ),
    "deepseek_r1": (
        "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜><｜User｜>",
        "<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>",
    ),
    "phi3": (
        "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n",
        "<|end|>\n<|endoftext|>",
    ),
    "zephyr": ("<|user|>\n", "</s>\n<|assistant|>\n", "</s>\n<|user|>\n", "</s>\n<|assistant|>\n", "</s>\n"),
    "glm4": ("[gMASK]<sop><|user|>\n", "<|assistant|>\n", "<|user|>\n", "<|assistant|>", ""),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n",
    ),
    "olmo2": (
        "<|endoftext|><|user|>\n", "\n<|assistant|>\n", "<|endoftext|>\n<|user|>\n", "\n<|assistant|>\n",
        "<|endoftext|>",
    ),
    "command_r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    ),
}  # fmt: skip
# What stands before that question where the system message "Be brief." precedes it.
BRIEF = {
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: DATE\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    ),
    "mistral3": "<s>[INST] Be brief.\n\n",
    "qwen2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "deepseek_r1": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\n",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\n",
    "smollm2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "olmo2": "<|endoftext|><|system|>\nBe brief.\n<|user|>\n",
    "command_r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"
    ),
}

# What the tokens behind a prompt read "Hello there" as, end included: where it begins with a blank and where not.
SAID = {
    "llama2": "▁Hello▁there▁</s>", "mistral1": "Hello▁there</s>", "mistral3": "▁Hello▁there</s>",
    "gemma2": "Hello▁there<end_of_turn>", "phi3": "▁Hello▁there<|end|>", "zephyr": "Hello▁there</s>",
    "qwen3": "<think>ĊĊ</think>ĊĊHelloĠthere<|im_end|>", "olmo2": "HelloĠthere<|endoftext|>",
}  # fmt: skip
