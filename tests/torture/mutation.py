"""How many faults the tests notice: small changes to the code, one at a time, each with the quick tests of its folder.

    python tests/torture/mutation.py [maths algorithms evaluation] [--count 150] [--seed 0]

A process that has torch already is forked for each mutant, and imports mopo_cli anew with one module changed in memory:
no file is written. A mutant is killed where a test fails, or does not end. Those in equivalent.txt change nothing
that can be seen, and are left out. Exit status 1 where less than nine tenths of the mutants of maths/ are killed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mopo_cli"
GOAL = 0.9
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
FOLDERS = ("maths", "algorithms", "evaluation")
TESTS = {  # of files that begin so, the longest beginning first; a file's own test file stands in front
    "maths/oracle.py": ("tests/maths/test_oracle.py",),
    "maths/bounds.py": ("tests/algorithms/test_mopo_math.py", "tests/algorithms/test_mopo_paper.py"),
    "maths/estimates.py": ("tests/algorithms/test_mopo_math.py", "tests/judging/test_judging.py"),
    "maths/pareto.py": ("tests/planning/test_structures.py", "tests/report/test_report.py"),
    "maths": ("tests/maths",),
    "algorithms/mopo": tuple(
        f"tests/algorithms/test_mopo_{name}.py" for name in ("math", "paper", "rows", "conditioned")
    ),
    "algorithms/conditioned": ("tests/algorithms/test_conditioned.py",),
    "algorithms/pairwise": tuple(
        f"tests/algorithms/test_{name}.py" for name in ("dpo", "modpo", "mapl", "soups", "instructions")
    ),
    "algorithms": ("tests/algorithms",),
    "evaluation": ("tests/evaluation",),
}
SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.MatMult: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
OPPOSITE = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "mean": "sum", "floor": "ceil"}
OPPOSITE |= {new: old for old, new in OPPOSITE.items()}


@dataclass(frozen=True)
class Mutant:
    """One change: the node with this number in `ast.walk` order, and which of its changes."""

    path: Path
    node: int
    variant: int
    name: str  # "maths/bounds.py lower_bound: f.min(-1) -> f.max(-1)", the same wherever the line stands


# --------------------------------------------------------------------------------------------- changes
def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
        other = copy.deepcopy(node)
        other.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
        yield other
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[place] = SWAPPED[type(operator)]()  # type: ignore[call-overload]
            yield other
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield copy.deepcopy(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield ast.Constant(
            not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value + 0.1
        )
    if isinstance(node, ast.Name | ast.Attribute):
        word = node.id if isinstance(node, ast.Name) else node.attr
        if word in OPPOSITE:
            other = copy.deepcopy(node)
            setattr(other, "id" if isinstance(node, ast.Name) else "attr", OPPOSITE[word])
            yield other
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        other = copy.deepcopy(node)
        other.test = ast.UnaryOp(ast.Not(), other.test)
        yield other
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def left_out(tree: ast.AST) -> set[int]:
    """Nodes that no test should see: annotations, decorators, messages, and flags that only guard."""
    found: set[int] = set()

    def leave(node: ast.AST | None) -> None:
        if node is not None:
            found.update(id(inner) for inner in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            leave(node.annotation)
        if isinstance(node, ast.AnnAssign | ast.Assert):  # of settings: conf/ sets what stands there
            leave(node)
        if isinstance(node, ast.FunctionDef):
            leave(node.returns)
        for decorator in getattr(node, "decorator_list", ()):
            leave(decorator)
        if isinstance(node, ast.JoinedStr | ast.Raise):
            leave(node)
        if isinstance(node, ast.keyword) and node.arg in ("strict", "dtype", "slots", "frozen", "repr", "init"):
            leave(node)
        if isinstance(node, ast.With):
            for item in node.items:
                leave(item.context_expr)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            leave(node)
    return found


def mutants_of(path: Path) -> list[Mutant]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skip, where = left_out(tree), _places(tree)
    short = path.relative_to(PACKAGE)
    return [
        Mutant(path, number, variant, f"{short} {where.get(id(node), '')}: {_line(node)} -> {_line(changed)}")
        for number, node in enumerate(ast.walk(tree))
        if id(node) not in skip
        for variant, changed in enumerate(changes(node))
    ]


def _places(tree: ast.AST) -> dict[int, str]:
    """The innermost function or class around each node, with the statement it is part of."""
    places: dict[int, str] = {}
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.ClassDef):
            for statement in outer.body:
                places.update({id(node): f"{outer.name} [{_line(statement)[:60]}]" for node in ast.walk(statement)})
    return places


def _line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def code_of(mutant: Mutant) -> CodeType:
    """The module with the change."""
    tree = ast.parse(mutant.path.read_text(encoding="utf-8"))
    target = list(ast.walk(tree))[mutant.node]
    changed = list(changes(target))[mutant.variant]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.copy_location(changed, node) if node is target else self.generic_visit(node)

    put = Put().visit(tree)
    assert isinstance(put, ast.Module)
    return compile(ast.fix_missing_locations(put), str(mutant.path), "exec")


# --------------------------------------------------------------------------------------------- runs
class Changed(SourceFileLoader):
    def __init__(self, name: str, path: str, code: CodeType):
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class Finder(MetaPathFinder):
    """Finds one module changed."""

    def __init__(self, name: str, path: Path, code: CodeType):
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return spec_from_file_location(name, self.path, loader=Changed(name, str(self.path), self.code))


def tests_of(path: Path) -> tuple[str, ...]:
    """The quick tests of a file."""
    short = path.relative_to(PACKAGE).as_posix()
    tests = TESTS[max((start for start in TESTS if short.startswith(start)), key=len)]
    own = f"tests/{short.split('/')[0]}/test_{path.stem}.py"
    return tuple(dict.fromkeys([own, *tests] if (ROOT / own).exists() else tests))


def survives(mutant: Mutant | None, tests: Sequence[str], limit: float = 3600.0) -> bool:
    """Whether all tests pass in so many seconds, in a process of their own; without a mutant, of the code as it is."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        _become(mutant, tests)
    started = time.monotonic()
    while time.monotonic() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _become(mutant: Mutant | None, tests: Sequence[str]) -> None:
    import pytest

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    status = 1
    try:
        for name in [name for name in sys.modules if name.split(".")[0] == "mopo_cli"]:
            del sys.modules[name]
        if mutant is not None:
            name = ".".join(mutant.path.relative_to(ROOT).with_suffix("").parts)
            sys.meta_path.insert(0, Finder(name, mutant.path, code_of(mutant)))
        with tempfile.TemporaryDirectory() as place:
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = place
            status = pytest.main(
                ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={place}/t", *tests]
            )
    finally:
        os._exit(int(status))


def warm() -> None:
    """What tests import besides, once for all."""
    import hypothesis  # noqa: F401

    for name in ("pipeline.train", "commands.eval", "planning.tabular", "report.build"):
        importlib.import_module(f"mopo_cli.{name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--count", type=int, default=150, help="mutants of a folder, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="those whose name contains this")
    asked = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    equivalent = {line for line in lines if line and not line.startswith("#")}
    warm()
    shares = {folder: share_killed(folder, asked, equivalent) for folder in asked.folders}
    return 1 if shares.get("maths", 1.0) < GOAL else 0


def share_killed(folder: str, asked: argparse.Namespace, equivalent: set[str]) -> float:
    """Prints what became of each drawn mutant, and the share that a test noticed."""
    paths = [path for path in sorted((PACKAGE / folder).rglob("*.py")) if path.stem != "figures"]  # looks
    found = [mutant for path in paths for mutant in mutants_of(path)]
    found = [mutant for mutant in found if mutant.name not in equivalent and asked.only in mutant.name]
    drawn = random.Random(asked.seed).sample(found, min(asked.count, len(found)))
    limits: dict[tuple[str, ...], float] = {}
    killed = 0
    for mutant in drawn:
        tests = tests_of(mutant.path)
        if tests not in limits:
            limits[tests] = limit_of(tests)
        noticed = not survives(mutant, tests, limits[tests])
        killed += noticed
        print(f"{'killed' if noticed else 'SURVIVED'}: {mutant.name}", flush=True)
    share = killed / max(1, len(drawn))
    print(f"{folder}: {share:.1%} of {len(drawn)} mutants killed (of {len(found)}; seed {asked.seed})", flush=True)
    return share


def limit_of(tests: tuple[str, ...]) -> float:
    """Seconds that these tests may take: some times what they take of the code as it is, on which they must pass."""
    started = time.monotonic()
    if not survives(None, tests):
        raise SystemExit(f"they fail on the code as it is: {' '.join(tests)}")
    return 30.0 + 4.0 * (time.monotonic() - started)


if __name__ == "__main__":
    raise SystemExit(main())
