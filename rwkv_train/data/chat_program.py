"""Our templates as programs in Jinja, by which transformers' `apply_chat_template` writes chats as we do."""

import re

from rwkv_train.data.templates import THINKING, Template

PLAIN = """\
{%- set forms = FORMS -%}
{%- for message in messages -%}
    {%- if message['role'] not in forms -%}
        {{- raise_exception('role ' ~ message['role'] ~ ' is unknown; the template knows ' ~ forms | join(', ')) -}}
    {%- elif message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text as its content') -}}
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
{%- set forms, ways, way = FORMS, WAYS, thinking | default(MODE) -%}
{%- if way not in ways -%}
    {{- raise_exception('thinking is ' ~ way ~ ', expected ' ~ ways | join(', ')) -}}
{%- endif -%}
{%- macro cleaned(text, is_reply) -%}
    {%- set seen = namespace(blank=[]) -%}
    {%- for line in text.replace('\\r\\n', '\\n').strip().split('\\n') -%}
        {%- if line -%}
            {{- '' if loop.first else '\\n' -}}
            {{- seen.blank | join if is_reply and not line.startswith(NAMES) else '' -}}
            {{- line -}}
        {%- endif -%}
        {%- set seen.blank = [] if line else seen.blank + ['\\n'] -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set role, text, thought = message['role'], message['content'], message['reasoning_content'] -%}
    {%- if role not in forms -%}
        {{- raise_exception('role ' ~ role ~ ' is unknown; the template knows ' ~ forms | join(', ')) -}}
    {%- elif text is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has no text as its content') -}}
    {%- endif -%}
    {%- set begins = text.lstrip().startswith('<think>') and role == 'assistant' and THINKS -%}
    {%- set parts = text.lstrip()[7:].partition('</think>') if begins else (thought or '', '', text) -%}
    {%- set thought, text = parts[0].strip(), parts[2] -%}
    {%- set before = forms[role][0] -%}
    {%- if not text.strip() and role != 'system' -%}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ role ~ ') is empty') -}}
    {%- elif text.strip() -%}
        {%- if role != 'assistant' or not loop.last or add_generation_prompt or not THINKS -%}
            {{- before -}}
        {%- elif way == 'fake' -%}
            {{- before.rstrip() ~ ' <think>\\n</think>\\n' -}}
        {%- elif thought -%}
            {{- before.rstrip() ~ ' <think>\\n' ~ thought ~ '\\n</think>\\n' -}}
        {%- elif ways[way][1] -%}
            {{- raise_exception('the last reply has no thought, and thinking is ' ~ way ~ '; use off or fake') -}}
        {%- else -%}
            {{- before -}}
        {%- endif -%}
        {{- CONTENT ~ (ways[way][0] if role == 'user' else '') ~ forms[role][1] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- PROMPT ~ ways[way][1] -}}
{%- endif -%}
"""


def to_jinja(template: Template) -> str:
    """The program by which chats are written as `template` does, refusals included."""
    forms = {role: tuple(form.split("{content}")) for role, form in template.roles.items()}
    asks = "raise_exception('there is no role assistant')"
    if "assistant" in forms:
        asks = repr("".join(template.prompt([], opened=False)))
    if not (template.paragraphs or template.thinks):
        content = CLEANED if template.collapse_blank_lines else "{{- message['content'] -}}"
        return _filled(PLAIN, {"FORMS": repr(forms), "PROMPT": asks, "CONTENT": content})
    ways = {name: tuple(way) for name, way in THINKING.items()} if template.thinks else {"off": ("", "")}
    names = template.turn_end().before or ("",)  # every line begins with that
    parts = {"FORMS": repr(forms), "WAYS": repr(ways), "MODE": repr(template.thinking), "NAMES": repr(names)}
    content = "cleaned(text, role == 'assistant')" if template.collapse_blank_lines else "text"
    return _filled(THOUGHTFUL, parts | {"PROMPT": asks, "CONTENT": content, "THINKS": str(template.thinks).lower()})


def _filled(program: str, parts: dict[str, str]) -> str:
    return re.sub("|".join(rf"\b{name}\b" for name in parts), lambda name: parts[name[0]], program)
