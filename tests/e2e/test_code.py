"""The counted code reads and scores an artifact, with nothing else of pgolf except for its extension."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pgolf import _C
from pgolf.artifact.read import load_model
from pgolf.cli.main import main
from pgolf.config import TttConfig
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_as, score_model

SCORE = """
import json, sys
from pathlib import Path
import torch
import pgolf
from pgolf.artifact.read import load_model
from pgolf.config import TttConfig
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder, score_as, score_model

torch.set_num_threads(1)
model = load_model(Path(sys.argv[1]), "cpu")
adapters = TttConfig(rank=2)
data_folder = DataFolder.open(Path(sys.argv[2]), vocab_size=model.config.vocab_size)
text, dist = data_folder.validation(documents=6), Dist.start("cpu")
found = {
    mode: score_as(mode, model, data_folder, text, dist, batch_tokens=512, stride=16, ttt=adapters).nats
    for mode in ("plain", "sliding", "ttt")
}
try:
    import pgolf.train.run
    rest = True
except ImportError:
    rest = False
whole = score_model(model, data_folder, 512, dist).nats
print(json.dumps([found, whole, pgolf.__file__, rest]))
"""


def test_counted_code_reads_and_scores_as_the_package_does(run, shards, tmp_path, capsys, one_thread):
    folder = tmp_path / "code"
    assert main(["artifact", "code", str(folder)]) == 0
    assert "bytes counted" in capsys.readouterr().out
    extension = Path(_C.__file__)
    (folder / "pgolf" / extension.name).symlink_to(extension)
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(run / "model.pgolf"), str(shards)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, whole, where, rest = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(folder) and not rest
    model = load_model(run / "model.pgolf", "cpu")
    data_folder = DataFolder.open(shards, vocab_size=model.config.vocab_size)
    text, dist = data_folder.validation(documents=6), Dist.start("cpu")
    settings = {"batch_tokens": 512, "stride": 16, "ttt": TttConfig(rank=2)}
    for mode, nats in found.items():
        assert nats == score_as(mode, model, data_folder, text, dist, **settings).nats, mode
    assert whole == score_model(model, data_folder, 512, dist).nats
