"""The outside of the counted program: unpack the modules that it carries, and run one of them.

`pgolf.artifact.code` fills in ENTRY, the module that is run, and ARCHIVE, brotli of the modules' text, in
base 85.
"""

import importlib
import re
import sys
from base64 import b85decode
from pathlib import Path
from tempfile import TemporaryDirectory

import brotli

ENTRY = "pgolf.report.alone"
ARCHIVE = b""


def main() -> None:
    """Write the modules into a folder that does not stay, put it before all others on the path, and run."""
    parts = re.split(r"^# (pgolf/[\w/.]+)\n", brotli.decompress(b85decode(ARCHIVE)).decode(), flags=re.M)
    with TemporaryDirectory() as folder:
        for name, source in zip(parts[1::2], parts[2::2], strict=True):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        sys.path.insert(0, folder)
        sys.exit(importlib.import_module(ENTRY).main(sys.argv[1:], Path(__file__).resolve()))


if __name__ == "__main__":
    main()
