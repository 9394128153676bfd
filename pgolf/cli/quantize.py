"""`pgolf quantize CHECKPOINT --data DIR --out FILE [--quant.key VALUE ...]`: from weights to an artifact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from pgolf.cli.overrides import check_output, present_words, say
from pgolf.config import ArtifactConfig, QuantConfig


@dataclass(frozen=True)
class Quantize:
    """Make an artifact of a run's saved weights, with other quantization settings than the run had.

    The weights are calibrated on training text, quantized, written, read back and scored. Under torchrun the
    ranks calibrate and score together, and the first one writes.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The weights: ema.safetensors (averaged) or raw.safetensors of a run."""
    data: Path
    """Folder with shards of training and validation text and the run's tokenizer."""
    out: Path = Path("model.pgolf")
    """The file to write; an artifact that is there is replaced."""
    quant: QuantConfig = QuantConfig()  # noqa: RUF009 - frozen
    """Quantization settings; those of the run where the command line gives no others."""
    artifact: ArtifactConfig = ArtifactConfig()  # noqa: RUF009 - frozen
    """The limit, and whether to fill it; those of the run where the command line gives no others."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes a GPU if there is one."""


def parse(argv: list[str]) -> Quantize:
    """Return what the words ask for; settings that they leave out are the checkpoint's own."""
    from pgolf.train.weights import load_config

    default = Quantize(checkpoint=tyro.MISSING, data=tyro.MISSING)
    for word in argv:
        if word.endswith(".safetensors") and Path(word).is_file():
            saved = load_config(Path(word))
            default = replace(default, quant=saved.quant, artifact=saved.artifact)
            break
    return tyro.cli(Quantize, prog="pgolf quantize", args=present_words(argv), default=default)


def main(argv: list[str]) -> int:
    """Quantize and score."""
    args = parse(argv)
    from pgolf.artifact.fit import fill_note, write_quantized
    from pgolf.artifact.read import read_artifact
    from pgolf.artifact.size import check_limit
    from pgolf.data.foreign import check_foreign
    from pgolf.dist import Dist
    from pgolf.evaluate.validation import DataFolder, score_model
    from pgolf.model.agree import agree_on_kernels
    from pgolf.model.gpt import GPT, CompileName
    from pgolf.quant.cap import fit_quantized
    from pgolf.quant.pipeline import Quantizer
    from pgolf.train.trainer import open_loader
    from pgolf.train.weights import check_left_out, check_tokenizer, copy_parameters, load_weights

    check_limit(args.artifact)
    state, saved, facts = load_weights(args.checkpoint)
    say(facts.get("note", ""))
    data = replace(saved.data, dir=args.data)
    config = replace(saved, data=data, quant=args.quant, artifact=args.artifact)
    check_left_out(config, saved, where=str(args.checkpoint))
    data_folder = DataFolder.open(args.data, vocab_size=config.model.vocab_size, verify=config.data.verify)
    check_tokenizer(args.checkpoint, facts, data_folder.sha256)
    check_foreign(data_folder.folder, training=config.data.verify)
    check_output(args.out, "--out")
    data_folder.validation(documents=1)  # raises now what scoring would raise in the end
    dist = Dist.start(args.device)
    try:
        compile: CompileName = "blocks" if dist.device.type == "cuda" else "off"
        model = GPT(config.model).prepare(dist.device, compile=compile)
        agree_on_kernels(model, dist, compile=compile)
        copy_parameters(model, state)
        with open_loader(config, data_folder, dist) as loader:
            quantizer = Quantizer.calibrated(model, iter(loader.next, None), config.quant, dist)
        error, ledger, first, fit = None, None, None, None
        if loader.left_out:
            first = quantizer.quantize()
            bos_id, tokens = data_folder.tokenizer.bos_id, config.data.micro_tokens
            fit = fit_quantized(model, first, loader.left_out, dist, bos_id=bos_id, tokens=tokens)
        if dist.is_main:
            try:
                write = partial(write_quantized, args.out, quantizer, config, first=first, fit=fit)
                ledger = write(tokenizer_sha256=data_folder.sha256)
            except Exception as e:
                error = e
        dist.check(error)
        artifact = read_artifact(args.out)
        copy_parameters(model, artifact.state)
        model.config = artifact.header.model
        score = score_model(model, data_folder, config.data.micro_tokens, dist)
    finally:
        dist.close()
    if ledger is None:  # another rank has written
        return 0
    note = f"  ({data_folder.checked})" if data_folder.manifest is None else ""
    print(f"{args.out}: {ledger.total:,} bytes of {ledger.limit:,}; {score.bpb:.4f} bpb{note}")
    for line in filter(None, (fit, fill_note(ledger))):
        print(line)
    return 0
