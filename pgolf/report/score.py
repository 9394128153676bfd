"""Score an artifact with the code that an older run counted: `score.py model_seed42.pgolf --data SHARDS`.

Newer runs count a program, evaluate_gpt.py, and need no other file. A submission folder of older runs holds
this file next to code.br, the code that was counted with the artifact, and config.json of its run. Of an
installed pgolf only the compiled extension is used. Under torchrun the ranks share the work.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def unpack(folder: Path) -> None:
    """Write the modules of code.br below `folder`, with a link to the compiled extension.

    Raises:
        RuntimeError: no pgolf with a compiled extension is installed.
    """
    import brotli

    found = importlib.util.find_spec("pgolf")  # looks for it, imports nothing
    places = list(found.submodule_search_locations or ()) if found else []
    named = [Path(place) / f"_C{suffix}" for place in places for suffix in EXTENSION_SUFFIXES]
    extensions = [path for path in named if path.is_file()]  # of this Python, where others have theirs too
    if not extensions:
        raise RuntimeError("no compiled extension of pgolf found; `pip install .` in pgolf's sources")
    text = brotli.decompress((HERE / "code.br").read_bytes()).decode()
    parts = re.split(r"^# (pgolf/[a-zA-Z0-9_/]+\.py)\n", text, flags=re.MULTILINE)
    for name, source in zip(parts[1::2], parts[2::2], strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (folder / "pgolf" / extensions[0].name).symlink_to(extensions[0].resolve())


def score(artifact: Path, data: Path, *, ttt: bool) -> None:
    """Print bits per byte over the whole validation text of `data`; `pgolf` is the unpacked code."""
    from pgolf.artifact.read import load_model
    from pgolf.config import TttConfig
    from pgolf.dist import Dist

    try:
        validation: Any = importlib.import_module("pgolf.evaluate.validation")
        opened = validation.DataFolder
    except ImportError:  # the code of a run from before the file and the class had these names
        validation = importlib.import_module("pgolf.evaluate.corpus")
        opened = validation.Corpus
    config = json.loads((HERE / "config.json").read_text())
    tokens = config["data"]["micro_tokens"]
    dist = Dist.start(config["train"]["device"])
    try:
        model = load_model(artifact, dist.device)
        blocks = dist.device.type == "cuda"
        model.prepare(
            dist.device, attention=config["train"]["attention"], compile="blocks" if blocks else "off"
        )
        data_folder = opened.open(data, vocab_size=model.config.vocab_size)
        if ttt:
            adapters, text = TttConfig(**config["evaluate"]["adapters"]), data_folder.validation()
            found = validation.score_as(
                "ttt", model, data_folder, text, dist, batch_tokens=tokens, stride=tokens, ttt=adapters
            )
        else:
            found = validation.score_model(model, data_folder, tokens, dist)
    finally:
        dist.close()
    if dist.is_main:
        sizes = artifact.stat().st_size, (HERE / "code.br").stat().st_size
        sys.stdout.write(
            f"{found.bpb:.6f} bpb, {found.loss:.6f} nats per token, {found.tokens:,} tokens, {found.bytes:,} "
            f"bytes of text, {found.seconds:.1f} s\n"
            f"model {sizes[0]:,} + code {sizes[1]:,} = {sum(sizes):,} bytes\n"
            # Code of older runs does not check.
            f"{getattr(data_folder, 'checked', 'the data folder was not checked')}\n"
        )


def main() -> None:
    """Unpack the code into a folder that does not stay, put it before the installed package, and score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, help="model_seed<seed>.pgolf")
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards and tokenizer")
    parser.add_argument("--ttt", action="store_true", help="with score-first test-time training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        sys.path.insert(0, folder)
        score(args.artifact, args.data, ttt=args.ttt)


if __name__ == "__main__":
    main()
