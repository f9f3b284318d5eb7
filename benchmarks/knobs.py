"""Every registered attention method with options for a given density, for any benchmark."""

from typing import Any

from fastdiff.policies import Policy, methods

CONTROLS = {"random-blocks": "random tiles", "neighborhood": "a static window"}
# what a method needs besides a density where it was not calibrated
WITHOUT_PLAN: dict[str, dict[str, Any]] = {"sparse-vdit": {"modes": "dmv"}}
OURS = "tile-sparse"


def realised(total: dict[str, Any]) -> float:
    """Density over the steps that were to be sparse, from a report's summary.

    Calls that the method itself left dense count in full; the pooled tail is not counted.
    """
    dense = sum(n for why, n in total["dense_calls"].items() if why != "dense step")
    calls = total["sparse_calls"] + dense
    return (total["density"] * total["sparse_calls"] + dense) / calls if calls else 1.0


def names(only: list[str] | None = None) -> list[str]:
    """Attention methods, ours first and controls last; `only` picks some, in its order."""
    known = methods()
    if only:
        unknown = [name for name in only if name not in known]
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}: accepted are {', '.join(known)}")
        return only
    return sorted(known, key=lambda name: (name != OURS, name in CONTROLS, name))


def method(name: str, density: float, **options: Any) -> Policy:
    """The method with its defaults at this density, sparse at any length."""
    knobs = {"density": density, "min_tokens": 1, "max_density": 1.0,
             **WITHOUT_PLAN.get(name, {}), **options}
    return methods()[name](**knobs)
