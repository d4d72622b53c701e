"""The files around the package: requirements, README, what imports what, and nothing private in the
repository.
"""

import ast
import importlib.metadata as packages
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import isa_lite
from isa_lite.methods.fusion import FUSIONS
from isa_lite.world.scenes import render, sample_scenes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "isa_lite"

# From the ground up, as in the README. A folder imports only from floors above its own in this
# list, never from below.
PAPER = ("token_learner", "mappings", "prompt", "query_encoder", "losses", "targets", "distill")
FLOORS = [{"support"}, {"models", "world"}, set(PAPER), {"retrieval"}, {"methods"}]
FLOORS += [
    {"pretraining", "benchmarks", "analysis", "deploy"},
    {"course"},
    {"experiments"},
    {"commands"},
    {"__main__"},
]

# Where the name that is imported differs from the name that is installed.
DISTRIBUTION = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "sklearn": "scikit-learn",
    "IPython": "ipython",
    "skimage": "scikit-image",
}
DISTRIBUTION["faiss"] = "faiss-cpu"

# Put together here, so that this file does not contain them.
PRIVATE = ["/wo" + "rk/", "/ro" + "ot/", ".." + "/shared", "py" + "pi.org", "python" + "hosted.org"]


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def requirement_lines() -> list[str]:
    return [line for line in lines("requirements.txt") if line.strip() and not line.startswith("#")]


def requirements() -> list[str]:
    return [line.split("#")[0].strip() for line in requirement_lines()]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its dotted name below isa_lite, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, inside functions too; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"line {node.lineno}: a relative import; this package writes absolute ones"
            )
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def command_lines(heading: str) -> list[str]:
    """The lines of the first fenced block behind a heading of the README, as .ci/run reads them."""
    section = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M | re.S,
    )
    assert section, f"README.md has no heading '## {heading}'"
    block = re.search(r"^```\w*\n(.*?)^```$", section[1], re.M | re.S)
    assert block, f"README.md has no fenced block behind '## {heading}'"
    return block[1].splitlines()


def test_conda_and_pip_install_the_same():
    text = lines("environment.yml")
    start = text.index("  - pip:") + 1
    assert [
        line.strip().removeprefix("- ") for line in text[start:] if line.strip()
    ] == requirements()


@pytest.mark.parametrize("line", requirement_lines())
def test_a_requirement_has_a_lower_bound_and_a_reason(line):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+>=\d+(\.\d+)*  # \S.*", line)


def extras() -> set[str]:
    """Packages of the optional extras; modules that need one import it inside a function and say so
    where it is missing.
    """
    block = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)(?=^\[)",
        (ROOT / "pyproject.toml").read_text(),
        re.M | re.S,
    )
    return {name.lower() for name in re.findall(r'"([A-Za-z0-9_.-]+)>=', block[1])}


def at_the_top(tree: ast.Module) -> set[str]:
    """What is imported as soon as the module is."""
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in imported(ast.Module(statements, []))}


def test_what_an_extra_brings_is_imported_only_where_it_is_used():
    for name, tree in modules().items():
        assert not extras() & at_the_top(tree), (
            f"isa_lite/{name}.py cannot be imported without an extra"
        )


def test_what_the_package_imports_is_required():
    required = {re.split("[>=]", r)[0].lower() for r in requirements()} | extras()
    for name, tree in modules().items():
        tops = (
            {i.split(".")[0] for i in imported(tree)} - set(sys.stdlib_module_names) - {"isa_lite"}
        )
        missing = {top for top in tops if DISTRIBUTION.get(top, top).lower() not in required}
        assert not missing, (
            f"isa_lite/{name}.py imports {missing}, which requirements.txt does not list"
        )


def inside(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of this package that a module imports."""
    names = {i.removeprefix("isa_lite.") for i in imported(tree) if i.startswith("isa_lite.")}
    return {n if n in known else n.rpartition(".")[0] for n in names} - {name, ""}


def test_nothing_imports_upwards():
    """Folder by folder; the paper's own files, beside the folders, are one floor."""
    every = modules()
    found = {name: tree for name, tree in every.items() if not name.endswith("__init__")}
    floor = {place: number for number, places in enumerate(FLOORS) for place in places}
    assert {name.split(".")[0] for name in found} == set(floor), (
        "give each folder its place in FLOORS"
    )
    for name, tree in found.items():
        own = name.split(".")[0]
        for other in inside(name, tree, set(every)):
            place = other.split(".")[0]
            level = place == own or (place in PAPER and own in PAPER)
            assert level or floor[place] < floor[own], (
                f"isa_lite/{name} imports {other}, which does not stand on a floor below it"
            )


def test_no_modules_import_one_another_in_a_circle():
    found = modules()
    left = {name: inside(name, tree, set(found)) for name, tree in found.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"a circle among {sorted(left)}"


def test_a_function_fits_on_a_screen_and_a_line_holds_one_statement():
    """At most 60 lines, docstring included; `a(), b()` is no statement."""
    checked = 0
    for name, tree in modules().items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)), (
                f"isa_lite/{name}, line {node.lineno}: two statements, joined by a comma"
            )
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                checked += 1
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"isa_lite/{name}: {node.name} has {length} lines"
    assert checked > 500


def test_public_names_are_those_of_their_modules_and_hide_none():
    for name in isa_lite.__all__:
        assert getattr(isa_lite, name).__name__ == name
        assert not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()
    assert set(isa_lite.__all__) <= set(dir(isa_lite))
    with pytest.raises(AttributeError, match="nothing"):
        _ = isa_lite.nothing


def test_the_readme_answers_a_query_from_python(tmp_path, capsys):
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file, scene in zip(files, sample_scenes(12, seed=0), strict=True):
        render(scene).save(file)
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## One query from Python\n")[1]
    )
    lines = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    assert len(lines.strip().splitlines()) <= 11
    exec(
        lines.replace("FOLDER", str(tmp_path))
        .replace("MINE.png", str(files[0]))
        .replace('"data/', f'"{ROOT}/data/'),
        {},
    )
    answers = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert len(answers) == 5 and set(answers) <= {path.name for path in files}


def test_the_readme_lists_what_is_there():
    """Every folder of the package and every file beside them, once each."""
    listed = [
        found[1]
        for line in lines("README.md")
        if (found := re.match(r"    (\w+(?:\.py|/)) ", line))
    ]
    there = {
        p.name + "/" * p.is_dir()
        for p in PACKAGE.iterdir()
        if p.name not in ("__init__.py", "__pycache__")
    }
    assert sorted(n for n in listed if n in there) == sorted(there)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_the_readme_gives_one_line_to_paste(heading):
    (line,) = command_lines(heading)
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e . && ")


def portable(powershell: str) -> list[str]:
    """The commands of a line for PowerShell, as a line for Linux would hold them."""
    bare = (
        re.sub(r"if \(!\$LASTEXITCODE\) \{ (.*?) \}", r"\1", powershell)
        .replace("\\", "/")
        .replace(".venv/Scripts/", ".venv/bin/")
    )
    bare = (
        bare.replace("py -3 ", "python3 ")
        .replace("python -m pip ", "pip ")
        .replace("mkdir -Force", "mkdir -p")
        .replace(" | Out-Null", "")
    )
    return bare.split("; ")


@pytest.mark.parametrize("heading", ["Run it", "Test it", "The same versions for a whole class"])
def test_the_readme_gives_the_same_line_for_windows(heading):
    section = re.search(
        rf"^##+ {heading}\n(.*?)(?=^##|\Z)", "\n".join(lines("README.md")), re.M | re.S
    )[1]
    (linux,), (windows,) = (
        re.findall(rf"^```{kind}\n(.*?)\n```$", section, re.M | re.S)
        for kind in ("bash", "powershell")
    )
    assert "\n" not in linux + windows and portable(windows) == linux.split(" && ")
    assert windows.count("if (!$LASTEXITCODE)") == windows.count(r".venv\Scripts"), (
        "each step waits for the one before"
    )


def pins() -> dict[str, Version]:
    """The exact versions of constraints.txt, by the names that pip takes for equal."""
    found = [line for line in lines("constraints.txt") if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in found), (
        "a name and a version a line, no addresses"
    )
    return {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in found)
    }


def test_the_constraints_hold_every_requirement_at_a_version_that_it_allows():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^\[project.optional-dependencies\]\n(.*?)(?=^\[)", text, re.M | re.S)[1]
    wanted = [
        Requirement(r)
        for r in (*requirements(), *re.findall(r'"([A-Za-z0-9_.-]+>=[0-9.]+)"', block))
    ]
    assert len(wanted) > len(requirements())
    for requirement in wanted:
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), (
            requirement
        )


def test_the_constraints_do_not_contradict_one_another():
    """What each pinned package asks of the others, as far as it is installed here in that very
    version.
    """
    pinned, looked_at = pins(), 0
    for package in packages.distributions():
        if pinned.get(canonicalize_name(package.name)) != Version(package.version):
            continue
        looked_at += 1
        for requirement in map(Requirement, package.requires or ()):
            version = pinned.get(canonicalize_name(requirement.name))
            if version and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(version, prereleases=True), (
                    f"{package.name} needs {requirement}"
                )
    if not looked_at:
        pytest.skip("nothing is installed here in a version of constraints.txt")


def test_every_package_is_packed():
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(setup["packages"]) == folders | {"isa_lite.data"}


def test_nothing_private_is_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:  # a text
            found = [word for word in PRIVATE if word in data.decode("utf-8", "replace")]
            assert not found, f"{name} contains {found}"


def test_the_readme_states_the_stored_results():
    """Each row of its table of results is what the runs of five seeds say, by a computation of its
    own.
    """
    runs = json.loads((ROOT / "data" / "results" / "03_retrieval.json").read_text())["runs"]
    stated = {}
    for line in lines("README.md"):
        if found := re.fullmatch(r"\| (.+) \| ([\d.]+) \[.*\] \| ([\d.]+) \[.*\] \|", line):
            stated[found[1]] = float(found[2]), float(found[3])
    names = {
        "ISA, light query encoder": "isa",
        "symmetric ISA, large query encoder": "symmetric isa",
    }
    assert len(stated) == 9
    fusions = {
        name: sum(run["methods"][name]["R@1"] for run in runs)
        for name in (*FUSIONS, "BASIC-like", "image + text")
    }
    assert f"best late fusion ({max(fusions, key=fusions.get)})" in stated
    for label, recalls in stated.items():
        late = re.fullmatch(r"best late fusion \((.+)\)|one pseudo-word, (.+)", label)
        name = names.get(label) or (late and (late[1] or late[2])) or label.partition(":")[0]
        for k, value in zip((1, 10), recalls, strict=True):
            assert (
                abs(sum(run["methods"][name][f"R@{k}"] for run in runs) / len(runs) - value)
                <= 0.051
            ), (label, k)
