"""Who may import whom, and what an import loads."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = "logsync.coordinator"
RANKS = "logsync.workers"
# What decides at the root has no clock, thread, file, environment or chance.
IMPURE = frozenset({
    "_thread", "asyncio", "concurrent", "contextvars", "ctypes", "datetime", "fcntl", "glob", "io", "logging",
    "multiprocessing", "os", "pathlib", "queue", "random", "resource", "sched", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "uuid",
})  # fmt: skip
LIBRARIES = frozenset({"torch", "ray", "numpy", "rich"})


def modules(package: str) -> dict[str, ast.Module]:
    """The syntax trees of the package's installed files, by module name."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = {Path(location).resolve() for location in spec.submodule_search_locations}
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join([package, *(part for part in parts if part != "__init__")])
        found[name] = ast.parse(path.read_text(), str(path))
    assert len(found) >= 10, f"{folder} is not the package"
    return found


def imports(tree: ast.AST, *, at_import_only: bool = False) -> set[str]:
    """The full names of everything imported, also under TYPE_CHECKING and inside functions unless said otherwise."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and at_import_only:
            continue
        elif not (at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            names |= imports(node, at_import_only=at_import_only)
    return names


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


COORDINATOR = modules(ROOT)
WORKERS = modules(RANKS)
EVERYTHING = {**COORDINATOR, **WORKERS}
DECIDING = {n: tree for n, tree in COORDINATOR.items() if n != f"{ROOT}.host" and not n.startswith(f"{ROOT}.sinks")}


@pytest.mark.parametrize("module", COORDINATOR)
def test_the_coordinator_never_imports_the_workers(module: str) -> None:
    assert not any(name.startswith(RANKS) for name in imports(COORDINATOR[module]))


@pytest.mark.parametrize("module", DECIDING)
def test_what_decides_has_no_clock_thread_file_or_environment_and_no_library(module: str) -> None:
    names = imports(DECIDING[module])

    assert not top(names) & (IMPURE | LIBRARIES)
    assert not any(name.startswith((f"{ROOT}.host", f"{ROOT}.sinks")) for name in names)


def test_what_decides_reads_no_file_and_no_input() -> None:
    for module, tree in DECIDING.items():
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"open", "input", "print", "exec", "eval", "__import__"}, module


ALLOWED = {
    "errors": set(),
    "frequency": set(),
    "messages": {"errors"},
    "lease": {"frequency", "messages", "errors"},
    "reduction": {"messages", "errors"},
    "rounds": {"messages", "errors"},
    "waits": {"messages", "errors"},
    "followers": {"reduction", "messages", "errors"},
    "core": {"frequency", "lease", "rounds", "reduction", "waits", "followers", "messages", "errors"},
    "memory": {"core", "rounds", "followers", "messages", "errors"},
}


@pytest.mark.parametrize("module", ALLOWED)
def test_the_core_stands_on_what_is_below_it_only(module: str) -> None:
    tree = COORDINATOR[f"{ROOT}.{module}"]
    below = {name.split(".")[2] for name in imports(tree) if name.startswith(f"{ROOT}.")}

    assert below <= ALLOWED[module]
    assert not {name for name in imports(tree) if name.startswith("logsync.") and not name.startswith(f"{ROOT}.")}


def test_every_deciding_module_has_its_rule() -> None:
    assert set(DECIDING) == {f"{ROOT}.{module}" for module in ALLOWED}


# The collective transport, and what it alone loads; and that of Ray.
COLLECTIVE = {f"{RANKS}.transports.collective", f"{RANKS}.transports.gloo"}
RAY = {f"{RANKS}.transports.ray_actor"}
# The command line's trial of the ranks has no script that would make their process group.
TRIAL = {f"{RANKS}.cli.roundtrip"}


def test_only_the_collective_transport_and_the_doctors_trial_know_torch_distributed() -> None:
    assert {
        m for m, tree in EVERYTHING.items() if any(n.startswith("torch.distributed") for n in imports(tree))
    } == COLLECTIVE | TRIAL

    for module, tree in EVERYTHING.items():
        if module not in COLLECTIVE:
            assert not imports(tree, at_import_only=True) & COLLECTIVE, f"{module} loads it before it is chosen"


def test_no_other_module_imports_torch_or_ray_by_itself() -> None:
    at_import = {m: top(imports(tree, at_import_only=True)) for m, tree in EVERYTHING.items()}

    assert {m for m, names in at_import.items() if "torch" in names} == COLLECTIVE
    assert not {m for m, names in at_import.items() if "numpy" in names}
    assert {m for m, tree in EVERYTHING.items() if "ray" in top(imports(tree))} == RAY
    for module, tree in EVERYTHING.items():
        if module not in RAY:
            assert not imports(tree, at_import_only=True) & RAY, f"{module} loads it before it is chosen"
    assert {m for m, tree in EVERYTHING.items() if "torch" in top(imports(tree))} == {
        *COLLECTIVE,
        *TRIAL,
        f"{RANKS}.values",
    }


FRAMEWORKS = {
    "accelerate": {"accelerate"},
    "huggingface": {"transformers"},
    "lightning": {"lightning", "pytorch_lightning"},
}


def test_each_integration_imports_its_own_framework_and_nothing_else_imports_any() -> None:
    every = set().union(*FRAMEWORKS.values())
    found = {m: top(imports(tree)) & every for m, tree in EVERYTHING.items() if top(imports(tree)) & every}

    assert found == {f"{RANKS}.integrations.{name}": libraries for name, libraries in FRAMEWORKS.items()}
    for module, tree in EVERYTHING.items():
        if not module.startswith(f"{RANKS}.integrations"):
            assert not {name for name in imports(tree) if name.startswith(f"{RANKS}.integrations")}, module


def test_no_pickle_and_no_eval_anywhere() -> None:
    for module, tree in EVERYTHING.items():
        assert not top(imports(tree)) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, module
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"eval", "exec", "compile"}, module


def test_imports_name_the_installed_package() -> None:
    for module, tree in EVERYTHING.items():
        assert not top(imports(tree)) & {"coordinator", "workers"}, module


# In a fresh interpreter


def python(*arguments: str, folder: Path) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=60, cwd=folder
    )
    return ran.stdout.strip()


@pytest.mark.parametrize(
    "module", [RANKS, f"{RANKS}.training_log", f"{ROOT}.core", f"{ROOT}.host", f"{ROOT}.frequency"]
)
def test_importing_loads_neither_torch_nor_ray_nor_numpy(module: str, tmp_path: Path) -> None:
    script = (
        f"import sys, threading, logging, {module}\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & {'torch', 'ray', 'numpy', 'rich'}\n"
        "print(*loaded, threading.active_count(), logging.getLogger().handlers, logging.getLogger('logsync').handlers)"
    )

    assert python("-c", script, folder=tmp_path) == "1 [] []"


def test_a_users_own_workers_and_coordinator_do_not_disturb_and_are_not_disturbed(tmp_path: Path) -> None:
    for name in ("workers", "coordinator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = 'my own {name}'\n")
    (tmp_path / "train.py").write_text(
        "import workers, coordinator\n"
        "from logsync.workers import connect\n"
        "import logsync.coordinator.core\n"
        "import workers as again\n"
        "with connect(10, sinks=[]) as log:\n"
        "    print(log.log_ready(0), workers.mine, again.mine, coordinator.mine, sep=', ')\n"
    )

    assert python("train.py", folder=tmp_path) == "True, my own workers, my own workers, my own coordinator"


def test_nothing_is_installed_beside_logsync(tmp_path: Path) -> None:
    script = (
        "import importlib.util\n"
        "print(*(importlib.util.find_spec(name) for name in ('workers', 'coordinator', 'scripts', 'tests')))"
    )
    assert python("-c", script, folder=tmp_path) == "None None None None"

    try:
        files = importlib.metadata.distribution("logsync").files or []
    except importlib.metadata.PackageNotFoundError:
        return  # run from a checkout; ./scripts/test installs it
    tops = {file.parts[0] for file in files if file.parts[0] != ".."}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"logsync"}
    installed = {str(file) for file in files}
    assert {"logsync/coordinator/py.typed", "logsync/workers/py.typed"} <= installed
    assert "logsync/__init__.py" not in installed
