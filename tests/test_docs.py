"""The examples of README.md and docs/ run: every block of a page in order, in one namespace, offline.

- ```` ```python ```` runs. A line that ends in `# -> TEXT` must have that value, or print it; `...` is anything.
- ```` ```pycon ```` runs as a doctest; pages show errors so.
- ```` ```bash ```` is not run, but options of `prefloss` and targets of `make` must exist.
- A Python block whose first line is `# not run: REASON` has to compile, no more. Other languages are not looked at.

A page finds in its folder what it tells the reader to bring: `my-model`, `pairs.jsonl`, `labels.jsonl`.
"""

import ast
import contextlib
import doctest
import importlib
import io
import json
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import typer

import prefloss
from prefloss.cli.app import app
from prefloss.demo.model import tiny_llama, train_tokenizer
from prefloss.integrations import trl
from prefloss.worlds.language import LanguageWorld

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("docs/integrations/*.md")),
    ]
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXPECTED = re.compile(r"\s*# -> (.*)")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@dataclass
class Block:
    """A fenced block; `line` is the number of lines above its first."""

    language: str
    source: str
    line: int


def blocks(path, *languages):
    text = path.read_text(encoding="utf-8")
    found = [Block(m[1], m[2], text.count("\n", 0, m.start(2))) for m in _FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def pages_with(*languages):
    return pytest.mark.parametrize("page", [name for name, path in PAGES.items() if blocks(path, *languages)])


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """Where a page runs; afterwards the registry and TRL are as they were."""
    world = LanguageWorld(seed=0)
    pairs, labels = ([draw() for _ in range(16)] for draw in (world.pair, world.labelled))
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer((text for row in pairs for text in row.values()), vocab_size=400)
    tiny_llama(tokenizer, hidden=32).save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = set(prefloss.specs)
    yield
    trl.disable()
    for name in set(prefloss.specs) - before:
        prefloss.registry.unregister(name)


@pages_with("python", "pycon")
@pytest.mark.filterwarnings("ignore::FutureWarning")
# Lightning's advice for real trainings.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_examples_run(page, readers_folder, monkeypatch):
    # A module that can be imported, as the reader's own file: torch.compile looks for the loss in it.
    module = types.ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    for block in blocks(PAGES[page], "python", "pycon"):
        if block.source.startswith("# not run:"):
            reason = block.source.splitlines()[0].removeprefix("# not run:").strip()
            assert reason, f"{page}:{block.line + 1}: a block that is not run says why"
            compile(block.source, page, "exec")
        elif block.language == "pycon":
            run_doctest(block, page, names)
        else:
            run_python(block, page, names)


def run_python(block, page, names):
    # The page's own line numbers, so that a traceback points into it.
    tree = ast.parse("\n" * block.line + block.source, str(PAGES[page]))
    lines = PAGES[page].read_text(encoding="utf-8").splitlines()
    for node in tree.body:
        expected = _EXPECTED.match(lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode())
        if expected is None:
            exec(compile(ast.Module([node], []), str(PAGES[page]), "exec"), names)
            continue
        assert isinstance(node, ast.Expr), (
            f"{page}:{node.end_lineno}: only an expression has a value to check"
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = eval(compile(ast.Expression(node.value), str(PAGES[page]), "eval"), names)
        got = printed.getvalue().strip() or repr(value)
        same = doctest.OutputChecker().check_output(expected[1] + "\n", got + "\n", OPTIONS)
        assert same, f"{page}:{node.end_lineno}: the page says {expected[1]}, got {got}"


def run_doctest(block, page, names):
    test = doctest.DocTestParser().get_doctest(block.source, {}, page, str(PAGES[page]), block.line)
    test.globs = names
    report = io.StringIO()
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.write, clear_globs=False)
    assert not result.failed, report.getvalue()


def shell_lines(page):
    for block in blocks(PAGES[page], "bash"):
        for line in block.source.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pages_with("bash")
def test_shell_lines_name_what_exists(page):
    command = typer.main.get_command(app)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in shell_lines(page):
        if program == "prefloss":
            name, *arguments = words
            # Parses, and refuses what does not exist; runs nothing.
            command.commands[name].make_context(name, arguments)
        elif program == "make":
            assert words[0] in targets


@pytest.mark.parametrize(
    "name", re.findall(r"\| `([^|]+)` \|$", PAGES["docs/integrations/migration.md"].read_text(), re.MULTILINE)
)
def test_names_of_the_migration_table_are_losses(name):
    assert prefloss.get(name).terms


def test_links_of_the_readme_lead_somewhere():
    # Those of docs/ are checked by Sphinx, which also makes some of the pages.
    text = _FENCE.sub("", PAGES["README.md"].read_text(encoding="utf-8"))
    links = _LINK.findall(text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("docs/notebooks/*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(notebook):
    # The build of the docs runs it; outputs in the file would be old ones.
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_the_page_that_chooses_a_loss_is_whole(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    text = importlib.import_module("choose_page").page()
    page = tmp_path / "choose.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.setitem(PAGES, "choose.md", page)
    (block,) = blocks(page, "python")
    run_python(block, "choose.md", {})
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert {*prefloss.registry.PROBLEMS} <= {*headings}
    links = {Path(link) for link in _LINK.findall(text)}
    assert {link.stem for link in links if link.parent.name == "losses"} <= prefloss.specs.keys()
    experiments = {path.name for path in (ROOT / "docs" / "evidence" / "results").iterdir()}
    assert {link.stem for link in links if link.parent.name == "evidence"} <= {
        *experiments,
        "dpo-or-the-others",
    }
    # At most three losses in a cell, and no row of a table is broken by its text.
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert max(row.count("](losses/") for row in rows) == 3
    assert {row.count("|") for row in rows} == {3, 4}


def test_a_wrong_output_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\n1 + 1  # -> 3\n```\n")
    monkeypatch.setitem(PAGES, "page.md", page)
    (block,) = blocks(page, "python")
    with pytest.raises(AssertionError, match=r"page\.md:2: the page says 3, got 2"):
        run_python(block, "page.md", {})


def test_a_wrong_error_message_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 / 0\nTraceback (most recent call last):\nTypeError: no\n```\n")
    monkeypatch.setitem(PAGES, "page.md", page)
    (block,) = blocks(page, "pycon")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_doctest(block, "page.md", {})
