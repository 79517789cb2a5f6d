"""Errors that a chat template raises reach the user without Python terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.planning.plan import make_plan
from tests.support.exporting import composed

SAID = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0]['x']['y'] }}": "it looks for 'x', which is not there (line 1 of the template)",
    "{{ messages[9].content }}": "it looks for number 9, which is not there",
    "{{ persona.name }}": "it looks for persona, which is not there (line 1 of the template)",
    "\n\n{{ messages|length + 'a' }}": "it cannot handle the form of a value here (line 3 of the template)",
    "{{ 'a' + none }}": "it cannot handle the form of a value here (line 1 of the template)",
}


@pytest.mark.parametrize("template", SAID)
def test_a_failing_template_is_quoted_with_the_row(template: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(4)))
    file = tmp_path / "template.jinja"
    file.write_text(template)
    config = composed("data=jsonl", f"data.path={rows}", f"data.chat_template={file}", "retention=none")
    with pytest.raises(UserError) as refused:
        make_plan(config)
    assert str(refused.value).startswith(f"{rows}:")
    assert f"the chat template refuses this conversation: {SAID[template]}" in str(refused.value)
