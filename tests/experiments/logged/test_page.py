"""The examples of docs/reading-runs.md."""

import re

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "reading-runs.md").read_text()


def test_the_examples_of_the_page_run(tracked, capsys):
    """One after the other, as in a notebook."""
    made = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, made)  # noqa: S102 - our own
    assert capsys.readouterr().out.startswith("lr=0.1 beats lr=0.01 by 0.19")
    assert made["logged"].metrics == {"val_loss": 0.31}
    assert made["comparison"].measure.is_paired
    assert made["comparison"].problems() == []
