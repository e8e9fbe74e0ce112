"""That the harvest's benchmark measures what it says, at a size of no meaning."""

from benchmarks.harvest import Size, measure
from benchmarks.rows import show


def test_a_row_for_each_form_with_the_seconds_of_both(capsys):
    size = Size(d_model=64, n_layers=2, context=16, n_shards=2, n_groups=1)
    rows = measure(size, pairs=2, threads=1)
    show(rows)
    assert [row.name.split(",")[0] for row in rows] == [
        "harvest of every layer",
        "harvest of 1 groups",
    ]
    table = capsys.readouterr().out
    for row in rows:
        assert row.name in table
        assert len(row.values) == 2
        assert min(row.values) > 0
        assert row.at_least == 0.95
