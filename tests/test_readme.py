"""The code of the READMEs runs, and their commands have the files and options that they name."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *(ROOT / folder / "README.md" for folder in ("benchmarks", "recipes", "rblock_fx"))]


def read_blocks(document, language):
    """The code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def read_commands():
    """(script, arguments) of every command that runs a script of the repository."""
    text = "\n".join("\n".join(read_blocks(document, "bash")) for document in DOCUMENTS)
    found = re.findall(r"((?:recipes|benchmarks)/\w+\.py)(.*)", text)
    return [(script, arguments.split("#")[0].split()) for script, arguments in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(document):
    torch.manual_seed(0)
    names = {}
    for block in read_blocks(document, "python"):
        exec(compile(block, str(document), "exec"), names)
    if document == README:
        assert names["output"].shape == (16, 10)
        assert names["logits"].shape == (8, 10)
        assert torch.isfinite(names["loss"])


def test_the_readme_shows_what_list_sites_and_describe_print():
    import timm

    from rblock_fx import apply_rblock, describe, list_sites

    model = timm.create_model("resnet50")
    shown = read_blocks(README, "text")[0].split("\n\n")
    assert shown == [str(list_sites(model)), f"{describe(apply_rblock(model))}\n"]


def test_commands_name_files_and_options_that_exist():
    sources = "\n".join(path.read_text() for path in (ROOT / "recipes").rglob("*.py"))
    commands = read_commands()
    assert len(commands) > 8
    for script, arguments in commands:
        assert (ROOT / script).is_file(), f"there is no {script}"
        for word in arguments:
            name = word.removeprefix("--")
            declared = rf"^    {name}: |\"--{name}\""  # a field of a dataclass of settings, or an argument of a parser
            assert name == word or re.search(declared, sources, re.MULTILINE), f"{script} has no {word}"
            assert not word.endswith(".yaml") or (ROOT / word).is_file(), f"there is no {word}"
        if script == "recipes/sweep.py":
            assert (ROOT / "recipes" / "tables" / f"{arguments[0]}.yaml").is_file()


def test_links_lead_to_files():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"
