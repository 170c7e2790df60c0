"""Class lists: exact, or refused with the candidates and the remedy."""

from __future__ import annotations

import pytest

from ddoq_ray.data.collections.classes import class_list, numbered_classes, wordnet_classes
from ddoq_ray.storage.records import ClassInfo

# Ids and words by hand, from two collections of ten.
NETTE = {"n01440764": "tench", "n03000684": "chain saw", "n03888257": "parachute"}
WOOF = {"n02086240": "Shih-Tzu", "n02099601": "golden retriever", "n02115641": "dingo"}


def names(classes: list[ClassInfo]) -> list[tuple[int, str, str]]:
    return [(c.class_id, c.name, c.prompt) for c in classes]


def refused(*args: object, words: list[str], call=class_list) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as error:
        call(*args)
    assert all(w in str(error.value) for w in ("there", *words)), str(error.value)


def test_names_in_sorted_order_with_readable_prompts() -> None:
    got = class_list(["golden_retriever", "cat", "Ant"], None, "there")
    assert names(got) == [(0, "Ant", "Ant"), (1, "cat", "cat"), (2, "golden_retriever", "golden retriever")]
    assert all(c.teacher_index is None and c.prior_label is None for c in got)


def test_numbers_in_one_order_only() -> None:
    assert [c.name for c in class_list(["2", "0", "1"], None, "there")] == ["0", "1", "2"]
    assert [c.name for c in class_list(["10", "01", "02"], None, "there")] == ["01", "02", "10"]
    assert [c.name for c in class_list(["1", "10", "2"], None, "there")] == ["1", "2", "10"]  # numbers sort as such
    refused(["1", "01"], None, "there", words=["01", "ambiguous"])
    given = [ClassInfo(i, n, n) for i, n in enumerate(["1", "2", "10"])]
    assert class_list(["1", "10", "2"], given, "there") == given


def test_names_that_differ_only_in_case() -> None:
    for pair in (["Cat", "cat"], ["cat", "cat "], ["STRASSE", "straße"]):
        refused(["dog", *pair], None, "there", words=[f"{sorted(pair)[0]} and {sorted(pair)[1]}", "rename"])


def test_a_given_list_must_fit_both_ways() -> None:
    given = [ClassInfo(0, "cat", "a cat", teacher_index=7), ClassInfo(1, "ant", "an ant")]
    assert class_list(["ant", "cat"], given, "there") == given
    refused(["ant", "cat", "dog"], given, "there", words=["does not fit", "not in the list: dog"])
    refused(["ant"], given, "there", words=["in the list but not in the source: cat"])
    refused(["ant", "cat"], [*given, given[0]], "there", words=["listed twice: cat"])


def test_wordnet_ids_become_words_where_these_are_certain() -> None:
    got = class_list([*WOOF, *NETTE], None, "there")
    assert {c.name: c.prompt for c in got} == NETTE | WOOF
    assert [c.name for c in got] == sorted(NETTE | WOOF)
    assert all(c.prior_label is None for c in got)  # a prior of these few classes may be used as well
    refused(["n01440764", "n00000001"], None, "there", words=["n00000001", "1 of them", "dataset.classes", "prompt"])


def test_all_of_imagenet_has_its_places() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    from ddoq_ray.data.collections.classes import _positions

    known = {i: wnid for wnid, i in _positions().items()}
    wnids, last = [], 1440764
    for i in range(1000):  # ids that keep the order, and are the true ones where these are known
        last = int(known[i][1:]) if i in known else last + 1
        wnids.append(f"n{last:08d}")
    assert wnids == sorted(set(wnids))
    got = wordnet_classes(wnids, "there")
    assert [c.prompt for c in got] == _IMAGENET_CATEGORIES
    assert [c.prior_label for c in got] == [c.teacher_index for c in got] == list(range(1000))
    assert (got[207].name, got[207].prompt, got[0].prompt) == ("n02099601", "golden retriever", "tench")
    other = sorted([*wnids[1:], "n16000000"])  # a thousand, but not those
    refused(other, "there", words=["not ImageNet's 1,000", "dataset.classes"], call=wordnet_classes)


def test_known_words_are_torchvisions() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    from ddoq_ray.data.collections.classes import _positions

    found = {w: _IMAGENET_CATEGORIES[i] for w, i in _positions().items()}
    assert {w: found[w] for w in NETTE | WOOF} == NETTE | WOOF
    in_order = sorted(_positions().items())
    assert [i for _, i in in_order] == sorted(i for _, i in in_order)


def test_labels_that_are_numbers() -> None:
    assert names(numbered_classes({0, 1, 2}, None, None, "there")) == [(0, "0", "0"), (1, "1", "1"), (2, "2", "2")]
    assert [c.name for c in numbered_classes({0, 1}, ["10", "9", "x"], None, "there")] == ["10", "9", "x"]
    given = [ClassInfo(0, "T-shirt", "a T-shirt"), ClassInfo(1, "Trouser", "trousers")]
    assert numbered_classes({0, 1}, None, given, "there") == given
    assert numbered_classes({0, 1}, ["T-shirt", "Trouser"], given, "there") == given
    swapped = numbered_classes({0, 1}, ["n03888257", "n01440764"], None, "there")  # the source's own order holds
    assert names(swapped) == [(0, "n03888257", "parachute"), (1, "n01440764", "tench")]
    call = numbered_classes
    refused({1, 2}, None, None, "there", words=["1, 2", "0 to C - 1", "dataset.classes"], call=call)
    refused({0, 5}, ["a", "b"], None, "there", words=["labels 5", "0 to 1"], call=call)
    refused({0, 1}, ["a", "b"], given, "there", words=["T-shirt, Trouser", "a, b"], call=call)
    refused({0}, ["a", "A"], None, "there", words=["A and a"], call=call)
