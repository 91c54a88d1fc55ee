"""Write the weights of a run as a file that other packages load.

    python -m trainer.export runs/sam_vith --format segment_anything --out sam_vit_h.pth
    python -m trainer.export runs/sam_vith/checkpoints/step_00090000 --out sam_vit_h.pth

`segment_anything`: a plain `torch.save` state dict, fp32, with exactly the released key names; the package's
`sam_model_registry[...](checkpoint=...)` takes it.
"""

import argparse
import sys
from pathlib import Path

import torch

from trainer.stages import read_weights


def export(run: Path, out: Path) -> int:
    """Write the newest weights of `run` to `out`, whole or not at all; returns the number of tensors."""
    weights = read_weights(run)
    temporary = out.with_name(out.name + ".tmp")
    torch.save({name: tensor.float().contiguous() for name, tensor in weights.items()}, temporary)
    temporary.replace(out)
    return len(weights)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory or one of its checkpoints")
    parser.add_argument("--format", choices=["segment_anything"], default="segment_anything")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        count = export(options.run, options.out)
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count} tensors, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
