"""Two thousand files that are no pictures, or hardly, at the endpoint of the Space."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data.test_images import bombs, mutated
from support.pictures import encoded, picture

pytest.importorskip("gradio")
from support.space_app import features_of, published, write_picture
from support.space_client import Refused, Visitor
from support.space_serving import serving

FILES, SENDERS = 2_000, 8
MEGABYTES_MORE = 500
"""What a server may grow by: two pictures of 24 megapixels, and one of at most 64 at a time."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def bad_file(number: int) -> bytes:
    """A mutated picture of one of the formats, a bomb, or noise."""
    chance = random.Random(number)
    if number % 20 == 0:
        side = chance.choice([5_000, 10_000, 60_000])
        return chance.choice(list(bombs(side, side).values()))
    if number % 20 == 1:
        return chance.randbytes(chance.randrange(2_000))
    size = (chance.randint(1, 64), chance.randint(1, 64))
    kind = chance.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    return mutated(encoded(picture(chance.randrange(5), number, size), kind), chance)


def send(visitor: Visitor, path: Path) -> str:
    """The message of a refusal; empty if the file was answered."""
    try:
        answer = visitor.ask("classify", [visitor.upload(path), None, None, None, None, None])
    except Refused as error:
        return json.loads(str(error))["error"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    return ""


def test_two_thousand_malformed_files_do_no_harm(tmp_path: Path, capsys) -> None:
    paths = []
    for number in range(FILES):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(bad_file(number))
    good = write_picture(tmp_path / "good.png", 1, 901)
    with serving(tmp_path) as server:
        before = server.megabytes()
        visitors = [Visitor(server.url) for _ in range(SENDERS)]

        def send_share(number: int) -> list[str]:
            return [send(visitors[number], path) for path in paths[number::SENDERS]]

        with ThreadPoolExecutor(SENDERS) as pool:
            messages = [one for some in pool.map(send_share, range(SENDERS)) for one in some]
        answer = visitors[0].ask(
            "classify", [visitors[0].upload(good), None, None, None, None, None]
        )
        after, log = server.megabytes(), server.log.read_text("utf-8")
    refused = [message for message in messages if message]
    assert len(messages) == FILES
    assert len(refused) > FILES / 4
    assert [one for one in refused if "Traceback" in one or len(one) > 300 or "\n" in one] == []
    assert "Traceback" not in log
    assert after - before < MEGABYTES_MORE
    model = published(tmp_path / "library")
    scores = model(features=features_of(model, [good])).logits[0].exp().tolist()
    wanted = dict(zip(model.config.class_names, scores, strict=True))
    assert answer["probabilities"] == pytest.approx(wanted, abs=2e-6)
    with capsys.disabled():
        print(
            f"\n{FILES} malformed files: {len(refused)} refused with a message, "
            f"{FILES - len(refused)} answered, memory {before} -> {after} MB"
        )
