"""`pgolf size PRESET|config.json|RUN|CHECKPOINT|ARTIFACT [--section.key VALUE ...]`: bytes per section.

`pgolf size ARTIFACT|RUN --coders`: the bytes of the same codes in every coder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.cli.overrides import override, parse_config, say
from pgolf.errors import UserError
from pgolf.presets import OLD_NAMES, PRESETS

if TYPE_CHECKING:
    from pgolf.artifact.size import Ledger

ARTIFACT, CODERS = "model.pgolf", "--coders"


def main(argv: list[str]) -> int:
    """Print the ledger and where it is from; 0 when it is within artifact.limit, 1 when not."""
    from pgolf.artifact.code_rule import CODE_RULE, FORMER_RULE

    if CODERS in argv:
        return _compare([word for word in argv if word != CODERS])
    artifact, rule = _artifact(argv), CODE_RULE
    checkpoint = _checkpoint(argv[0]) if argv else None
    if artifact is not None:
        ledger, former = _written(artifact)
        origin, rule = f"{artifact}, as it was written", FORMER_RULE if former else CODE_RULE
    elif checkpoint is not None:
        ledger, origin = _of_checkpoint(checkpoint, argv)
    else:
        ledger, origin = _of_settings(argv)
    print(f"{origin}\n{ledger.text(rule)}")
    if ledger.total <= ledger.limit:
        return 0
    print(f"{ledger.total - ledger.limit:,} bytes too many: writing it would be refused")
    return 1


def _written(path: Path) -> tuple[Ledger, bool]:
    """Return the ledger of an artifact, with its run's code if that is beside it, and whether that is old."""
    from pgolf.artifact.code_rule import CODE_NAME, FORMER_NAME, TRAIN_NAME
    from pgolf.artifact.read import open_artifact
    from pgolf.artifact.size import make_ledger

    with open_artifact(path) as reader:
        for _ in reader.sections():
            pass  # the checksum is compared after the last
        ledger = make_ledger(reader.header, file_bytes=path.stat().st_size)
    kept = [code for name in (CODE_NAME, TRAIN_NAME, FORMER_NAME) if (code := path.with_name(name)).is_file()]
    if not kept:
        return ledger, False
    return replace(ledger, code=kept[0].stat().st_size), kept[0].name == FORMER_NAME


def _compare(argv: list[str]) -> int:
    """Print what the codes of an artifact take in each coder, as each is measured; 0."""
    path = _artifact(argv)
    if path is None:
        raise UserError(
            f"pgolf size {CODERS}: expected an artifact or the folder of a finished run and no setting, got "
            f"{' '.join(argv) or 'nothing'}; for a preset or weights set --artifact.coder"
        )
    from pgolf.artifact.predict import in_each_coder
    from pgolf.artifact.read import read_state

    header, state = read_state(path)
    print(f"{path}, written with {header.coder}; the same codes in every coder, bytes (less is better)")
    print(f"{'coder':<8}{'codes':>14}{'file':>14}{'code':>10}{'total':>14}")
    for coder, ledger in in_each_coder(header, state):
        codes = ledger.model_bytes - sum(size for name, size in ledger.parts if name not in state.quantized)
        row = f"{codes:>14,}{ledger.model_bytes:>14,}{ledger.code:>10,}{ledger.total:>14,}"
        print(f"{coder:<8}{row}", flush=True)
    return 0


def _of_checkpoint(path: Path, argv: list[str]) -> tuple[Ledger, str]:
    """Return what weights would take, and how that is known."""
    from pgolf.artifact.predict import nearest_fitted, nearest_ledger
    from pgolf.artifact.size import check_limit
    from pgolf.train.weights import load_weights

    tensors, saved, facts = load_weights(path)
    say(facts.get("note", ""))
    config = override("size", argv[0], argv[1:], saved)
    limit = config.artifact.limit
    check_limit(config.artifact)
    measure = nearest_fitted if config.artifact.fit else nearest_ledger
    coder, program = config.artifact.coder, config.artifact.program
    ledger = measure(tensors, config.model, config.quant, limit=limit, coder=coder, program=program)
    origin = (
        f"{path}: an estimate, from weights that are rounded to nearest and coded; the file itself depends\n"
        "on the calibration too, which changed small models by up to 10 % (`pgolf quantize` writes it)"
    )
    return ledger, origin + _scaled(ledger)


def _of_settings(argv: list[str]) -> tuple[Ledger, str]:
    """Return what a trained model is expected to take, and how that is known."""
    config = parse_config("size", argv)
    from pgolf.artifact.predict import predict_fitted, predict_ledger
    from pgolf.artifact.size import check_limit

    check_limit(config.artifact)
    limit, coder, program = config.artifact.limit, config.artifact.coder, config.artifact.program
    plain = predict_ledger(config.model, config.quant, limit=limit, coder=coder, program=program)
    origin = "predicted from shapes, bits and clips (within 0.5 % for a fully trained model)"
    if not config.artifact.fit:
        return plain, origin
    ledger = predict_fitted(config.model, config.quant, limit=limit, coder=coder, program=program)
    return ledger, f"{origin}\n{plain.total:,} bytes at these settings{_scaled(ledger)}"


def _scaled(ledger: Ledger) -> str:
    """Return what artifact.fit does to the scales, as the end of a sentence and perhaps another line."""
    from pgolf.artifact.fit import fill_note

    text = (
        "" if ledger.clip_scale == 1 else f"; artifact.fit multiplies the scales by {ledger.clip_scale:.3f}"
    )
    note = fill_note(ledger)
    return f"{text}\n{note}" if note else text


def _artifact(argv: list[str]) -> Path | None:
    """Return the artifact asked for: a .pgolf file, or that of a run folder; None if settings follow it."""
    if len(argv) != 1 or argv[0] in {*PRESETS, *OLD_NAMES}:
        return None
    path = Path(argv[0])
    if path.is_dir():
        path = path / ARTIFACT
    return path if path.suffix == ".pgolf" and path.is_file() else None


def _checkpoint(name: str) -> Path | None:
    """Return the weights that `name` means: a .safetensors file, or a run folder's averaged weights.

    A preset goes before a folder of its name, as it does for the other verbs.
    """
    path = Path(name)
    if path.is_dir() and name not in {*PRESETS, *OLD_NAMES}:
        return path / "ema.safetensors"
    return path if path.suffix == ".safetensors" else None
