"""The writer: encodes and saves on its own thread, while the next call is on the device."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from fastdiff.batch.claims import Claim, Claims
from fastdiff.batch.folder import Folder, fatal
from fastdiff.batch.maker import Made, Maker
from fastdiff.cli.errors import explain


class Writer:
    """Takes what was made; writes result, then sidecar, then gives the claim back.

    An error of one job is noted as its failure. An error of the folder (a full disk, no
    permission) stops the writer: `check` and `close` raise it on the main thread, and the jobs
    that wait are given back unmade. At most one call waits while another one is written.
    """

    def __init__(self, folder: Folder, claims: Claims, maker: Maker) -> None:
        self._folder, self._claims, self._maker = folder, claims, maker
        self._queue: queue.Queue[list[tuple[Claim, Made]] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fastdiff-writer")
        self._thread.start()

    def put(self, made: list[tuple[Claim, Made]]) -> None:
        """Queue the results of one call; waits while the one before is not begun."""
        self._queue.put(made)
        self.check()

    def check(self) -> None:
        """Raise the error that stopped the writer."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for everything; raise the error that stopped the writer."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.check()

    def _run(self) -> None:
        while (several := self._queue.get()) is not None:
            for claim, made in several:
                self._guarded(lambda c=claim, m=made: self._one(c, m))
                self._guarded(lambda c=claim: self._claims.release(c), always=True)

    def _guarded(self, action: Callable[[], Any], always: bool = False) -> None:
        if self._error is None or always:
            try:
                action()
            except BaseException as error:
                self._error = self._error or error

    def _one(self, claim: Claim, made: Made) -> None:
        if not self._claims.held(claim):
            # taken for dead meanwhile, and the job is another one's now
            return
        try:
            path, record = self._maker.write(made, self._folder.path)
            self._folder.commit(path, record)
        except Exception as error:
            if not self._claims.held(claim):
                return
            behind = fatal(error, self._folder.path)
            if behind is error:
                raise
            if behind is not None:
                raise behind from error
            self._folder.fail(made.task, explain(error)[0], claim.deaths)
