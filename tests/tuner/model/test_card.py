"""The model card: what hubs read of it, its lines run as they stand, and names that would be Markdown of their own."""

import re

import pytest
import yaml
from exporting import code

from tuner.model.card import card
from tuner.model.directory import CARD


@pytest.mark.slow
def test_the_cards_metadata_can_be_read_and_its_lines_run(exporting, start_python):
    exporting.start(code("dict"))
    manifest = exporting().manifest
    text = (exporting.output / CARD).read_text()
    _, metadata, shown = text.split("---\n", 2)
    (result,) = yaml.safe_load(metadata)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": manifest.test["accuracy"]}]
    blocks = re.findall(r"^`([^`]+)`:\n\n```python\n(.+?)^```", shown, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in blocks] == ["model.pt2", "model.pt2, without tuner", "model.safetensors"]
    for name, lines in blocks:
        assert len(lines.splitlines()) == 3
        program = f"import os\nos.chdir({str(exporting.output)!r})\n{lines}"
        program += "print(outputs.shape)\n" if "outputs" in lines else ""
        out, err = start_python(program).communicate(timeout=120)
        assert err == "", name
        assert ("torch.Size([2, 2])" if "outputs" in lines else "'layers.1.weight': (4, 3)") in out


def test_a_name_is_no_markdown_and_no_metadata(export_copy):
    from tuner.model.manifest import read_manifest

    manifest = read_manifest(export_copy).model_copy(
        update={"study": "x\n---\n# `<script>`", "data_license": "[a](b)\n| c", "class_names": ("`<b>`", "c|d")}
    )
    text = card(manifest)
    assert text.count("\n---\n") == 1
    shown = re.sub(r"`[^`]*`", "", text.split("---\n", 2)[2])
    assert "# x\\\\n---" in shown
    assert re.search(r"(?<!\\)<|(?<!\\)\[(?!\d)(?!\])", shown) is None
