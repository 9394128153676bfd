"""What counts as code, in words, and the names of the files that are counted."""

from __future__ import annotations

CODE_NAME = "evaluate_gpt.py"
"""The program that a run of an installed pgolf counts."""
TRAIN_NAME = "train_gpt.py"
"""The program that trains as well; a run of it counts it."""
FORMER_NAME = "code.br"
"""Name in the folders of older runs, whose code is an archive that needs the compiled extension."""
CODE_RULE = (
    "code: the whole of one program that needs no pgolf: evaluate_gpt.py, which reads and scores, or, if that"
    "\ntrained the model, train_gpt.py; with the sources it uses, without comments, docstrings, types and"
    "\nunused functions, and, if the file needs it, the range coder, which g++ compiles; installed packages"
    "\n(torch, numpy, sentencepiece, brotli) and the tokenizer do not count"
)
"""The rule in a sentence, which the ledger prints."""
FORMER_RULE = (
    "code: the pgolf sources that reading and scoring import, in one text compressed with brotli 11;"
    "\ninstalled packages, pgolf's compiled extension (which this code needs) and the tokenizer do not count"
)
"""The same of older runs, whose code is `FORMER_NAME`."""
