"""Averages weights: what a run alone loses of the weights it started from, the mean keeps.

python -m training.average --output /tmp/mean 0.75=training/runs/main 0.25=pagedllm_core/bundled/tiny

Source: Wortsman et al., "Model soups" (2022) and "Robust fine-tuning of zero-shot models" (2022).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .build import BUNDLED, configuration, export_weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a run's checkpoint or of a model folder."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        model = torch.load(checkpoint, weights_only=True)["model"]
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {name: weight.float() for name, weight in model.items()}


def average(parts: list[tuple[float, Path]], output: Path) -> None:
    """Write the weighted mean into a copy of the bundled model's folder, or into that folder itself.

    Raises:
        ValueError: The shares do not add up to 1.
    """
    if abs(sum(share for share, _ in parts) - 1) > 1e-6:
        raise ValueError(f"the shares {[share for share, _ in parts]} do not add up to 1")
    read = [(share, read_weights(folder)) for share, folder in parts]
    mean = {name: torch.stack([share * weights[name] for share, weights in read]).sum(0) for name in read[0][1]}
    if output.resolve() != BUNDLED.resolve():
        shutil.copytree(BUNDLED, output, dirs_exist_ok=True)
    model = LlamaForCausalLM(configuration())
    model.load_state_dict(mean)
    export_weights(model, output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", metavar="SHARE=FOLDER", help="a run's folder or a model's")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pairs = [part.split("=", 1) for part in arguments.parts]
    average([(float(share), Path(folder)) for share, folder in pairs], arguments.output)


if __name__ == "__main__":
    main()
