"""Pruner: drop tokens inside a UNet's attention blocks, and fill them in before the block ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.method import Host, Method, check
from fastdiff.tokens.entry import Branches, Entry, Phase, Site, check_steps, sites
from fastdiff.tokens.pruned_block import Block, layers_of
from fastdiff.tokens.rank import ALIKE

RECOVER = ("similar", "increment", "own")
LAYOUTS = ("dagger", "all")


@dataclass(frozen=True, kw_only=True)
class Pruner(Method):
    """Works on the tokens that matter in the attention blocks of a UNet.

    In every chosen Transformer2DModel the first layer runs on all tokens, its self-attention ranks
    them, and the later layers run on the best. Before the block returns, and so before any
    convolution, ControlNet residual or skip connection, the dropped tokens are filled in. A block
    of a single layer (Stable Diffusion 1.5 and 2) drops them after its self-attention:
    cross-attention and feed-forward run on the kept tokens, the others get the increments of their
    stand-ins.

    keep: fraction of the tokens that later layers work on, over (0, 1].
    layout: "dagger" prunes only the blocks with most layers (32 x 32 tokens in SDXL), "all" every
        block.
    early_steps: first steps, in which the ranking is unreliable, that leave the first block of
        every down stage and the last of every up stage whole; an int counts steps, a float is a
        fraction of them.
    recover: what a dropped token becomes: "similar" takes the final state of its stand-in, a kept
        token, "increment" adds the stand-in's change to its own state, "own" keeps its own state.
    alike: which kept token stands in: "keys" the one with the most similar key, by the cosine over
        all heads; "attention" the one that it attends to most, as AT-EDM has it. Measured:
        docs/tokens.md.
    align: both guidance branches of a sample drop the same tokens.
    guard: a block is pruned only where a measurement on this machine says that it pays.
    """

    kind: ClassVar[str] = "tokens"

    keep: float = 0.37
    layout: str = "dagger"
    early_steps: int | float = 0.2
    recover: str = "similar"
    alike: str = "keys"
    align: bool = True
    guard: bool = True

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, "keep", self.keep, "a number over 0, at most 1")
        check(self.layout in LAYOUTS, "layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        check(self.recover in RECOVER, "recover", self.recover, f"one of {', '.join(RECOVER)}")
        check(self.alike in ALIKE, "alike", self.alike, f"one of {', '.join(ALIKE)}")
        check_steps("early_steps", self.early_steps)

    def rank(
        self, query: Tensor, key: Tensor, scale: float | None, count: int, branches: int
    ) -> tuple[Tensor, Tensor]:
        """Which tokens stay, int64 [B, count] ascending, and for every token the place in it of
        its stand-in, int64 [B, S]. query, key: [B, S, H, D]. Traced by torch.compile."""
        raise NotImplementedError

    def rank_key(self) -> str:
        """The knobs that decide what ranking costs, for the measured costs."""
        raise NotImplementedError

    def attach(self, host: Host) -> Callable[[], None]:
        entry = Entry()
        try:
            self._enter(host, entry)
        except BaseException:
            entry.leave()
            raise
        return entry.leave

    def _enter(self, host: Host, entry: Entry) -> None:
        phase, branches = Phase(host.clock, self.early_steps), Branches(host)
        blocks = []
        for name, part in host.models.items():
            entry.claim(part.model, self.name, ("at-edm", "zero-tprune", "tome", "linfusion"))
            here = {path: site for path, site in sites(name, part).items()
                    if part.family.site == "Transformer2DModel" and _layered(site.module)}
            most = max((len(layers_of(site.module)) for site in here.values()), default=0)
            chosen = {}
            for path, site in here.items():
                if self.layout == "all" or len(layers_of(site.module)) == most:
                    block = Block(self, host, site, phase, branches, _spared(path, here))
                    blocks.append(block)
                    chosen[f"{path}.transformer_blocks.0.attn1"] = block.stage
            if chosen:
                entry.stages(part.model, host.clock, chosen, outermost=True)
        if not blocks:
            kinds = ", ".join(type(part.model).__name__ for part in host.models.values())
            raise ValueError(
                f"{self.name} drops tokens inside the attention blocks of a UNet (Stable Diffusion "
                f"1.5, 2, XL), and {kinds} has none. In a diffusion transformer a dropped token "
                "stays stale and pictures collapse; use kv-downsample or query-skip there.")
        for block in blocks:
            block.enter(entry)


def _layered(module: Any) -> bool:
    """Whether this is a UNet's block over a latent picture, of the layers that we know."""
    return bool(getattr(module, "is_input_continuous", False)) and all(
        type(layer).__name__ == "BasicTransformerBlock" and layer.attn1 is not None
        and not layer.only_cross_attention for layer in layers_of(module))


def _spared(path: str, blocks: dict[str, Site]) -> bool:
    """Whether early steps leave this block whole: first of a down stage, last of an up stage."""
    stage, _, number = path.rpartition(".")
    same = [int(other.rpartition(".")[2]) for other in blocks if other.rpartition(".")[0] == stage]
    if path.startswith("down_blocks"):
        return int(number) == min(same)
    return path.startswith("up_blocks") and int(number) == max(same)
