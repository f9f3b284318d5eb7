"""Put something around the attention call of a module for the time of one pipeline call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastdiff.seam import LAYER, STAGE, STAND_INS, entering
from fastdiff.shadow import ORIGINAL, restore_class, swap_class


@contextmanager
def driven(module: Any, stage: Callable[..., Tensor]) -> Iterator[None]:
    """Let `stage` (attend, query, key, value, mask, scale) make this module's attention.

    query, key, value and the result are [B, S, H, D]. `attend` goes on to the attention method
    that is on, else to stock. ValueError where another method is around this attention already,
    or where the module calls attention in a way that cannot be taken over.
    """
    if STAGE in module.__dict__:
        raise ValueError("freeswim and a method that drops tokens or steps change the same "
                         "attention: use one")
    hook = None
    stock = not hasattr(type(module.processor), ORIGINAL)
    if stock and not swap_class(module.processor, STAND_INS):
        raise ValueError(f"freeswim cannot take over {type(module.processor).__name__}, which "
                         "calls neither diffusers' dispatcher nor torch's own attention")
    if not hasattr(module, LAYER):
        hook = module.register_forward_pre_hook(entering, with_kwargs=True)
    object.__setattr__(module, STAGE, stage)
    try:
        yield
    finally:
        module.__dict__.pop(STAGE, None)
        if hook is not None:
            hook.remove()
        if stock:
            restore_class(module.processor)
