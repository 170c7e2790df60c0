import pytest

from benchmarks import plan


@pytest.mark.slow
@pytest.mark.processes
def test_plans_of_a_generated_index_give_rows() -> None:
    new, known = plan.measure("mixed", 3, 8, 40)
    for row in (new, known):
        assert (row["order"], row["images"], row["shards"], row["classes"]) == ("mixed", 120, 3, 8)
        assert row["seconds"] > 0 and row["peak_bytes"] > 50e6 and row["index_bytes"] > 300
    assert (new["networks"], known["networks"]) == ("new", "known")
