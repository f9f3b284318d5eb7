"""Several workers of one host: `accelerate launch` once for each, watched over.

One launch with many processes would be torch's elastic agent, which stops all of them when one
dies. With one launch each, a dead worker costs its own jobs in flight, and is started again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from fastdiff.batch.claims import gone, process
from fastdiff.batch.folder import Folder
from fastdiff.batch.task import Task
from fastdiff.batch.watch import Watch
from fastdiff.batch.worker import Stopped
from fastdiff.cli.errors import InputError

if TYPE_CHECKING:
    from fastdiff.batch.api import Options

PLACE, PARENT = "FASTDIFF_BATCH_PLACE", "FASTDIFF_BATCH_PARENT"
# starts of one worker in a row that bring nothing
_MOST_STARTS = 4
_GRACE = 30.0


def place() -> tuple[tuple[int, int], str | None]:
    """((rank, of), device) of this process: ours, or those of a launcher that the user called."""
    if PLACE in os.environ:
        rank, _, of = os.environ[PLACE].partition("/")
        return (int(rank), int(of)), None
    rank, of = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if of == 1:
        return (0, 1), None
    import torch

    if not torch.cuda.is_available():
        return (rank, of), None
    return (rank, of), f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"


def parent() -> dict[str, Any] | None:
    """Who started this worker."""
    return json.loads(os.environ[PARENT]) if PARENT in os.environ else None


def leave_with_parent() -> None:
    """Ask this process to stop when the one that started it is gone."""
    if gone(parent() or {}):
        os.kill(os.getpid(), signal.SIGTERM)


def gpus(count: str) -> int:
    """How many workers `--gpus` asks for: a number, or "all"."""
    import torch

    here = torch.cuda.device_count()
    if not here:
        raise InputError("--gpus needs a GPU, and this machine has none; --processes N starts "
                         "workers on the CPU")
    if count == "all":
        return here
    if not count.isdecimal() or not 1 <= int(count) <= here:
        raise InputError(f"--gpus {count!r}: accepted is 1 to {here}, or all")
    return int(count)


def workers(
    tasks: Sequence[Task], folder: Folder, options: "Options", watch: Watch, stop: Event
) -> None:
    """Run `options.processes` workers until all is settled; start again those that die."""
    run = folder.home / "runs" / uuid.uuid4().hex[:8]
    run.mkdir(parents=True)
    (run / "tasks.json").write_text(json.dumps({
        "tasks": [task.to_dict() for task in tasks], "batch_size": options.batch_size,
        "lease": options.lease, "command_line": list(options.command_line),
    }), encoding="utf-8")
    (run / "accelerate.json").write_text(json.dumps(_ACCELERATE), encoding="utf-8")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
             str(run / "accelerate.json"), "--num_processes", "1"]
    several = [_Process(rank, options.processes, run, words) for rank in range(options.processes)]
    try:
        for one in several:
            one.start()
        _supervise(several, run, watch, stop)
    finally:
        _end(several)
        # where the workers could not go on, their logs stay to be read
        if not isinstance(sys.exception(), RuntimeError):
            shutil.rmtree(run)


def _supervise(several: "list[_Process]", run: Path, watch: Watch, stop: Event) -> None:
    while watch.left:
        time.sleep(0.1)
        before = watch.left
        watch.look()
        if stop.is_set():
            raise Stopped
        if (run / "error").is_file():
            raise InputError((run / "error").read_text(encoding="utf-8"))
        for one in several:
            if watch.left < before:
                one.starts = 1
            if not one.running and one.starts < _MOST_STARTS:
                watch.look(now=True)
                if watch.left:
                    one.start()
        if not any(one.running for one in several):
            watch.look(now=True)
            if watch.left:
                raise RuntimeError(
                    f"all workers ended with {watch.left} jobs left; the last words of one: "
                    f"{several[0].last_words()} (logs in {str(run)!r})")


def _end(several: "list[_Process]") -> None:
    """Ask what still runs to stop; after a while, make it."""
    for one in several:
        one.send(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while any(one.running for one in several) and time.monotonic() < deadline:
        time.sleep(0.05)
    for one in several:
        one.send(signal.SIGKILL)


@dataclass
class _Process:
    rank: int
    of: int
    run: Path
    words: list[str]
    starts: int = 0
    _process: subprocess.Popen | None = field(default=None)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.starts += 1
        chosen = _device_words(self.rank)
        words = [*self.words, *chosen, "-m", "fastdiff.cli", "batch", "--worker", str(self.run)]
        cores = max(1, (os.cpu_count() or 1) // self.of)
        env = {"OMP_NUM_THREADS": str(cores), **os.environ, PLACE: f"{self.rank}/{self.of}",
               PARENT: json.dumps(process())}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(words, env=env, stdout=log, stderr=log,
                                             stdin=subprocess.DEVNULL, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        """To the launcher and the worker below it."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return

    def last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else "none"

    @property
    def _log(self) -> Path:
        return self.run / f"worker-{self.rank}.log"


def _device_words(rank: int) -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        return ["--cpu"]
    # the user's own choice of GPUs is kept
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return ["--gpu_ids", visible.split(",")[rank % count]]


_ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "debug": False,
    "downcast_bf16": "no", "machine_rank": 0, "main_training_function": "main",
    "mixed_precision": "no", "num_machines": 1, "num_processes": 1, "rdzv_backend": "static",
    "same_network": True, "use_cpu": False,
}
