"""The files around the package: requirements, README, the order of the modules, and nothing private in the repository."""

import ast
import importlib.metadata as packages
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from isa_lite.methods.fusion import FUSIONS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "isa_lite"

# The order in which data flows. A module imports only modules above it.
ORDER = """
    parameters recipes settings answers checkpoint ranks runs images scenes icons hub words text_tower attention
    matching_encoder open_clip_models blip vl_model symmetric token_learner mappings backbones query_encoder fold parity
    losses targets precision distill light_backbone gallery embed evaluate baselines fusion inversion sentences
    interventions spaces benchmarks.common benchmarks.submission benchmarks.fashioniq benchmarks.cirr benchmarks.circo
    benchmarks.tiny benchmarks.run benchmarks.__main__ ablations growth compare own_data pretrain folder_batches
    pretrain_folder measure step_cost query_timing client onnx_files export latency bench draw cards sweep failures
    widgets commands.distill commands.evaluate commands.compare commands.benchmarks commands.export commands.client
    commands.pretrain_folder commands.sweep commands.growth commands.failures commands.bench commands.parity
    commands.pretrain commands.light_backbone commands.cards __main__
""".split()

# Where the name that is imported differs from the name that is installed.
DISTRIBUTION = {"PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn", "IPython": "ipython"}
DISTRIBUTION["faiss"] = "faiss-cpu"

# Put together here, so that this file does not contain them.
PRIVATE = ["/wo" + "rk/", "/ro" + "ot/", ".." + "/shared", "py" + "pi.org", "python" + "hosted.org"]


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def requirement_lines() -> list[str]:
    return [line for line in lines("requirements.txt") if line.strip() and not line.startswith("#")]


def requirements() -> list[str]:
    return [line.split("#")[0].strip() for line in requirement_lines()]


def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its dotted name below isa_lite, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, inside functions too; `from a import b` gives a.b.

    Not what it imports when it is run under its old name, `python -m isa_lite.distill`.
    """
    names = set()
    body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; this package writes absolute ones"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def command_lines(heading: str) -> list[str]:
    """The lines of the first fenced block behind a heading of the README, as .ci/run reads them."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert section, f"README.md has no heading '## {heading}'"
    block = re.search(r"^```\w*\n(.*?)^```$", section[1], re.M | re.S)
    assert block, f"README.md has no fenced block behind '## {heading}'"
    return block[1].splitlines()


def test_conda_and_pip_install_the_same():
    text = lines("environment.yml")
    start = text.index("  - pip:") + 1
    assert [line.strip().removeprefix("- ") for line in text[start:] if line.strip()] == requirements()


@pytest.mark.parametrize("line", requirement_lines())
def test_a_requirement_has_a_lower_bound_and_a_reason(line):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+>=\d+(\.\d+)*  # \S.*", line)


def extras() -> set[str]:
    """Packages of the optional extras; modules that need one import it inside a function and say so where it is missing."""
    block = re.search(r"^\[project.optional-dependencies\]\n(.*?)(?=^\[)", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return {name.lower() for name in re.findall(r'"([A-Za-z0-9_.-]+)>=', block[1])}


def at_the_top(tree: ast.Module) -> set[str]:
    """What is imported as soon as the module is."""
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in imported(ast.Module(statements, []))}


def test_what_an_extra_brings_is_imported_only_where_it_is_used():
    for name, tree in modules().items():
        assert not extras() & at_the_top(tree), f"isa_lite/{name}.py cannot be imported without an extra"


def test_what_the_package_imports_is_required():
    required = {re.split("[>=]", r)[0].lower() for r in requirements()} | extras()
    for name, tree in modules().items():
        tops = {i.split(".")[0] for i in imported(tree)} - set(sys.stdlib_module_names) - {"isa_lite"}
        missing = {top for top in tops if DISTRIBUTION.get(top, top).lower() not in required}
        assert not missing, f"isa_lite/{name}.py imports {missing}, which requirements.txt does not list"


def test_a_module_imports_only_modules_above_it():
    found = {name: tree for name, tree in modules().items() if not name.endswith("__init__")}
    assert sorted(found) == sorted(ORDER), "give each module its place in ORDER"
    for name, tree in found.items():
        names = {i.removeprefix("isa_lite.") + "." for i in imported(tree) if i.startswith("isa_lite.")}
        own = {other for other in ORDER for i in names if i.startswith(other + ".")}
        below = [other for other in own if ORDER.index(other) >= ORDER.index(name)]
        assert not below, f"isa_lite/{name}.py imports {below}, which do not stand above it"


def test_the_readme_lists_the_modules_in_that_order():
    listed = [found[1] for line in lines("README.md") if (found := re.match(r"    (\w+)(?:\.py|/) ", line))]
    order = dict.fromkeys(name.split(".")[0] for name in ORDER)
    assert listed[: len(order)] == list(order)


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
    section = re.search(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", "\n".join(lines("README.md")), re.M | re.S)[1]
    (linux,), (windows,) = (re.findall(rf"^```{kind}\n(.*?)\n```$", section, re.M | re.S) for kind in ("bash", "powershell"))
    assert "\n" not in linux + windows and portable(windows) == linux.split(" && ")
    assert windows.count("if (!$LASTEXITCODE)") == windows.count(r".venv\Scripts"), "each step waits for the one before"


def pins() -> dict[str, Version]:
    """The exact versions of constraints.txt, by the names that pip takes for equal."""
    found = [line for line in lines("constraints.txt") if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in found), (
        "a name and a version a line, no addresses"
    )
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in found)}


def test_the_constraints_hold_every_requirement_at_a_version_that_it_allows():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^\[project.optional-dependencies\]\n(.*?)(?=^\[)", text, re.M | re.S)[1]
    wanted = [Requirement(r) for r in (*requirements(), *re.findall(r'"([A-Za-z0-9_.-]+>=[0-9.]+)"', block))]
    assert len(wanted) > len(requirements())
    for requirement in wanted:
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_the_constraints_do_not_contradict_one_another():
    """What each pinned package asks of the others, as far as it is installed here in that very version."""
    pinned, looked_at = pins(), 0
    for package in packages.distributions():
        if pinned.get(canonicalize_name(package.name)) != Version(package.version):
            continue
        looked_at += 1
        for requirement in map(Requirement, package.requires or ()):
            version = pinned.get(canonicalize_name(requirement.name))
            if version and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(version, prereleases=True), f"{package.name} needs {requirement}"
    if not looked_at:
        pytest.skip("nothing is installed here in a version of constraints.txt")


def test_every_package_is_packed():
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(setup["packages"]) == folders | {"isa_lite.data"}


def test_nothing_private_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:  # a text
            found = [word for word in PRIVATE if word in data.decode("utf-8", "replace")]
            assert not found, f"{name} contains {found}"


def test_the_readme_states_the_stored_results():
    """Each row of its table of results is what the runs of five seeds say, by a computation of its own."""
    runs = json.loads((ROOT / "data" / "results" / "03_retrieval.json").read_text())["runs"]
    stated = {}
    for line in lines("README.md"):
        if found := re.fullmatch(r"\| (.+) \| ([\d.]+) \[.*\] \| ([\d.]+) \[.*\] \|", line):
            stated[found[1]] = float(found[2]), float(found[3])
    names = {"ISA, light query encoder": "isa", "symmetric ISA, large query encoder": "symmetric isa"}
    assert len(stated) == 9
    fusions = {name: sum(run["methods"][name]["R@1"] for run in runs) for name in (*FUSIONS, "BASIC-like", "image + text")}
    assert f"best late fusion ({max(fusions, key=fusions.get)})" in stated
    for label, recalls in stated.items():
        late = re.fullmatch(r"best late fusion \((.+)\)|one pseudo-word, (.+)", label)
        name = names.get(label) or (late and (late[1] or late[2])) or label.partition(":")[0]
        for k, value in zip((1, 10), recalls, strict=True):
            assert abs(sum(run["methods"][name][f"R@{k}"] for run in runs) / len(runs) - value) <= 0.051, (label, k)
