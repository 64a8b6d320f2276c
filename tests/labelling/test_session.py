"""A session: what is asked, what an answer does, and that taking it back leaves nothing of it."""

from pathlib import Path

import pytest
import torch
from support.labelling import answer_truly, made_pool, name_of, open_made, skip, word_of

from hf_knn.labelling import Copies, Group, Kept, Named, Picture, Session, Skipped
from hf_knn.labelling.questions import Answer


def everything(session: Session) -> tuple[object, ...]:
    """All that a session knows, but for the number of the question."""
    question = session.question()
    asked = None if question is None else {**vars(question), "number": 0}
    guesser = session._guesser
    shares = guesser.probabilities(session.pool.names) if guesser.rows else torch.empty(0)
    memory = guesser.known.memory
    return (
        session.progress(), session.labels, asked, shares.tolist(), memory.classes,
        memory.rows and memory.rows.ids.tolist(), session._state, len(memory.receipts),
    )  # fmt: skip


def test_groups_come_first_and_then_pictures(tmp_path: Path) -> None:
    session = open_made(tmp_path)
    kinds = []
    for _ in range(6):
        kinds.append(type(session.question()))
        answer_truly(session)
    assert kinds == [Group, Group, Picture, Picture, Picture, Picture]


def test_a_group_is_of_pictures_that_look_alike(tmp_path: Path) -> None:
    question = open_made(tmp_path, groups=3).question()
    assert isinstance(question, Group)
    assert len(question.pictures) >= 3
    assert len({word_of(path) for path in question.pictures}) == 1
    assert question.guess is None


def test_what_is_left_out_of_a_group_is_asked_later(tmp_path: Path) -> None:
    session = open_made(tmp_path, count=18)
    question = session.question()
    assert isinstance(question, Group)
    session.answer(question.number, Named("ant", question.pictures[1:]))
    assert session.progress().by_label == {"ant": len(question.pictures) - 1}
    assert session.progress().left == 19 - len(question.pictures)
    asked: set[Path] = set()
    while (found := session.question()) is not None:
        asked.update(getattr(found, "pictures", ()) or {found.picture})  # type: ignore[union-attr]
        answer_truly(session)
    assert question.pictures[0] in asked
    assert not asked & set(question.pictures[1:])


def test_each_picture_is_asked_about_once_and_guessed_by_what_was_said(tmp_path: Path) -> None:
    session, seen, right = open_made(tmp_path, groups=0, count=18), [], 0
    while (question := session.question()) is not None:
        assert isinstance(question, Picture)
        assert session.question() is question
        seen.append(question.picture)
        if len(seen) > 5:
            assert sum(guess.probability for guess in question.guesses) == pytest.approx(
                1, abs=1e-4
            )
            right += question.guesses[0].label == word_of(question.picture)
            nearest = question.neighbours[0]
            assert nearest.picture in seen
            assert nearest.label == word_of(nearest.picture)
        answer_truly(session)
    assert len(set(seen)) == len(seen) == 18
    assert right >= 11  # of 13; three clusters are told apart


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_undo_leaves_what_never_having_answered_leaves(tmp_path: Path, steps: int) -> None:
    copies = [(name_of(0), name_of(3))]
    session, states = open_made(tmp_path, groups=1, copies=copies), []
    for turn in range(5):
        states.append(everything(session))
        (skip if turn == 3 else answer_truly)(session)
    for back in range(1, steps + 1):
        assert session.undo().startswith("Taken back")
        assert everything(session) == states[-back]


def test_undo_after_a_restart_takes_the_same_back(tmp_path: Path) -> None:
    session, states = open_made(tmp_path), []
    for _ in range(4):
        states.append(everything(session))
        answer_truly(session)
    session.close()
    again = open_made(tmp_path, pool=session.pool)
    for state in reversed(states):
        again.undo()
        found = everything(again)
        assert found[:3] == state[:3]
        # rows were taught at once: their sums are rounded otherwise
        assert torch.allclose(torch.tensor(found[3]), torch.tensor(state[3]), atol=1e-5)
    with pytest.raises(ValueError, match="Expected an answer to take back"):
        again.undo()


def test_a_session_goes_on_where_it_was_left(tmp_path: Path) -> None:
    session = open_made(tmp_path)
    for _ in range(4):
        answer_truly(session)
    wanted = session.question()
    session.close()
    again = open_made(tmp_path, pool=session.pool)
    assert again.progress() == session.progress()
    found = again.question()
    assert isinstance(wanted, Picture)
    assert isinstance(found, Picture)
    assert found.picture == wanted.picture
    assert again.labels == session.labels


def test_of_copies_one_is_kept_with_the_label_that_any_had(tmp_path: Path) -> None:
    copies = [(name_of(1), name_of(4)), (name_of(2), name_of(5), name_of(8))]
    session = open_made(tmp_path, groups=0, copies=copies)
    first = session.question()
    assert isinstance(first, Copies)
    session.answer(first.number, Kept(first.pictures[1]))
    second = session.question()
    assert isinstance(second, Copies)
    assert len(second.pictures) == 3
    session.answer(second.number, Skipped())
    assert isinstance(session.question(), Picture)
    assert session.progress().dropped == 1
    assert session._state.dropped == {name_of(1)}
    assert session.progress().left == 29


def test_a_group_shows_one_of_the_copies_and_its_label_goes_with_the_one_that_stays(
    tmp_path: Path,
) -> None:
    copies = [tuple(name_of(number) for number in range(0, 30, 3))]
    session = open_made(tmp_path, groups=3, copies=copies)
    shown: list[Path] = []
    while isinstance(question := session.question(), Group):
        shown += question.pictures
        session.answer(question.number, Named(word_of(question.pictures[0])))
    own = [path for path in shown if session._name(path) in copies[0]]
    assert len(own) <= 1
    question = session.question()
    assert isinstance(question, Copies)
    session.answer(question.number, Kept(question.pictures[-1]))
    kept = session._name(question.pictures[-1])
    assert session.progress().dropped == 9
    assert (kept in session._state.labels) == bool(own)


def test_an_answer_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    session = open_made(tmp_path)
    question = session.question()
    assert isinstance(question, Group)
    before, journal = everything(session), (tmp_path / "out" / "answers.jsonl").read_bytes()
    wrong: list[tuple[int, Answer, str]] = [
        (question.number - 1, Named("ant"), "got one to number"),
        (question.number, Named("ant", (tmp_path / "other.png",)), "is none of them"),
        (question.number, Named(" "), "printable text"),
        (question.number, Named("a/b"), "that a folder can have"),
        (question.number, Named(".."), "that a folder can have"),
        (question.number, Kept(question.pictures[0]), "Expected a name for the group"),
    ]
    for number, answer, said in wrong:
        with pytest.raises(ValueError, match=said):
            session.answer(number, answer)
    assert everything(session) == before
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == journal
    session.answer(question.number, Named("ant"))
    with pytest.raises(ValueError, match="Expected an answer to the question that is asked"):
        session.answer(question.number, Named("ant"))  # twice, from another tab


def test_a_checkpoint_begins_with_what_it_knows(tmp_path: Path) -> None:
    session = open_made(tmp_path / "first", groups=0)
    for _ in range(8):
        answer_truly(session)
    model = session._guesser._model
    model.memory = model.memory.with_contents(None)
    pool = made_pool(tmp_path / "second" / "pictures")
    again = open_made(tmp_path / "second", model=model, pool=pool, groups=0)
    assert again.progress().labelled == 8
    assert "8 of 30 pictures are in the checkpoint already" in again.notes[-1]
    assert again.labels == session.labels
    question = again.question()
    assert isinstance(question, Picture)
    assert again._name(question.picture) not in again._start.labels
    again.answer(question.number, Named("dog"))
    assert again.labels == (*session.labels, "dog")
    again.undo()
    assert again.labels == session.labels


def test_more_pictures_than_are_compared_come_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_knn.labelling.asking.SAMPLE", 4)
    session, seen = open_made(tmp_path, groups=0, count=10), set()
    while isinstance(question := session.question(), Picture):
        seen.add(question.picture)
        before = everything(session)
        answer_truly(session)
        session.question()
        session.undo()
        assert everything(session) == before  # also where another part began
        answer_truly(session)
    assert len(seen) == 10
