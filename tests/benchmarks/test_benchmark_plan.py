import pytest

from benchmarks import plan


@pytest.mark.slow
@pytest.mark.processes
def test_a_plan_of_a_generated_index_gives_a_row() -> None:
    row = plan.measure("mixed", 3, 8, 40)
    assert (row["order"], row["images"], row["shards"], row["classes"]) == ("mixed", 120, 3, 8)
    assert row["seconds"] > 0 and row["peak_bytes"] > 50e6 and row["index_bytes"] > 300
