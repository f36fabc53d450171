"""Import arrows point down, and the core needs neither TensorFlow nor torch."""

import ast
import subprocess
import sys

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "invideo_jax"

# What stands in a row may import rows below it, and within its own row; nothing above.
LAYERS = (
    ("train", "evaluate", "features", "search", "teacher_cache", "tokenizer"),
    ("run",),
    ("checks",),
    ("stage_words",),
    ("build", "teaching", "stage_start", "protocols"),
    ("programs",),
    ("report",),
    ("evals",),
    ("handover",),
    ("steps", "scale", "interop", "explain"),
    ("models",),
    (
        "masking",
        "mixing",
        "text_masking",
        "negatives",
        "pairs",
        "ring",
        "losses",
        "optim",
        "state",
        "sharding",
        "towers",
    ),
    (
        "checkpoint",
        "checkpoint_list",
        "digests",
        "feature_store",
        "metrics",
        "progress",
        "stored",
        "tensorboard",
    ),
    ("workdir", "command_line"),
    ("runtime",),
    ("data",),
    ("config", "stages"),
    ("registry", "errors"),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def imported_by(file) -> set[str]:
    """Parts of the package that a file imports, by the first name below invideo_jax."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("invideo_jax.")}
    return found


def part_of(file) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_arrows_point_down():
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if part_of(f) != "__init__"]
    assert {part_of(f) for f in files} == RANK.keys(), "every part has its place in LAYERS"
    wrong = []
    for file in files:
        part = part_of(file)
        wrong += [
            f"{file.relative_to(PACKAGE)} imports {other}"
            for other in imported_by(file)
            if RANK[other] < RANK[part]
        ]
    assert not wrong


def test_only_command_lines_see_the_config_object():
    readers = {part_of(f) for f in PACKAGE.rglob("*.py") if "ml_collections" in f.read_text()}
    commands = {"train", "evaluate", "protocols", "teacher_cache"}
    assert readers <= commands | {
        "config",
        "build",
        "programs",
        "checks",
        "run",
        "stage_start",
        "stage_words",
    }


def test_data_imports_no_jax():
    for file in (PACKAGE / "data").rglob("*.py"):
        text = file.read_text()
        names = {
            (a.name if isinstance(n, ast.Import) else n.module or "").split(".")[0]
            for n in ast.walk(ast.parse(text))
            if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names
        }
        assert not names & {"jax", "jaxlib", "flax", "optax", "orbax"}, file


def test_core_runs_without_tensorflow_and_torch():
    """Everything but the extras imports with both blocked."""
    modules = sorted(
        ".".join(("invideo_jax", *f.relative_to(PACKAGE).with_suffix("").parts))
        for f in PACKAGE.rglob("*.py")
        # torch_model is copied into exports, where it is PyTorch's; the package runs it only there.
        if f.stem not in ("__init__", "__main__", "torch_model")
    )
    blocked = "tensorflow", "torch", "torchvision", "transformers", "tokenizers", "tensorboardX"
    blocked += ("matplotlib",)
    program = (
        "import sys, importlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('imported', len([m for m in sys.modules if m.startswith('invideo_jax')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= len(modules)
