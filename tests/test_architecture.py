"""The shape of the house: what may import what, and names that must stay free."""

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastdiff"

# from the bottom up: a part, and the parts below it that it may import. Every part of the package
# is in this table; a new one gets its place here.
ARROWS: dict[str, set[str]] = {
    # plain data, tensors and ints
    "clock": set(),
    "layout": set(),
    "blockmask": set(),
    "report": set(),
    "kernels": set(),
    # what enable takes, and what a method enters
    "method": {"clock", "report"},
    # how a class is swapped; knows no attention
    "shadow": set(),
    # adds the two pipeline methods; finds api by name, when a user calls one
    "attach": set(),
    # the clock's side of a scheduler
    "scheduler": {"clock"},
    # finds shipped weights
    "models": set(),
    "policies": {"clock", "layout", "blockmask", "kernels", "method"},
    "attention": {"clock", "layout", "blockmask", "report", "kernels", "policies"},
    "gradients": {"attention"},
    "seam": {"shadow", "layout", "attention", "gradients"},
    "pipelines": {"clock", "layout", "method", "scheduler", "kernels", "shadow", "policies",
                  "seam"},
    # methods that work on fewer tokens
    "tokens": {"clock", "layout", "blockmask", "method", "kernels", "shadow", "attention", "seam"},
    # presets and plans turn names into methods; finds their files by name
    "config": {"method"},
    # what is on, and how it is taken out
    "handle": {"clock", "report", "method", "policies", "config", "scheduler", "shadow",
               "attention", "seam", "pipelines"},
    "api": {"clock", "method", "policies", "config", "scheduler", "shadow", "attention", "seam",
            "pipelines", "handle"},
    # plans found by real runs
    "calibration": {"api", "method", "policies", "layout", "kernels"},
    # one call at a larger size
    "upscale": {"api", "pipelines"},
    # the names that a user sees: attach at once, the rest when asked for
    "__init__": {"attach", "api", "method", "policies", "tokens", "pipelines", "upscale"},
    "cli": {"__init__", "api", "method", "config", "policies", "kernels", "models", "report",
            "layout", "calibration"},
    # many jobs, with the steps of generate; the command line finds it by name
    "batch": {"__init__", "config", "models", "cli"},
    # the page in a browser; the command line finds it by name
    "demo": {"__init__", "api", "batch", "cli", "config", "kernels", "layout", "method", "models",
             "policies", "report"},
}
# who may import these, besides the standard library and torch
MAY_IMPORT = {
    "diffusers": {"shadow", "seam", "pipelines", "models", "tokens", "api", "cli", "batch"},
    "transformers": {"pipelines", "models", "cli"},
    "triton": {"kernels"},
    "safetensors": {"tokens"},
    "typer": {"cli", "batch"},
    "rich": {"cli", "batch"},
    "imageio": {"cli"},
    "imageio_ffmpeg": {"cli"},
    "PIL": {"cli", "batch", "demo"},
    "numpy": {"cli", "report", "upscale", "demo"},
    "gradio": {"demo"},
}
HEAVY = ("torch", "diffusers", "transformers", "triton")
MOST_LINES = 300
# longer, on purpose: the one op, told in one place
LONG = {"fastdiff.attention"}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def _walk() -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk of the package without examples: scripts to copy, which nothing imports."""
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "examples"]
        yield folder, folders, files


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the links are followed."""
    found = {}
    for folder, _, files in _walk():
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
each_module = pytest.mark.parametrize("module", sorted(MODULES))


def _part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def _imports(module: str) -> list[tuple[str, bool]]:
    """(dotted name, whether it is imported only inside a function), relative names resolved."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    home = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = home.split(".")[: len(home.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append((whole if whole in MODULES else base, id(node) in lazy))
    return found


def test_the_links_lead_to_the_folders():
    for name in ("kernels", "pipelines", "demo"):
        link = PACKAGE / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert "fastdiff.kernels.block_sparse_attention" in MODULES
    assert "fastdiff.pipelines.families" in MODULES


def test_the_table_itself_points_down():
    below: set[str] = set()
    for part, may in ARROWS.items():
        assert may <= below, f"{part} is listed below {sorted(may - below)}"
        below.add(part)


@each_module
def test_imports_point_down(module):
    part = _part(module)
    assert part in ARROWS, f"give {part} a place in ARROWS"
    for name, _ in _imports(module):
        if name.split(".")[0] == "fastdiff":
            other = _part(name)
            assert other == part or other in ARROWS[part], f"{module} imports {name}"


@each_module
def test_third_parties_stay_in_their_rooms(module):
    for name, _ in _imports(module):
        top = name.split(".")[0]
        if top in ("fastdiff", "torch") or top in sys.stdlib_module_names:
            continue
        if _part(module) == "models" and top in ("safetensors", "accelerate"):
            continue
        assert top in MAY_IMPORT, f"{module} imports {name}, which has no line in MAY_IMPORT"
        assert _part(module) in MAY_IMPORT[top], f"{module} imports {name}"


@each_module
def test_heavy_imports_are_lazy(module):
    """triton in kernel files alone; diffusers inside functions; the command line needs neither."""
    for name, lazy in _imports(module):
        top = name.split(".")[0]
        if top == "triton":
            assert lazy or module.endswith("_kernel"), f"{module} imports {name} at import"
        if name.endswith("_kernel"):
            assert lazy or module.endswith("_kernel"), f"{module} imports {name} at import"
        if top in ("diffusers", "transformers"):
            assert lazy or _part(module) == "pipelines", f"{module} imports {name} at import"
        if top == "torch" and _part(module) in ("cli", "attach", "models", "__init__"):
            assert lazy, f"{module} imports {name} at import"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if ".kernels." in m))
def test_kernels_know_tensors_only(module):
    operation = ".".join(module.split(".")[:3])
    own = module.rpartition(".")[2]
    for name, _ in _imports(module):
        if not name.startswith("fastdiff"):
            continue
        assert name.startswith("fastdiff.kernels."), f"{module} imports {name}"
        if not name.startswith(operation):
            # another operation, by its public face
            assert len(name.split(".")) == 3, f"{module} imports {name}"
        # an implementation never leans on another one, least of all on the reference
        other = name.rpartition(".")[2]
        if own.endswith("_impl") or own == "reference":
            assert other != "reference" and not other.endswith("_impl"), f"{module} imports {name}"


@each_module
def test_names_say_something(module):
    assert not NAMES_THAT_SAY_NOTHING & set(module.split("."))


@each_module
def test_files_stay_readable(module):
    if module.endswith("_kernel") or module in LONG:
        return
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{module} has {lines} lines; split it, or say why in LONG"


def test_importing_fastdiff_is_light():
    program = (f"import sys, fastdiff; loaded = [n for n in {HEAVY} if n in sys.modules]; "
               "sys.exit(f'imported: {loaded}' if loaded else 0)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_kernels_is_no_top_level_package():
    """A regular package there, with the repository on the path, would hide Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "pipelines"):
        program = (
            "import sys, importlib.util as u; sys.path = [p for p in sys.path if p]; "
            f"s = u.find_spec({name!r}); print(s.origin if s and s.origin else '')"
        )
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([sys.executable, "-c", program], cwd="/", env=env, check=True,
                              capture_output=True, text=True)
        origin = done.stdout.strip()
        assert not origin or origin.startswith(sysconfig.get_paths()["purelib"])
    spec = importlib.util.find_spec("kernels")
    # a folder without __init__ yields to a real package anywhere on the path, and to a module such
    # as benchmarks/kernels.py, which tests of the benchmarks put there
    ours = str(ROOT / "kernels") + os.sep
    assert spec is None or spec.origin is None or not spec.origin.startswith(ours)


def test_packages_are_all_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    holding = {".".join(path.relative_to(ROOT).parent.parts) for folder, _, files in
               _walk() for path in (Path(folder, f) for f in files)
               if path.suffix == ".py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == holding
    assert len(settings["tool"]["setuptools"]["packages"]) == len(holding)
    folders = settings["tool"]["setuptools"]["package-dir"]
    assert folders == {"fastdiff": "fastdiff", "fastdiff.kernels": "kernels",
                       "fastdiff.pipelines": "pipelines", "fastdiff.demo": "demo"}


def test_every_family_and_method_is_found():
    from fastdiff.pipelines.families import families
    from fastdiff.policies import methods

    names = {path.stem for path in (ROOT / "pipelines" / "families").glob("*.py")}
    assert len(families()) == len(names - {"__init__", "base", "generic"})
    assert {"tile-sparse", "random-blocks"} <= set(methods())
    for name, policy in methods().items():
        assert name == policy.name == name.lower() and policy.summary
        assert policy().to_dict()["method"] == name
