"""README and docs say what is so: every block of code runs, every command is one, every file is there, tables made by trying are as tried.

A block of Python runs as it stands, after those above it on its page. A block of YAML begins with ``# NAME.yaml`` and is written under that
name for the commands below it. Commands run in this process, in a folder that has the repository's configs: made short by overrides where
they train; up to their parsed configuration where their comment says that they want a GPU, minutes or hours.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache, partial
from itertools import dropwhile
from pathlib import Path

import pytest
import yaml
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from featherlight import callbacks, cli, fed_loop, plugins, ssl_models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORT = {
    "cost": ["--federation.rounds=3"],
    "federate": ["--federation.rounds=2", "--federation.local_epochs=1", "--data.limit_train=96", "--data.num_clients=2", "--probes=[]"],
    "fit": ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.limit_train=192", "--probes=[]"],
}
"""Overrides that make a training command short."""

LONG = re.compile(r"#.*\b(GPU|minutes|hours)\b")


# -- commands -----------------------------------------------------------------------------------------------------------
def featherlight(command, rest, long, folder):
    """Run ``featherlight COMMAND REST``, in short."""
    if command == "compare":
        files = [str(path) for pattern in rest for path in (sorted(Path().glob(pattern)) if "*" in pattern else [Path(pattern)])]
        assert files
        if not long:
            rest = [
                str(shortened(file, folder))
                for path in map(Path, files)
                for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])
            ]
            return cli.main(["compare", *rest[:2], "--out", str(folder / "compared")])
        for file in files:
            parsed("federate", ["-c", file])
        return None
    if command == "flower" and importlib.util.find_spec("flwr") is None:
        return parsed("federate", rest[: rest.index("--app")])
    if long:
        return parsed("fit" if command == "fit" else "federate", rest)
    return cli.main([command, *rest, *SHORT.get(command, [])])


def shortened(file, folder):
    """A copy of a configuration that trains for a moment."""
    content = yaml.safe_load(file.read_text())
    content["federation"] |= {"rounds": 1, "local_epochs": 1}
    content["data"]["init_args"] |= {"limit_train": 96, "num_clients": 2}
    content["probes"] = content["probes"][:1]
    short = folder / "short" / file.name
    short.parent.mkdir(exist_ok=True)
    short.write_text(yaml.dump(content))
    return short


def parsed(command, rest):
    """Its whole configuration, which must be valid, and no training."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *rest, "--print_config"])
    assert not ended.value.code


def python(rest):
    """A script of ours: it is there, and has the options that are given."""
    if rest[0] == "-m":
        return
    path = ROOT / rest[0]
    assert path.is_file(), f"there is no {rest[0]}"
    source = path.read_text() + (ROOT / "examples" / "shared.py").read_text()
    for option in (word.split("=")[0] for word in rest[1:] if word.startswith("--")):
        assert f'"{option}"' in source or f"{option.removeprefix('--')}=" in source, f"{rest[0]} has no option {option}"


@cache
def help_of(*words):
    return subprocess.run([*words, "--help"], capture_output=True, text=True, timeout=120).stdout


def flower(command, rest):
    """A command of Flower's, which another machine may be needed for: it has the options that are given."""
    if shutil.which(command) is None:
        return
    words = [word for word in rest[:2] if command == "flwr" and re.fullmatch("run|supernode|register", word)]
    said = help_of(command, *words)
    assert words or command != "flwr"
    assert not [word for word in rest if word.startswith("--") and word not in said]


def installed(rest):
    """What pip is asked for is this project, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
        assert set(extra.split(",")) <= extras.keys()
    assert rest[0] == "install"


def present(rest):
    """Paths among the arguments exist."""
    assert all((ROOT / word.partition("::")[0]).exists() for word in rest if "/" in word and not word.startswith(("-", "build/")))


def run_line(line, folder):
    """One line of a block of commands, of which each command must be of a known kind."""
    for part in re.split(r"&&|;", line.partition(" #")[0]):
        command, *rest = dropwhile(re.compile(r"[A-Z_]+=").match, shlex.split(part))
        if command == "featherlight":
            featherlight(rest[0], rest[1:], bool(LONG.search(line)), folder)
        else:
            known = {"python": python, "pip": installed}
            known |= {name: partial(flower, name) for name in ("flwr", "flower-superlink", "flower-supernode")}
            if command not in known:
                assert command in ("pytest", "ruff", "mypy", "sphinx-build", "git", "cd", "wandb", ".ci/run"), (
                    f"{command}: the tests do not know it"
                )
            known.get(command, present)(rest)


# -- blocks -------------------------------------------------------------------------------------------------------------
def run_commands(example):
    for line in example.parsed.splitlines():
        if line.strip() and not line.startswith("#"):
            run_line(line, Path.cwd())


def write_configuration(example):
    """A file, or a part of one, of which every class is ours."""
    name = re.match(r"# ([\w.]+\.yaml)\n", example.parsed)
    assert name, "a block of YAML begins with # NAME.yaml"
    Path(name[1]).write_text(example.parsed)
    assert isinstance(yaml.safe_load(example.parsed), dict)


SYBIL = Sybil(
    [
        CodeBlockParser("python", PythonEvaluator()),
        CodeBlockParser("bash", run_commands),
        CodeBlockParser("yaml", write_configuration),
        CodeBlockParser("toml", lambda example: tomllib.loads(example.parsed) and None),
    ]
)
DOCUMENTS = {str(path.relative_to(ROOT)): SYBIL.parse(path) for path in PAGES}


@pytest.mark.parametrize("page", [name for name, document in DOCUMENTS.items() if list(document.examples())])
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["featherlight"])
    for example in DOCUMENTS[page].examples():
        example.evaluate()
    if page == "README.md":
        assert "knn" in capsys.readouterr().out


def test_no_block_is_passed_over():
    for path in PAGES:
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0
        languages = set(fences[::2])
        assert languages <= {"python", "bash", "yaml", "toml", "{toctree}", "{eval-rst}"}, f"{path.name}: {languages}"
        indented = re.findall(r"^    (?:featherlight|python|pip|pytest) .*", path.read_text(), re.MULTILINE)
        assert not indented, f"{path.name}: put {indented[0].strip()} into a block of bash, which is tested"


def test_every_method_has_a_page_with_code_and_a_configuration():
    text = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    for method in table.methods(plugins, plugins.Plugin):
        configured = {name: own for name, own in text.items() if f"class_path: {method}\n" in own}
        assert configured, f"no page configures {method}"
        shown = [own for own in configured.values() if re.search(rf"```python\n(?:(?!```).)*\b{method}\(", own, re.DOTALL)]
        assert shown, f"{', '.join(configured)}: no Python with {method}"
        assert any("**Equation.**" in own for own in shown)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_a_page_of_methods_has_all_that_readme_says(path):
    """Idea, equation, when to use it, of each; figures with the commands that print them; traps."""
    text = path.read_text()
    ideas, equations, whens = (len(re.findall(rf"\*\*{part}", text)) for part in (r"Idea\.", r"Equation\.", r"When( to use it)?\."))
    assert ideas == equations == whens >= 1
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    (told,) = (sections[name] for name in sections if re.fullmatch("What (it saves|they save) and costs?", name))
    assert re.search(r"^\|.*\d.*\|$", told, re.MULTILINE), "no table of figures"
    assert re.search(r"`(python benchmarks/|featherlight |pytest )", told), "no command that prints a figure"
    assert len(re.findall(r"^- \*\*", sections["Traps"], re.MULTILINE)) >= 3


@pytest.mark.parametrize("package", [plugins, callbacks, fed_loop, ssl_models], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    page = (ROOT / "docs" / "api" / f"{package.__name__.rpartition('.')[2]}.md").read_text()
    entries = [line for line in page.splitlines() if line.startswith((".. auto", ".. py:", "   :members:"))]
    named = {word for line in entries for word in re.findall(r"\w+", line)}
    assert not set(package.__all__) - named


# -- what pages name ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_and_files_are_there(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), f"{path.name} links to {link}"
    for name in re.findall(r"(?:configs|docs|benchmarks|examples|tests)/[\w/]+\.(?:yaml|md|py|png)", text):
        assert (ROOT / name).is_file(), f"{path.name} names {name}"
    for line in re.findall(r"`(python [\w/]+\.py[^`]*|featherlight [^`]*)`", text):
        command, *rest = shlex.split(line)
        if command == "python":
            python(rest)
        elif rest[0] not in ("COMMAND",):
            assert rest[0] in cli.COMMANDS, line


def test_every_cell_of_the_peers_has_a_source():
    """A link, or the test that holds it; a dash says that the row does not apply."""
    text = (ROOT / "docs" / "peers.md").read_text()
    sources = dict(re.findall(r"^\[([\w-]+)\]: (https://\S+)$", text, re.MULTILINE))
    used = set(re.findall(r"\]\[([\w-]+)\]", text))
    assert used == sources.keys()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|") and not line.startswith(("| |", "|---"))]
    assert len(rows) > 25
    for row in rows:
        assert len(row) == 8, row[0]
        assert all(cell == "–" or re.search(r"\]\[|\]\(|`tests/", cell) for cell in row[1:]), row[0]


# -- tables that are made by trying -------------------------------------------------------------------------------------
def _tables():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = _tables()


@pytest.mark.parametrize("name", table.TABLES)
def test_tables_are_as_tried(name):
    assert table.shown(name) == table.made(name).strip(), "make them anew with: python docs/tables.py --write"


def test_the_tables_have_every_method():
    of_plugins = table.shown("pairs in a federation")
    assert all(f"| `{name}` |" in of_plugins for name in table.methods(plugins, plugins.Plugin))
    assert len(table.methods(callbacks, callbacks.PluginCallback)) >= 5
