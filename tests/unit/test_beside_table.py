"""The table of predicted and measured seconds has the columns that it has numbers for."""

from __future__ import annotations

import pytest

from moe_lightning.cli.beside_table import print_rows
from moe_lightning.perf.beside import Row


def test_without_predictions_there_is_no_column_of_them(capsys):
    print_rows("seconds", [Row("gpu", 3, None, 1.5), Row("cpu", 2, None, 0.5)])
    told = capsys.readouterr().out
    assert "predicted" not in told and "-" not in told
    assert "measured s" in told and "1.5000" in told


@pytest.mark.parametrize("predicted", [1.0, 3.0])
def test_one_prediction_is_enough_for_its_columns(predicted, capsys):
    print_rows("seconds", [Row("gpu", 3, predicted, 1.5), Row("cpu", 2, None, 0.5)])
    told = capsys.readouterr().out
    assert "predicted s" in told and f"{1.5 / predicted:.2f}" in told and "-" in told
