"""Started by `test_evaluate.py`: a verb of `pgolf` on ranks of which the last one's trial of the heads fails.

agree_program.py VERB ARGUMENTS...: the ranks have pgolf's own attention by name, and torch's kernel for it.
"""

import os
import sys
from unittest.mock import patch

from pgolf.cli.main import main
from pgolf.model.attention import Attention, sdpa_attention

if __name__ == "__main__":
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    with (
        patch("pgolf.model.gpt.select_attention", lambda *_, **__: Attention("doc", sdpa_attention, "")),
        patch("pgolf.model.heads._takes", lambda _: True),
        patch("pgolf.model.heads._problem", lambda *_: "the output differs" if is_last else ""),
    ):
        sys.exit(main(sys.argv[1:]))
