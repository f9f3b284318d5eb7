"""What a killed run leaves behind: the clip of stage one, and the latent of the last saved step."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from fastdiff.pipelines.upscale.refine import Checkpoint

_CLIP, _STEP = "clip.pt", "step.pt"
# arguments of a call that do not change its result
_SILENT = ("self", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict",
           "output_type")


class Folder:
    """The files of one call in the folder that the user named; each is whole or not there.

    A call is known by its arguments, so several can share a folder. Files are plain tensors and
    numbers, read back without running code.
    """

    def __init__(self, root: str, key: str, generators: list[torch.Generator]) -> None:
        self.path = Path(root) / key
        self._generators = generators
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder={root!r} is not possible: {error}") from None

    def clip(self) -> Tensor | None:
        """Frames of stage one as `save_clip` got them, and generators where it left them."""
        found = self._read(_CLIP)
        if found is None:
            return None
        self._restore(found)
        return found["frames"]

    def save_clip(self, frames: Tensor) -> None:
        self._write(_CLIP, {"frames": frames.cpu()})

    def checkpoint(self, fresh: Callable[[], Any]) -> Checkpoint | None:
        """The last saved step. fresh: makes the scheduler that takes on its state."""
        found = self._read(_STEP)
        if found is None:
            return None
        self._restore(found)
        scheduler = fresh()
        vars(scheduler).update(found["scheduler"])
        return Checkpoint(found["done"], found["latents"], scheduler)

    def save(self, checkpoint: Checkpoint) -> None:
        self._write(_STEP, {
            "done": checkpoint.done, "latents": checkpoint.latents.cpu(),
            "scheduler": {name: value for name, value in vars(checkpoint.scheduler).items()
                          if _is_plain(value)}})

    def finish(self) -> None:
        """The call has returned; nothing is left to go on from."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        content["generators"] = [g.get_state() for g in self._generators]
        file, part = tempfile.mkstemp(dir=self.path, suffix=".part")
        try:
            with os.fdopen(file, "wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, self.path / name)
        finally:
            Path(part).unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        # a damaged file is no file
        with suppress(FileNotFoundError, RuntimeError, EOFError, UnpicklingError):
            return torch.load(path, map_location="cpu", weights_only=True)
        return None

    def _restore(self, found: dict[str, Any]) -> None:
        for generator, state in zip(self._generators, found["generators"], strict=True):
            generator.set_state(state)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def generators_of(arguments: dict[str, Any]) -> list[torch.Generator]:
    given = arguments.get("generator")
    return [] if given is None else [given] if isinstance(given, torch.Generator) else [*given]


def call_key(pipe: Any, method: dict[str, Any], arguments: dict[str, Any]) -> str:
    """A name for a call: the same for the same model, method and arguments."""
    about = {name: _told(value) for name, value in arguments.items() if name not in _SILENT}
    denoisers = {name: [str(getattr(part, "dtype", "")), _weights(part)]
                 for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
                 and name in ("transformer", "transformer_2", "unet")}
    scheduler = [type(pipe.scheduler).__name__, {
        name: str(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}]
    told = json.dumps([type(pipe).__name__, denoisers, scheduler, method, about], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _weights(model: torch.nn.Module) -> str:
    """A few numbers of some parameters: tells checkpoints apart without reading them whole.

    Of a LoRA a few of every one, and how much it counts.
    """
    names = [*model.named_parameters()]
    few = names[:: max(1, len(names) // 8)]
    few += [(name, p) for name, p in names if "lora_" in name]
    told = [(name, tuple(p.shape), p.flatten()[:4].float().tolist())
            for name, p in few if p.device.type != "meta"]
    scales = [(name, module.scaling, module.active_adapters) for name, module in
              model.named_modules() if isinstance(getattr(module, "scaling", None), dict)]
    return _digest(repr([told, scales]).encode())


def _told(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Generator):
        return [str(value.device), _digest(value.get_state().numpy().tobytes())]
    if isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return [list(value.shape), str(value.dtype), _digest(whole.numpy().tobytes())]
    if isinstance(value, (list, tuple)):
        return [_told(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _told(item) for name, item in value.items()}
    if hasattr(value, "tobytes"):
        # pictures and arrays
        return _digest(value.tobytes())
    return repr(type(value))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
