"""The batch tab: a prompt a line, made one after the other with one setting, as a zip."""

import shutil
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from fastdiff.batch import run
from fastdiff.cli.errors import InputError
from fastdiff.demo import live
from fastdiff.demo.house import House, told
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.wish import Wish, whole
from fastdiff.demo.worker import Stopped, Ticket

EXAMPLE = ("a red apple on a blue background\na yellow sun on a purple background\n"
           "a penguin on a dotted green background")


@dataclass(frozen=True)
class Batch:
    """What a batch left. files: results, each once. failed: sentences.

    same: jobs that were the same as another one. cut: why it ended before its last job; empty
    where it did not.
    """

    files: list[Path]
    failed: list[str]
    archive: Path
    same: int = 0
    cut: str = ""


class BatchTab:
    """The components and the event."""

    def __init__(self, house: House, panel: MethodPanel) -> None:
        self._house, self._panel = house, panel
        best, limits = house.renderer.model.defaults, house.limits
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self.prompts = gr.Textbox(
                    EXAMPLE if house.renderer.model.shipped else "", lines=8, max_lines=20,
                    label="Prompts", info=f"One a line, at most {limits.batch}",
                    elem_id="batch-prompts")
                self.kind = gr.Radio(list(house.renderer.kinds), label="Make",
                                     value="image" if "image" in house.renderer.kinds else "video",
                                     elem_id="batch-kind")
                with gr.Row():
                    self.seeds = gr.Textbox("0", label="Seeds", info="Commas between several",
                                            max_lines=1, elem_id="batch-seeds")
                    self.steps = gr.Slider(1, limits.steps, best.steps or 20, step=1,
                                           label="Steps", elem_id="batch-steps")
                with gr.Row():
                    self.go = gr.Button("Run", variant="primary", elem_id="batch-go")
                    self.stop = gr.Button("Stop", variant="stop", elem_id="batch-stop")
                gr.Markdown("Size and frames are the model's best; the methods are those of the "
                            "panel. `fastdiff batch` does the same from a file, with every field, "
                            "on several GPUs.", elem_classes="fd-about")
            with gr.Column(scale=7, min_width=420):
                self.live = gr.HTML(live.note("Ready."), elem_id="batch-live")
                self.gallery = gr.Gallery(label="Results", columns=4, visible=False, height="auto",
                                          interactive=False, format="png", elem_id="batch-gallery")
                self.archive = gr.File(label="All files, settings, and the contact sheet",
                                       visible=False, interactive=False, elem_id="batch-zip")
        self._connect()

    def wishes(self, text: Any, kind: str, seeds: Any, steps: Any, plan: Any) -> list[Wish]:
        """A wish for each prompt and seed, checked; an InputError names the line."""
        limits = self._house.limits
        prompts = [line.strip() for line in str(text or "").splitlines() if line.strip()]
        numbers = [part.strip() for part in str(seeds or "0").split(",") if part.strip()]
        if not all(part.isdecimal() for part in numbers):
            raise InputError(f"seeds {seeds!r} are not possible: accepted are whole numbers of 0 "
                             "or more, with commas between them")
        count = len(prompts) * len(numbers)
        if not 1 <= count <= limits.batch:
            raise InputError(f"{len(prompts)} prompts by {len(numbers)} seeds are {count} results: "
                             f"accepted are 1 to {limits.batch}")
        first = Wish(kind=kind, prompt="", steps=whole("steps", steps), plan=plan, compare=False)
        return [replace(first, prompt=prompt, seed=int(seed)).check(limits)
                for prompt in prompts for seed in numbers]

    def make(self, user: str, wishes: list[Wish], ticket: Ticket) -> Batch:
        """Run in the worker's thread. What is finished when it is stopped is kept."""
        renderer, folder = self._house.renderer, self._house.shelf.room(user)
        files: list[Path] = []
        failed: list[str] = []
        late = cut = ""
        same = 0
        ticket.enter("checking")

        def on_event(event: dict[str, Any]) -> None:
            nonlocal same
            if event["event"] == "start":
                same = len(wishes) - event["jobs"]
                ticket.phase = f"1 of {event['jobs']}"
            if event["event"] == "done":
                files.append(Path(event["file"]))
            if event["event"] == "failed":
                failed.append(f"{event['where']}: {event['error']}")
            if event["event"] in ("done", "failed"):
                number = min(event["finished"] + 1, event["jobs"])
                ticket.phase = f"{number} of {event['jobs']}"

        def on_step(step: int, of: int) -> None:
            nonlocal late
            try:
                ticket.check()
            except Stopped:
                # the batch itself sees it at the next step
                return
            except InputError as error:
                # the time is over: no fault of this job, and an end for all that follow
                late = str(error)
                ticket.stop()
            ticket.step, ticket.steps = step, of

        try:
            try:
                outcome = run([_fields(wish) for wish in wishes], folder / "results",
                              defaults={"model": renderer.model.name, "dtype": renderer.dtype},
                              device=renderer.device, on_event=on_event, on_step=on_step,
                              stop=ticket.ended, load=lambda *asked: renderer.pipe)
                # in the order of the jobs
                files = [path for path in dict.fromkeys(outcome.results) if path is not None]
            except KeyboardInterrupt:
                # how a batch ends that is asked to stop
                if not files:
                    raise (InputError(late) if late else Stopped) from None
                cut = late or "stopped"
            archive = folder / "fastdiff-batch.zip"
            _pack(folder / "results", archive)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            renderer.set_right()
        return Batch(files, failed, archive, same, cut)

    def _connect(self) -> None:
        async def batch(
            request: gr.Request, text: Any, kind: str, seeds: Any, steps: Any, *sent: Any
        ) -> AsyncIterator[dict[Any, Any]]:
            user = str(request.session_hash)

            def ask() -> Ticket:
                wishes = self.wishes(text, kind, seeds, steps, self._panel.plan(sent))
                self._house.renderer.settings(wishes[0])
                return self._house.worker.submit(
                    user, lambda ticket: self.make(user, wishes, ticket),
                    self._house.limits.seconds)

            async for state, made in told(self._house, ask):
                found: dict[Any, Any] = {self.live: state}
                yield found if made is None else {**found, **self._result(made)}

        gr.on(self.go.click, batch, [self.prompts, self.kind, self.seeds, self.steps,
              *self._panel.inputs], [self.live, self.gallery, self.archive],
              show_progress="hidden", concurrency_limit=None, api_name="batch")

        def stop(request: gr.Request) -> None:
            self._house.worker.stop(str(request.session_hash))

        self.stop.click(stop, queue=False, show_progress="hidden", api_name="stop_batch")

    def _result(self, made: Batch) -> dict[Any, Any]:
        told_ = live.note(f"{len(made.files)} made" + (f", {len(made.failed)} failed: "
                          f"{'; '.join(made.failed)}" if made.failed else ".")
                          + (f" {made.same} more asked for the same as one of these: made once."
                             if made.same else "")
                          + (f" The rest was not made: {made.cut}." if made.cut else ""))
        shown = [(str(path), path.stem.rpartition("-seed")[0].replace("-", " "))
                 for path in made.files]
        return {self.live: told_,
                self.gallery: gr.Gallery(shown, visible=True),
                self.archive: gr.File(str(made.archive), visible=True)}


def _fields(wish: Wish) -> dict[str, Any]:
    """A job for `fastdiff.batch.run`: no field that could name a file."""
    found: dict[str, Any] = {"prompt": wish.prompt, "kind": wish.kind, "seed": wish.seed}
    if wish.steps is not None:
        found["steps"] = wish.steps
    entries = (wish.plan or {}).get("methods", [])
    found["method"] = "+".join(entry["method"] for entry in entries) or "stock"
    for entry in entries:
        for name, value in entry.items():
            if name != "method":
                found[f"{entry['method']}.{name}"] = "none" if value is None else value
    return found


def _pack(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                packed.write(path, inside)
