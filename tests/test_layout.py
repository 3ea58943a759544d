"""The package is what pyproject.toml says, its imports go one way, and its hosts name no method."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import featherlight

ROOT = Path(featherlight.__file__).parent
PARTS = ("plugins", "callbacks", "ssl_models", "fed_loop", "commands", "flower", "configs")
NOT_SHIPPED = {"tests", "benchmarks", "docs", "examples", "build", "dist", "runs"}


def sources(part: str) -> list[Path]:
    found = sorted((ROOT / part).rglob("*.py"))
    assert found, f"{part} has no modules"
    return found


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at any depth; relative imports and ``from featherlight import x`` resolved."""
    package = ["featherlight", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "featherlight":
                yield from (f"featherlight.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """Which parts of featherlight a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("featherlight.")}


def loaded_by(code: str) -> set[str]:
    """Top-level modules and modules of ours that a fresh interpreter has after ``code``."""
    show = "import sys; print('|'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.strip().splitlines()[-1].split("|"))


# -- packages ---------------------------------------------------------------------------------------------------------
def test_packages_listed_are_the_folders_that_are_packages() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")]
    shipped = [f for f in folders if not f.parts or (f.parts[0] not in NOT_SHIPPED and not f.parts[0].startswith("."))]
    assert len(listed) == len(set(listed))
    assert set(listed) == {".".join(["featherlight", *folder.parts]) for folder in shipped}


def test_every_module_lies_in_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for part in PARTS[:-1]:
        assert {".".join(["featherlight", *path.relative_to(ROOT).parent.parts]) for path in sources(part)} <= set(listed)


# -- arrows -----------------------------------------------------------------------------------------------------------
ALLOWED = {
    "plugins": {"plugins"},
    "callbacks": {"plugins", "callbacks"},
    "fed_loop": {"plugins", "fed_loop"},
    "ssl_models": {"plugins", "ssl_models"},
    "flower": {"plugins", "fed_loop", "commands", "flower"},
}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str) -> None:
    for path in sources(part):
        assert ours(path) <= ALLOWED[part], f"{path.name} imports {ours(path) - ALLOWED[part]}"


def test_plugins_need_torch_alone() -> None:
    for path in sources("plugins"):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"torch", "featherlight"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_nobody_imports_a_part_by_its_bare_name() -> None:
    for path in [*ROOT.glob("*.py"), *(path for part in PARTS[:-1] for path in sources(part)), *(ROOT / "tests").rglob("*.py")]:
        bare = {name.split(".")[0] for name in imports(path)} & set(PARTS)
        assert not bare, f"{path.relative_to(ROOT)} imports {bare}, which loads a second copy: write featherlight.…"


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "part").mkdir()
    path = tmp_path / "part" / "module.py"
    path.write_text(
        "import os, torch.nn as nn\nfrom featherlight import callbacks\nfrom . import sibling\nfrom ..fed_loop import wire\n"
        "def later():\n    from plugins import base\n"
    )
    assert set(imports(path)) == {"os", "torch.nn", "featherlight", "featherlight.callbacks", "featherlight.part"} | {
        "featherlight.fed_loop",
        "plugins",
    }
    assert ours(path) == {"callbacks", "part", "fed_loop"}


# -- what importing costs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["featherlight", "featherlight.cli"])
def test_importing_the_package_and_the_command_loads_nothing_heavy(name: str) -> None:
    assert not loaded_by(f"import {name}") & {"torch", "lightning", "numpy", "timm", "lightly", "jsonargparse"}


def test_importing_plugins_loads_torch_and_no_other_library() -> None:
    loaded = loaded_by("import featherlight.plugins, featherlight.plugins.step_cost, featherlight.plugins.cost_table")
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "lightning_fabric", "lightly", "torchvision", "timm", "torchmetrics"}


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys\nfrom featherlight.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("fit", "validate", "test", "federate", "flower", "cost", "compare"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE), f"--help does not tell of {command}"


# -- hosts name no method ---------------------------------------------------------------------------------------------
METHODS = re.compile(
    r"layer[ _-]?(freezing|wise)|\bfreezing\b|depth[ _-]?dropout|growth|width[ _-]?adapter|\bStaged\b|prism|intrinsic"
    r"|ecofed|partitioned[ _-]?training|quantiz|top[ _-]?k\b|fetch[ _-]?sgd"
    r"|client[ _-]?privacy|alignment|proximal|fed[ _-]?prox|\bmoon\b|fed[ _-]?ema"
    r"|\b(every|rate|max_kept|blocks|blocks_per_stage|periods_per_stage|warmup_periods|grow|init|adapters|rank|keep)=",
    re.IGNORECASE,
)
HOSTS = [
    *sources("fed_loop"),
    *sources("flower"),
    *(ROOT / "callbacks" / f"{name}.py" for name in ("cost_monitor", "draws", "epoch_counts", "fresh_start", "host", "parallel", "saved")),
]


@pytest.mark.parametrize("path", HOSTS, ids=lambda p: p.name)
def test_hosts_name_no_method_and_no_argument_of_one(path: Path) -> None:
    assert not [found.group() for found in METHODS.finditer(path.read_text())]


def test_every_callback_is_a_host_or_named_after_its_method() -> None:
    methods = {path.name for path in sources("plugins") if METHODS.search(path.stem)}
    assert {path.name for path in sources("callbacks")} == {path.name for path in HOSTS if path.parent.name == "callbacks"} | {
        "__init__.py",
        *(path.name for path in sources("callbacks") if path.name in methods),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("LayerFreezing", "layer_freezing", "layer-wise", "DepthDropout", "depth-dropout", "ProgressiveGrowth", "WidthAdapter", "PriSM"),
        *("prism.factors", "IntrinsicSubspace", "EcoFed", "PartitionedTraining", "(every='round')", "grow=False", "rate=0.5"),
        *("Quantization", "TopK", "top_k", "FetchSGD", "RepresentationAlignment", "Proximal", "MOON", "fed_ema", "FedEMA"),
        *("ClientPrivacy", "client_privacy"),
    ],
)
def test_the_pattern_finds_the_methods(name: str) -> None:
    assert METHODS.search(f"x = {name}")


@pytest.mark.parametrize("name", ["evaluate_every=2", "trains and is frozen", "the model's own dropout", "the run may grow", "lr_rate=1"])
def test_the_pattern_leaves_other_words_alone(name: str) -> None:
    assert not METHODS.search(name)


# -- docstrings -------------------------------------------------------------------------------------------------------
def undocumented(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return ([] if ast.get_docstring(tree) else [path.name]) + [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", sources("plugins"), ids=lambda p: p.name)
def test_public_names_of_plugins_have_docstrings(path: Path) -> None:
    assert not undocumented(path)


def test_every_verb_of_the_contract_is_explained() -> None:
    plugin = next(
        n for n in ast.parse((ROOT / "plugins" / "base.py").read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Plugin"
    )
    verbs = [node for node in plugin.body if isinstance(node, ast.FunctionDef)]
    assert len(verbs) >= 12
    assert not [verb.name for verb in verbs if not ast.get_docstring(verb)]
