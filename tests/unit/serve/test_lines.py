"""Answers hold any character; a line that carries them must stay one line."""

from __future__ import annotations

import json

from bdlora_megatron.serve.lines import json_line


def test_no_character_of_an_answer_ends_the_line_that_carries_it():
    every = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100)]))
    line = json_line({"text": every})
    assert line.splitlines() == [line]
    assert json.loads(line) == {"text": every}
    assert "\u00e9" in json_line({"text": "\u00e9"}), "other letters stay as they are"
