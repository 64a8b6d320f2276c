"""The few-shot study: equal trials, nothing chosen on test, and the controls are controls."""

import few_shot
import pytest
import torch
from few_shot import ARMS, BLENDS, VOICES, Rows, measure_split
from lowdata import DIFFERENCES, NAMES, main

CLASSES = 4


def rows(count: int, seed: int = 0, spread: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 16, generator=generator)
    return Rows((centres[labels] + spread * noise).relu(), labels)


def test_every_arm_has_as_many_trials():
    assert len({len(configs) for configs, _ in ARMS.values()}) == 1
    for name, (configs, _) in ARMS.items():
        assert len(set(configs)) == len(configs)
        assert all((config.alpha > 0) == (name != "head") for config in configs)
    assert {config.control for config in ARMS["shuffled"][0]} == {"shuffled"}
    assert {config.control for config in ARMS["constant"][0]} == {"constant"}
    rates = [[c[:3] for c in ARMS[name][0]] for name in ("reweighted", "shuffled", "constant")]
    assert rates[0] == rates[1] == rates[2]
    assert {name for pair in DIFFERENCES for name in pair} <= set(NAMES)


@pytest.mark.parametrize("shots", [1, 2, 8])
def test_easy_classes_are_learned_by_everyone(shots):
    found = measure_split(rows(CLASSES * shots, 1, 0.1), rows(200, 2, 0.1), CLASSES, 0)
    assert found.keys() == {*ARMS, *VOICES}
    assert min(found.values()) > 0.95


def test_the_same_split_gives_the_same_numbers():
    first = measure_split(rows(16, 1), rows(100, 2), CLASSES, 3)
    assert measure_split(rows(16, 1), rows(100, 2), CLASSES, 3) == first
    assert first["head"] < 1  # there was something to differ in


def test_nothing_is_chosen_on_the_test_pictures(monkeypatch):
    """The same choices whatever the test pictures are."""
    seen = []
    answer = few_shot._answer

    def spy(fitted, asked, classes, seed, arms):
        seen.append({name: tuple(configs) for name, configs in arms.items()})
        return answer(fitted, asked, classes, seed, arms)

    monkeypatch.setattr(few_shot, "_answer", spy)
    train, test = rows(16, 1), rows(100, 2)
    measure_split(train, test, CLASSES, 0)
    chosen = seen[-1]
    assert all(len(configs) == 1 for configs in chosen.values())
    scrambled = Rows(test.features, test.labels.roll(1))
    measure_split(train, scrambled, CLASSES, 0)
    assert seen[-1] == chosen


def test_labels_without_meaning_are_answered_by_chance():
    generator = torch.Generator().manual_seed(5)
    train, test = rows(32, 1), rows(400, 2)
    train = train._replace(labels=train.labels[torch.randperm(32, generator=generator)])
    test = test._replace(labels=test.labels[torch.randperm(400, generator=generator)])
    found = measure_split(train, test, CLASSES, 0)
    assert all(0.12 < value < 0.38 for value in found.values())  # a quarter, 400 pictures
    assert BLENDS.keys() <= found.keys()


def test_the_command_writes_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    import lowdata

    monkeypatch.setattr(lowdata, "task_features", lambda *_: (rows(80, 4), CLASSES))
    main(["one"], [1, 2], 2, "none", tmp_path, None)
    said = capsys.readouterr().out
    assert "test top-1 in %" in said
    assert "reweighted - shuffled" in said
    assert (tmp_path / "lowdata.png").stat().st_size > 5000
    assert (tmp_path / "lowdata.json").is_file()
