"""An option is what it is called, in every command."""

from __future__ import annotations

import pytest

from bdlora_megatron.cli.main import main


@pytest.mark.parametrize(
    ("command", "shortened"),
    [
        (["plan", "--model", "llama-3.1-8b", "--tp", "8"], ["--adapter", "3"]),
        (["serve", "--model", "somewhere"], ["--adapter", "a=b"]),
        (["bench"], ["--ou", "somewhere"]),
    ],
)
def test_a_shortened_option_is_refused(command, shortened, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, *shortened])
    assert left.value.code == 2
    assert shortened[0] in capsys.readouterr().err
