"""Chat templates of public families in our words: short Jinja that writes the text of theirs for plain chats."""

from __future__ import annotations

_APART = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set rest = messages if system is none else messages[1:] %}"""

_ALTERNATE = r"""
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"""

_CHATML = r"""
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\nDEFAULT<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA2 = (
    _APART
    + "{%- for m in rest %}"
    + _ALTERNATE
    + r"""
    {%- set text = m.content %}
    {%- if loop.first and system is not none %}
        {%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + text %}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + text.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
)

LLAMA3 = (
    _APART
    + r"""
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date + '\n\n' + (system or '') | trim + '<|eot_id|>' }}
{%- for m in rest %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
)

MISTRAL1 = (
    "{{- bos_token }}{%- for m in messages %}"
    + _ALTERNATE
    + r"""
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- m.content + eos_token + ' ' }}
    {%- else %}
        {{- raise_exception('only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""
)

# The system message stands in the last turn of the user, and nowhere once that is answered.
MISTRAL3 = (
    _APART
    + "{{- bos_token }}{%- for m in rest %}"
    + _ALTERNATE
    + r"""
    {%- if m.role == 'user' and loop.last and system is not none %}
        {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
)

GEMMA2 = (
    r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}"""
    + _ALTERNATE
    + r"""
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
)

QWEN2 = _CHATML.replace("DEFAULT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
SMOLLM2 = _CHATML.replace("DEFAULT", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")

# Reasoning is written behind the last question of the user, empty if there is none, and dropped before that.
QWEN3 = r"""
{%- set ns = namespace(last=messages | length) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set text, why = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or why) %}
        {{- '<think>\n' + why.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
    {%- else %}
        {{- text }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

DEEPSEEK_R1 = (
    _APART
    + r"""
{{- bos_token + (system or '') }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {{- '<｜User｜>' + m.content }}
    {%- else %}
        {{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""
)

PHI3 = r"""
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

ZEPHYR = r"""
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

GLM4 = r"""
{{- '[gMASK]<sop>' }}
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

OLMO2 = r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '\n') }}
    {%- if m.role == 'assistant' and not loop.last %}{{- '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

COMMAND_R = r"""
{{- bos_token }}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}
{%- for m in messages %}
    {%- set text = m.content if m.role == 'system' else m.content.strip() %}
    {{- '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + text + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
