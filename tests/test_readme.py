"""The code of the READMEs runs, and their commands have the files and options that they name."""

import re
import subprocess
import sys
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


@pytest.mark.parametrize("script", sorted({script for script, _ in read_commands()}))
def test_commands_name_options_and_files_that_exist(script):
    options = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command, arguments in read_commands():
        for word in arguments if command == script else ():
            assert not word.startswith("--") or re.search(rf"{word}\b", options), f"{script} has no {word}"
            assert not word.endswith(".yaml") or (ROOT / word).is_file(), f"there is no {word}"
    for table in re.findall(r"recipes/sweep\.py (\w+)", "\n".join(map(Path.read_text, DOCUMENTS))):
        assert (ROOT / "recipes" / "tables" / f"{table}.yaml").is_file()


def test_links_lead_to_files():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"
