"""Write the average weights of a run as a WanPipeline folder, stored in bf16."""

import argparse
import json
import tomllib
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler

from .folder import write_folder
from .state import State


def build_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=2,
        solver_type="bh2",
        final_sigmas_type="zero",
    )


def export(state: State, folder: Path) -> dict[str, float]:
    """Save every part; returns the sizes in megabytes."""
    parts = {
        "transformer": state.averaged(),
        "vae": state.vae,
        "text_encoder": state.text,
        "tokenizer": state.tokenizer,
        "scheduler": build_scheduler(),
    }
    index = {
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    return write_folder(folder, "WanPipeline", index, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--resume", type=Path, required=True, help="folder with restart.*.part")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text())
    state = State(config, torch.device("cpu"))
    state.load_compact(arguments.resume)
    sizes = export(state, arguments.out)
    parameters = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in state.modules().items()
    }
    print(json.dumps({"megabytes": sizes, "parameters": parameters, **state.record["figures"]}))


if __name__ == "__main__":
    main()
