"""The demo, cut to one epoch: what it prints and writes."""

import pytest
from PIL import Image

from nestloop.models import demo


@pytest.mark.slow
def test_it_prints_a_row_a_mixer_and_writes_picture_and_stages(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert demo.main(["--epochs", "1", "--run-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for heading in ("held out", "parameters", "MFLOP/image", "s/epoch"):
        assert heading in printed
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    table = {row[1].strip(): [cell.strip() for cell in row[2:6]] for row in rows}
    assert table.keys() == {"self_attention", "linear_attention", "mttt_linear", "mttt_mlp"}
    for accuracy, parameters, flops, seconds in table.values():
        assert accuracy.endswith("%") and float(seconds) > 0
        assert int(parameters.replace(",", "")) > 38_000 and float(flops) > 1
    assert "It does not rank them" in printed
    picture, stages = tmp_path / "out/curves.png", tmp_path / "out/mttt_mlp_stages.txt"
    assert str(picture) in printed and str(stages) in printed
    assert Image.open(picture).size == (1440, 840)
    assert len(stages.read_text().splitlines()) > 20
