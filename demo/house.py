"""House: everything that the tabs share: model, worker, shelf, limits."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastdiff.demo import live
from fastdiff.demo.limits import Limits
from fastdiff.demo.render import Renderer
from fastdiff.demo.sentences import sentence
from fastdiff.demo.shelf import Entry, Shelf
from fastdiff.demo.wish import Wish
from fastdiff.demo.worker import DONE, Ticket, Worker

logger = logging.getLogger("fastdiff.demo")


@dataclass
class House:
    """One running demo."""

    renderer: Renderer
    limits: Limits
    worker: Worker
    shelf: Shelf

    @staticmethod
    def open(renderer: Renderer, limits: Limits) -> "House":
        worker = Worker(limits.queue, limits.per_user, renderer.set_right)
        return House(renderer, limits, worker, Shelf(limits.results))

    def ask(self, user: str, wish: Wish) -> Ticket:
        """Queue a wish; an InputError where it is not possible."""
        wish.check(self.limits)
        settings = self.renderer.settings(wish)
        self.limits.check("frames", settings.frames, 1, self.limits.frames)

        def work(ticket: Ticket) -> Entry:
            made = self.renderer.make(wish, ticket)
            ticket.enter("writing")
            return self.shelf.put(user, made, self.renderer)

        return self.worker.submit(user, work, self.limits.seconds)

    def leave(self, user: str) -> None:
        """A page was closed."""
        self.worker.stop(user)
        self.shelf.forget(user)

    def close(self) -> None:
        self.worker.close()
        self.shelf.close()


async def told(house: House, ask: Any) -> AsyncIterator[tuple[str, Any]]:
    """(HTML of the state, the result or None), again and again; the last one has the result.

    ask: makes the ticket; what it refuses is told, too.
    """
    try:
        ticket = ask()
    except Exception as error:
        text, expected = sentence(error)
        if not expected:
            logger.exception("a request failed")
        yield live.problem(text), None
        return
    try:
        async for now in live.follow(house.worker, ticket):
            yield now, None
        yield live.ending(ticket), ticket.result if ticket.state == DONE else None
    finally:
        # asked for the next state, or closed: the page has the files
        if isinstance(ticket.result, Entry):
            house.shelf.release(ticket.result.key)
        ticket.result = None
