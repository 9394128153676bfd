"""`pgolf config PRESET [overrides]`: print the configuration of a run without running it."""

from __future__ import annotations

import json
import math

from pgolf.cli.overrides import parse_config
from pgolf.config import config_hash, to_dict


def main(argv: list[str]) -> int:
    """Print the resolved configuration as JSON, then the figures that follow from it."""
    config = parse_config("config", argv)
    from pgolf.artifact.predict import predict_fitted, predict_ledger
    from pgolf.artifact.size import check_limit
    from pgolf.model.gpt import layer_order, parameter_shapes
    from pgolf.optim.polar import coefficients

    # Both raise an error for settings that no run could use.
    coefficients(config.optim.muon.coefficients, config.optim.muon.ns_steps)
    check_limit(config.artifact.limit)

    print(json.dumps(to_dict(config), indent=2))
    shapes = parameter_shapes(config.model)
    total = sum(math.prod(shape) for shape in shapes.values())
    predict = predict_fitted if config.artifact.fit else predict_ledger
    ledger = predict(config.model, config.quant, limit=config.artifact.limit)
    passes = config.data.batch_tokens // config.data.micro_tokens
    print(f"\nhash            {config_hash(config)}")
    print(f"parameters      {total:,}")
    for loop in (False, True):
        encoder, decoder = layer_order(config.model, loop=loop)
        print(f"layers loop {'on ' if loop else 'off'} {encoder} | {decoder}")
    print(f"step            {config.data.batch_tokens:,} tokens in {passes} x {config.data.micro_tokens:,}")
    print(f"artifact        about {ledger.total:,} bytes of {ledger.limit:,}; pgolf size says where")
    return 0
