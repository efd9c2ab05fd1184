"""Our templates as programs in Jinja, by which transformers' `apply_chat_template` writes chats as we do."""

import re

from rwkv_train.data.templates import THINKING, Template

HEAD = """\
{%- set forms = FORMS -%}
{%- if tools or messages | selectattr('tool_calls') | list -%}
    {{- raise_exception('functions and calls are not written here; rwkv_train.data.functions makes them text') -}}
{%- endif -%}
{{- BEGIN -}}
"""
PLAIN = """\
{%- for message in messages -%}
    {%- if message['role'] not in forms -%}
        {{- raise_exception('role ' ~ message['role'] ~ ' is unknown; the template knows ' ~ forms | join(', ')) -}}
    {%- elif message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text as its content') -}}
    {%- elif BEGIN and BEGIN in message['content'] -%}
        {{- raise_exception('message ' ~ loop.index ~ ' holds ' ~ BEGIN ~ ', which ends a document') -}}
    {%- elif message['content'].strip() -%}
        {{- forms[message['role']][0] -}}
        CONTENT
        {{- forms[message['role']][1] -}}
    {%- elif message['role'] != 'system' -%}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ message['role'] ~ ') is empty') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- PROMPT -}}
{%- endif -%}
"""
CLEANED = """\
{%- for line in message['content'].replace('\\r\\n', '\\n').strip().split('\\n') if line.strip() -%}
            {{- line ~ ('' if loop.last else '\\n') -}}
        {%- endfor -%}"""  # what `Template.clean` does


# Of a template whose replies have paragraphs or thoughts. Its variable `thinking` says how a thought is asked for, as
# THINKING has it.
THOUGHTFUL = """\
{%- set ways, way = WAYS, thinking | default(MODE) -%}
{%- if way not in ways -%}
    {{- raise_exception('thinking is ' ~ way ~ ', expected ' ~ ways | join(', ')) -}}
{%- endif -%}
{%- macro cleaned(text, is_reply) -%}
    {%- set seen = namespace(blank=[]) -%}
    {%- for line in text.replace('\\r\\n', '\\n').strip().split('\\n') -%}
        {%- if LINE -%}
            {{- '' if loop.first else '\\n' -}}
            {{- seen.blank | join if is_reply and not line.startswith(NAMES) else '' -}}
            {{- line -}}
        {%- endif -%}
        {%- set seen.blank = [] if LINE else seen.blank + ['\\n'] -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set role, text, thought = message['role'], message['content'], message['reasoning_content'] -%}
    {%- set thinks = THINKS and role == 'assistant' -%}
    {%- if role not in forms -%}
        {{- raise_exception('role ' ~ role ~ ' is unknown; the template knows ' ~ forms | join(', ')) -}}
    {%- elif text is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text as its content') -}}
    {%- elif thinks and not (thought is undefined or thought is none or thought is string) -%}
        {{- raise_exception('message ' ~ loop.index ~ ': reasoning_content is no text') -}}
    {%- elif BEGIN and BEGIN in text ~ thought -%}
        {{- raise_exception('message ' ~ loop.index ~ ' holds ' ~ BEGIN ~ ', which ends a document') -}}
    {%- endif -%}
    {%- set thought = (thought or '').strip() if thinks else '' -%}
    {%- if thinks and text.lstrip().startswith('<think>') -%}
        {%- set parts = text.lstrip()[7:].partition('</think>') -%}
        {%- if thought and parts[0].strip() -%}
            {{- raise_exception('message ' ~ loop.index ~ ': reasoning_content stands beside a thought in it') -}}
        {%- endif -%}
        {%- set thought, text = parts[0].strip() or thought, parts[2].lstrip() -%}
    {%- endif -%}
    {%- if text.strip() -%}
        {%- set before, content = forms[role][0], CONTENT -%}
        {%- set newest = thinks and loop.last and not add_generation_prompt -%}
        {%- if newest and '</think>' in thought -%}
            {{- raise_exception('message ' ~ loop.index ~ ': its thought holds </think>') -}}
        {%- elif newest and (thought or way == 'fake') -%}
            {{- before.rstrip() ~ ' <think>\\n' ~ ('' if way == 'fake' else THOUGHT ~ '\\n') ~ '</think>\\n' -}}
            {{- content.lstrip() -}}
        {%- elif newest and ways[way][1] and message['weight'] != 0 -%}
            {{- raise_exception('the last reply has no thought, and thinking is ' ~ way ~ '; use off or fake') -}}
        {%- else -%}
            {{- before ~ content -}}
        {%- endif -%}
        {{- (ways[way][0] if role == 'user' else '') ~ forms[role][1] -}}
    {%- elif role != 'system' -%}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ role ~ ') is empty') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- PROMPT ~ ways[way][1] -}}
{%- endif -%}
"""


def to_jinja(template: Template, begin: str = "bos_token") -> str:
    """The program by which chats are written as `template` does, refusals included.

    begin: what chats begin with, as a Jinja expression: the end of a document, as in training. Its name is refused in
    messages. "''" where every text can hold it.
    """
    forms = {role: tuple(form.split("{content}")) for role, form in template.roles.items()}
    asks = "raise_exception('there is no role assistant')"
    if "assistant" in forms:
        asks = repr("".join(template.prompt([], opened=False)))
    parts = {"BEGIN": begin, "FORMS": repr(forms), "PROMPT": asks}
    clean = template.collapse_blank_lines
    if not (template.paragraphs or template.thinks):
        return _filled(HEAD + PLAIN, parts | {"CONTENT": CLEANED if clean else "{{- message['content'] -}}"})
    ways = {name: tuple(way) for name, way in THINKING.items()} if template.thinks else {"off": ("", "")}
    parts |= {
        "WAYS": repr(ways),
        "MODE": repr(template.thinking),
        "THINKS": str(template.thinks).lower(),
        "NAMES": repr(template.turn_end().before or ("",)),  # every line begins with that
        "LINE": "line" if template.paragraphs else "line.strip()",
        "CONTENT": "cleaned(text, role == 'assistant')" if clean else "text",
        "THOUGHT": "cleaned(thought, true)" if clean else "thought",
    }
    return _filled(HEAD + THOUGHTFUL, parts)


def _filled(program: str, parts: dict[str, str]) -> str:
    return re.sub("|".join(rf"\b{name}\b" for name in parts), lambda name: parts[name[0]], program)
