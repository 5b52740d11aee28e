"""q and k of one layer of a trained model, as files for `plot selection`, `selection_recall` and `benchmarks.run`.

    python -m examples.fidelity.qk --seed 0 --layers 1 2 3 --pairs 32 --out DIR

Writes DIR/VARIANT-seedS-layerN.pt, of one window of the text for validation, over which pairs to recall may be written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.fidelity import recall, text, variants
from examples.fidelity.model import Decoder, build
from examples.fidelity.presets import PRESETS
from examples.fidelity.run import Job, add_place, place
from examples.fidelity.train import on, weights
from splagen.nn import SPLAAttention


@torch.no_grad()
def rows(model: Decoder, window: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, q [1, L, Hq, D] and k [1, L, Hkv, D] for bytes [1, L] (int64).

    Raises:
        ValueError: a layer that the model lacks, or that has no softmax.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = []
    for layer in layers:
        if not 0 <= layer < len(model.blocks):
            raise ValueError(f"no layer {layer}: the model has {len(model.blocks)}, counted from 0")
        attention = model.blocks[layer].attention
        if not isinstance(attention, SPLAAttention):
            raise ValueError(f"layer {layer} is {type(attention).__name__}, which has no softmax: take another")

        def keep(module: SPLAAttention, given: tuple[Tensor, ...], layer: int = layer) -> None:
            own = module.rows(given[0])
            found[layer] = own["q"], own["k"]

        hooks.append(attention.register_forward_pre_hook(keep))
    try:
        with torch.autocast(window.device.type, torch.bfloat16, enabled=window.is_cuda):
            model(window)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, and print their names."""
    parser = argparse.ArgumentParser(prog="python -m examples.fidelity.qk", description=__doc__.partition("\n")[0])
    add_place(parser)
    parser.add_argument("--variant", choices=list(variants.ABOUT), default="dense", metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", nargs="+", type=int, default=[0])
    parser.add_argument("--length", type=int, help="bytes; default: the context that the model was trained with")
    parser.add_argument("--pairs", type=int, default=0, help="to recall, written over the window (default: none)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    shape = PRESETS[given.preset].shape
    device, work = place(given)
    model = build(variants.variant(given.variant, shape.layers), shape, given.seed, device)
    model.load_state_dict(weights(work / f"{Job(given.variant, given.seed).name}.pt"))
    window = text.spread(text.load(work.parent).validation, given.length or shape.context, 3)[1:2]
    if given.pairs:
        recall.insert(window[0], np.random.default_rng(given.seed), given.pairs)
    given.out.mkdir(parents=True, exist_ok=True)
    for layer, (q, k) in rows(model, on(window, device), given.layers).items():
        path = given.out / f"{given.variant}-seed{given.seed}-layer{layer}.pt"
        torch.save({n: x.to(torch.bfloat16).cpu().clone() for n, x in (("q", q), ("k", k))}, path)
        print(path, flush=True)


if __name__ == "__main__":
    main()
