"""`pgolf config PRESET [overrides]`: print the configuration of a run without running it.

`pgolf config A --diff B` prints the settings in which two presets or saved configurations differ.
"""

from __future__ import annotations

import json
import math

from pgolf.cli.overrides import load_base, parse_config
from pgolf.cli.table import align
from pgolf.config import config_hash, flat, to_dict
from pgolf.errors import UserError

DIFF = "--diff"


def main(argv: list[str]) -> int:
    """Print the resolved configuration as JSON, then the figures that follow from it."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(DIFF) else [word])]
    if DIFF in words:
        print(difference([word for word in words if word != DIFF]))
        return 0
    config = parse_config("config", argv)
    from pgolf.artifact.predict import predict_fitted, predict_ledger
    from pgolf.artifact.size import check_limit
    from pgolf.model.gpt import layer_order, parameter_shapes
    from pgolf.optim.polar import coefficients

    # Both raise an error for settings that no run could use.
    coefficients(config.optim.muon.coefficients, config.optim.muon.ns_steps)
    check_limit(config.artifact)

    print(json.dumps(to_dict(config), indent=2))
    shapes = parameter_shapes(config.model)
    total = sum(math.prod(shape) for shape in shapes.values())
    predict = predict_fitted if config.artifact.fit else predict_ledger
    limit, coder, program = config.artifact.limit, config.artifact.coder, config.artifact.program
    ledger = predict(config.model, config.quant, limit=limit, coder=coder, program=program)
    passes = config.data.batch_tokens // config.data.micro_tokens
    print(f"\nhash            {config_hash(config)}")
    print(f"parameters      {total:,}")
    for loop in (False, True):
        encoder, decoder = layer_order(config.model, loop=loop)
        print(f"recurrence {'on ' if loop else 'off'} {encoder} | {decoder}  (layers of encoder | decoder)")
    print(f"step            {config.data.batch_tokens:,} tokens in {passes} x {config.data.micro_tokens:,}")
    print(f"artifact        about {ledger.total:,} bytes of {ledger.limit:,}; pgolf size says where")
    return 0


def difference(names: list[str]) -> str:
    """Return one line per setting in which two presets or saved configurations differ, with both values.

    Raises:
        UserError: there are not two names, or one is neither a preset nor a saved configuration.
    """
    if len(names) != 2:
        raise UserError(f"expected two presets or config.json files: pgolf config A {DIFF} B")
    first, second = (flat(to_dict(load_base(name))) for name in names)
    rows: list[tuple[str, ...]] = [("setting", *names)]
    for key in first:
        ours, theirs = (json.dumps(side[key]) for side in (first, second))
        if ours != theirs and key != "name":
            rows.append((key, ours, theirs))
    if len(rows) == 1:
        return f"{names[0]} and {names[1]} have the same settings"
    return "\n".join(align(rows))
