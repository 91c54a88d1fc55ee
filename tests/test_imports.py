"""Who may import whom. Arrows point one way, so that each part can be read and tested without the rest."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainer", "model", "data_tools")
FROM_DATA_TOOLS = {"data_tools.sample_format", "data_tools.rle"}  # the format's contract; no packer, no sources
FOR_LOOP = {
    "trainer.checkpoint",
    "trainer.data.batches",
    "trainer.distributed",
    "trainer.guard",
    "trainer.metrics",
    "trainer.parallel.engine",
    "trainer.run_files",
    "trainer.tracing",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Modules of ours that `module` imports, at its top or inside a function."""
    return ours_in(MODULES[module].read_text(), module)


def ours_in(source: str, module: str = "trainer.example") -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            # `from data_tools import rle` names a module, `from data_tools.rle import area` a function of one.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] in PACKAGES}


def test_the_reader_sees_every_form_of_import():
    source = (
        "from data_tools import rle, pack\nimport model.sam\ndef f():\n    from trainer.loop import train\nimport os\n"
    )
    assert ours_in(source) == {"data_tools.rle", "data_tools.pack", "model.sam", "trainer.loop"}


def test_all_modules_are_found():
    assert len(MODULES) >= 40
    assert {"trainer.loop", "model.sam", "data_tools.rle"} <= MODULES.keys()


@pytest.mark.parametrize("package", ["model", "data_tools"])
def test_networks_and_data_tools_stand_alone(package):
    outside = {
        module: strange
        for module in MODULES
        if module.split(".")[0] == package
        and (strange := {name for name in imports_of(module) if name.split(".")[0] != package})
    }
    assert not outside


def test_the_data_tools_need_no_torch():
    for module, path in MODULES.items():
        if module.split(".")[0] == "data_tools":
            names = {
                name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            }
            assert not {name for name in names if name and name.split(".")[0] in ("torch", "torchvision")}, module


def test_the_trainer_knows_only_the_format_of_the_data_tools():
    for module in MODULES:
        if module.split(".")[0] == "trainer":
            used = {name for name in imports_of(module) if name.split(".")[0] == "data_tools"}
            assert used <= FROM_DATA_TOOLS, module


def test_the_loop_knows_no_task_network_pipeline_or_backend():
    assert imports_of("trainer.loop") <= FOR_LOOP


def test_no_import_cycles():
    arrows = {module: imports_of(module) & MODULES.keys() - {module} for module in MODULES}
    while True:
        leaves = {module for module, targets in arrows.items() if not targets & arrows.keys()}
        if not leaves:
            break
        arrows = {module: targets for module, targets in arrows.items() if module not in leaves}
    assert not arrows, f"in cycles, or above one: {sorted(arrows)}"
