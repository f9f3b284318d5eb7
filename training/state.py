"""All models of one run with their records; full state on disk and compact restart files."""

import json
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .autoencoder import build_autoencoder
from .classifier import Classifier
from .denoiser import build_denoiser
from .optim import Average, Optimizer
from .text import build_text_encoder, build_tokenizer, wrap_tokenizer

PART_BYTES = int(14.5 * 2**20)


def folder_sizes(folder: Path) -> dict[str, float]:
    """Megabytes of the parts of a pipeline folder and in all."""
    sizes = {
        path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    sizes["total"] = sum(sizes.values())
    return {name: round(size, 3) for name, size in sizes.items()}


class State:
    """The modules on one device plus `record`: stages done, figures, latent statistics."""

    def __init__(self, config: dict, device: torch.device):
        torch.manual_seed(config["seed"])
        self.config = config
        self.device = device
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(config["text"]["vocabulary"])
        self.text = build_text_encoder(config["text"], config["text"]["vocabulary"]).to(device)
        self.vae = build_autoencoder(config["autoencoder"]).to(device)
        self.classifier = Classifier().to(device)
        self.denoiser = build_denoiser(config["denoiser"], config["text"]["dim"]).to(device)
        # under autocast some weights are made in other types by the library; train in fp32
        for module in self.modules().values():
            module.float()
        self.average = Average(self.denoiser, config["denoiser"]["average"])
        self.optimizer = Optimizer(self.denoiser, config["denoiser"])
        self.record: dict[str, Any] = {"stages": {}, "figures": {}, "latents": None}

    def modules(self) -> dict[str, nn.Module]:
        return {
            "text": self.text,
            "vae": self.vae,
            "classifier": self.classifier,
            "raw": self.denoiser,
        }

    def stage(self, name: str) -> dict[str, Any]:
        return self.record["stages"].setdefault(name, {"spent": 0.0, "steps": 0, "done": False})

    def averaged(self) -> Any:
        """A copy of the denoiser with the average weights, in evaluation mode."""
        model = deepcopy(self.denoiser).eval()
        model.load_state_dict(self.average.state_dict(), strict=False)
        return model

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, each [16, 1, 1, 1]."""
        mean, std = self.record["latents"]
        shape = (16, 1, 1, 1)
        return (
            torch.tensor(mean, device=self.device).view(shape),
            torch.tensor(std, device=self.device).view(shape),
        )

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        self.record["latents"] = [mean, std]
        self.vae.register_to_config(latents_mean=mean, latents_std=std)

    def tensors(self) -> dict[str, Tensor]:
        rows = {
            f"{prefix}.{name}": value
            for prefix, module in self.modules().items()
            for name, value in module.state_dict().items()
            if not (prefix == "text" and name == "encoder.embed_tokens.weight")
        }
        rows |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return {name: value.detach() for name, value in rows.items()}

    def _load(self, rows: dict[str, Tensor], record: dict[str, Any]) -> None:
        for prefix, module in self.modules().items():
            own = {k[len(prefix) + 1 :]: v for k, v in rows.items() if k.startswith(prefix + ".")}
            missing, unexpected = module.load_state_dict(own, strict=False)
            missing = [k for k in missing if k != "encoder.embed_tokens.weight"]
            if missing or unexpected:
                raise ValueError(f"{prefix}: missing {missing}, unexpected {unexpected}")
        self.average.load({k[8:]: v for k, v in rows.items() if k.startswith("average.")})
        self.record = record
        if record["latents"] is not None:
            self.set_latent_statistics(*record["latents"])
        core = Tokenizer.from_str(record["tokenizer"])
        self.tokenizer = wrap_tokenizer(core)

    def _full_record(self) -> dict[str, Any]:
        return {**self.record, "tokenizer": self.tokenizer.backend_tokenizer.to_str()}

    def save(self, folder: Path) -> None:
        """Full precision with the optimiser, for the same machine."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "tensors": self.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "record": self._full_record(),
        }
        torch.save(content, folder / "state.new")
        (folder / "state.new").replace(folder / "state.pt")

    def load(self, folder: Path) -> None:
        content = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self._load(content["tensors"], content["record"])
        self.optimizer.load_state_dict(content["optimizer"])

    def save_compact(self, folder: Path) -> list[Path]:
        """bf16 weights and record as one safetensors stream, cut into parts below 15 MiB."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in self.tensors().items()}
        data = save_tensors(rows, metadata={"record": json.dumps(self._full_record())})
        paths = []
        for i in range(0, len(data), PART_BYTES):
            paths.append(folder / f"restart.{i // PART_BYTES:02d}.part")
            paths[-1].with_suffix(".new").write_bytes(data[i : i + PART_BYTES])
        for path in paths:
            path.with_suffix(".new").replace(path)
        for old in set(folder.glob("restart.*.part")) - set(paths):
            old.unlink()
        return paths

    def load_compact(self, folder: Path) -> None:
        paths = sorted(folder.glob("restart.*.part"))
        if not paths:
            raise ValueError(f"no restart.*.part in {folder}")
        data = b"".join(path.read_bytes() for path in paths)
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        rows = {k: v.to(self.device) for k, v in load_tensors(data).items()}
        self._load(rows, json.loads(header["__metadata__"]["record"]))
