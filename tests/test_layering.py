"""Who may import whom; see CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {
    "lit_models._compat",
    "lit_models._lazy",
    "lit_models._ranks",
    "lit_models.nn.clipping",
    "lit_models.recording",
    "lit_models.shards",
    "lit_models.signals",
    "lit_models.slurm",
    "lit_models.tokenization",
}
METHODS = sorted(path.parent.name for path in (ROOT / "lit_models").glob("*/module.py"))
FILES = sorted(
    path for package in ("lit_models", "datamodules", "callbacks") for path in (ROOT / package).rglob("*.py")
)


def imports(path):
    """Full names of all modules that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(path, name):
    """Whether a file must not import a module."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    top, package = name.split(".")[0], inside[0]
    if package in ("datamodules", "callbacks"):
        other = {"datamodules", "callbacks"} - {package}
        is_leaf = name == "lit_models" or any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES)
        return top in other or (top == "lit_models" and not is_leaf)
    if inside == ("lit_models", "cli"):
        return False
    if top in ("datamodules", "callbacks"):
        return True
    if inside[-1] in ("modeling", "functional") or inside[1] == "nn":
        return top == "lightning"
    if inside[1] in METHODS:
        others = {method for method in METHODS if method != inside[1]}
        return name.split(".")[:2] in [["lit_models", method] for method in others]
    return name.split(".")[:2] in [["lit_models", method] for method in METHODS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_their_layer(path):
    assert [name for name in imports(path) if forbidden(path, name)] == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("datamodules/prompts.py", "lit_models.ppo"),
        ("datamodules/prompts.py", "callbacks.rng"),
        ("callbacks/kl.py", "datamodules"),
        ("lit_models/ppo/module.py", "lit_models.reward.module"),
        ("lit_models/ppo/functional.py", "lightning.pytorch"),
        ("lit_models/nn/scoring.py", "lightning"),
        ("lit_models/base.py", "lit_models.ppo"),
    ],
)
def test_the_rules_forbid_what_they_should(file, name):
    assert forbidden(ROOT / file, name)


def test_methods_are_found():
    assert {"ppo", "reward", "sft"} <= set(METHODS)


def top_level(path):
    """Names of the modules that importing a file imports, in order."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torchaudio_is_repaired_before_transformers_is_imported(path):
    names = list(top_level(path))
    needing = [
        number for number, name in enumerate(names) if name.split(".")[0] in ("transformers", "diffusers", "torchaudio")
    ]
    assert not needing or "lit_models._compat" in names[: needing[0]]
