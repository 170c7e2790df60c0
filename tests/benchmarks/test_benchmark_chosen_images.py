from benchmarks import chosen_images


def test_a_draw_decodes_what_it_takes() -> None:
    before, now = chosen_images.measure(2, 30, 64, 3, 1)
    assert (now["decoded"], now["chosen"]) == (6, 6) and before["decoded"] > 20
    assert now["read_mb"] < before["read_mb"] and now["of_all_bytes"] < 1
