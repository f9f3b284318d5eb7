"""The Hopper kernels compile without a GPU: no spills, and the softmax between the two waits."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CASES = {
    "plain": {}, "tail": {"tail": True}, "D=64, tail": {"dim": 64, "tail": True},
    "ragged, lse": {"ragged": True, "lse": True}, "keys by 32": {"block_k": 32},
    "keys by 16": {"block_k": 16}, "masked": {"masked": True},
    "in order, tail": {"ordered": True, "tail": True},
}
# registers run short where everything is on; spilled values are those of the row, not of the loop
FEW = {"ragged tail": {"ragged": True, "tail": True}}
WINDOWS = {"windows": {}, "windows, D=64, masked": {"dim": 64, "masked": True}}


def stand_in(capability: int = 90) -> None:
    """Make triton believe in a GPU, Hopper's at first; warmup() then compiles, never launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Card:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def map_python_to_cpp_type(self, ty):
            return ty

    card: Any = Card()
    driver.set_active(card)


def blocks(tokens=32768, dim=128, block_k=128, tail=False, lse=False, ragged=False,
           masked=False, ordered=False) -> Any:
    """One variant of block-sparse attention."""
    import torch

    from fastdiff.kernels.block_sparse_attention import gluon_impl

    q = torch.empty(1, tokens, 2, dim, dtype=torch.bfloat16)
    blocks, key_blocks = -(-tokens // 128) + ragged, -(-tokens // block_k) + ragged
    pooled = None
    if tail:
        mean = torch.empty(1, 2, key_blocks, dim, dtype=torch.bfloat16)
        keep = torch.zeros(1, 2, blocks, key_blocks, dtype=torch.bool)
        pooled = (mean, mean, torch.ones(1, key_blocks), keep)
    lists = torch.zeros(1, 2, blocks, 8, dtype=torch.int32)
    offsets, key_offsets = (torch.zeros(n + 1, dtype=torch.int32) for n in (blocks, key_blocks))
    mask = torch.ones(1, tokens, dtype=torch.bool) if masked else None
    plan = gluon_impl.plan_of(
        q, q, q, lists, offsets, key_offsets, block_q=128, block_k=block_k, masked=masked,
        tail=pooled, scale=0.1, return_lse=lse, ordered=ordered)
    return warmed(plan, *gluon_impl.tensors(
        q, q, q, lists, lists[..., 0], offsets, key_offsets, q,
        torch.empty(1, 2, tokens) if lse else None, lists, key_mask=mask, tail=pooled,
        order=lists.flatten() if ordered else None))


def windows(dim=128, masked=False) -> Any:
    """One variant of window attention."""
    import torch

    from fastdiff.kernels.window_attention import gluon_impl
    from fastdiff.kernels.window_attention.geometry import Window

    window = Window((5, 11, 13), (3, 5, 6))
    q = torch.empty(window.tokens + 9, 2, dim, dtype=torch.bfloat16)
    flag = torch.zeros(4, dtype=torch.int32)
    plan = gluon_impl.plan_of(q, q, q, q, window, before=0, masked=masked, scale=0.1)
    masks = (torch.ones(len(q), dtype=torch.bool), flag) if masked else None
    return warmed(plan, *gluon_impl.tensors(q, q, q, q, window, flag, before=0, masks=masks))


def warmed(plan: Any, mapped: Any, tensors: Any) -> Any:
    """The compiled kernel of a plan."""
    args = plan.arguments(mapped, tensors)
    return plan.kernel.warmup(*args, grid=(132,), **plan.settings)


def sass(kernel: Any) -> str:
    """The machine code, made by triton's own assembler for sm_90a."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True,
                              check=True)
    return done.stdout


def between_waits(text: str) -> list[dict[str, int]]:
    """Counts of matrix products, exponentials and those by a polynomial between the waits for the
    tensor cores."""
    none = {"HGMMA": 0, "MUFU.EX2": 0, "polynomial": 0, "wait": -1}
    found, counts = [], {**none}
    for line in text.splitlines():
        code = re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)", line)
        if code is None:
            continue
        for name in ("HGMMA", "MUFU.EX2"):
            counts[name] += code.group(1).startswith(name)
        # what ends a polynomial: its power of two is added to the exponent, 23 bits up
        counts["polynomial"] += re.search(
            r"LEA R\d+, R\d+, R\d+, 0x17 |IMAD R\d+, R\d+, 0x800000, R", line) is not None
        if code.group(1).startswith("WARPGROUP.DEPBAR"):
            wait = int(line.split("gsb0,")[1].split(";")[0].strip(), 16)
            found.append({**counts, "wait": wait})
            counts = {**none}
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """All variants, in two processes of their own: the stand-in for a GPU must not stay."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    names = [*CASES, *FEW, *WINDOWS]
    with tempfile.TemporaryDirectory() as folder:
        running = [
            subprocess.Popen([sys.executable, __file__, folder, *part], stderr=subprocess.PIPE,
                             text=True, env=env) for part in (names[::2], names[1::2])]
        errors = [process.communicate()[1] for process in running]
        if any("warpgroup_mma" in text and "ImportError" in text for text in errors):
            pytest.skip("this triton has no Gluon for Hopper")
        assert not any(process.returncode for process in running), [t[-2000:] for t in errors]
        return {name: Path(folder, name).read_text() for name in names}


@pytest.mark.parametrize("name", [*CASES, *FEW, *WINDOWS])
def test_compiles_with_overlap(compiled, name):
    text = compiled[name]
    spills = len(re.findall(r"\b(?:LDL|STL)", text))
    assert spills <= 32 if name in FEW else spills == 0
    waits = between_waits(text)
    # the loop: QK and PV are started together, one wait leaves PV running, then the softmax of a
    # tile (64 exponentials a thread), and only then the wait for PV
    overlapped = [after for before, after in zip(waits, waits[1:], strict=False)
                  if before["wait"] == 1 and after["wait"] == 0]
    assert overlapped
    for step in overlapped:
        assert step["HGMMA"] == 0 and step["MUFU.EX2"] + step["polynomial"] >= 64
        # at D = 64 one of eight is a polynomial
        assert step["polynomial"] == 8 * ("D=64" in name)


if __name__ == "__main__":
    stand_in()
    kinds = [(blocks, {**CASES, **FEW}), (windows, WINDOWS)]
    for make, variants in kinds:
        for variant, options in variants.items():
            if variant in sys.argv[2:]:
                Path(sys.argv[1], variant).write_text(sass(make(**options)))
