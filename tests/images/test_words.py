"""Words of the user's own: how their files are read, and which picture is asked which."""

from contextlib import closing
from pathlib import Path

import labelled
import pytest

from vise_fast.config.schema import load
from vise_fast.images.sources import open_source, open_training
from vise_fast.images.words.words import read
from vise_fast.system.errors import ConfigError, DataError

COUNT = 12


@pytest.fixture
def photos(tmp_path):
    labelled.save(tmp_path / "photos" / "in", labelled.drawn(COUNT))
    return tmp_path / "photos"


def written(place, name, text):
    path = place / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def opened(photos, words, *more, say=print):
    path = photos if isinstance(photos, str) else f"--data.dir={photos}"
    common = ["--data.max_pixels=16384", path, f"--data.queries={words}", "--data.holdout=0"]
    common.append(f"--run.dir={words.parent / 'run'}")
    return closing(open_training(load(None, [*common, *more]), 16, words.parent, say))


def asked(source, step=0, n=8, part=None):
    return [(image.given, image.tried) for image in source.batch(step, n, part)]


LIST = "# words\nred cup\n\nspilt  oil\nred cup\n<box>\nhull\nlifeboat\n"


def test_a_list(tmp_path):
    words = read(written(tmp_path, "a.txt", LIST), "data.queries")
    assert words.anywhere == ("red cup", "spilt oil", "hull", "lifeboat") and words.odd == 1
    assert words.describe().startswith("4 phrases in") and "1 lines left out" in words.describe()


def test_a_template_takes_class_names(tmp_path):
    path = written(tmp_path, "a.names", "cup\nplate\n")
    words = read(path, "data.queries", "the {name} nearest to the {name}")
    assert words.anywhere == (
        "the cup nearest to the cup",
        "the plate nearest to the plate",
    )
    with pytest.raises(ConfigError, match="no place for a phrase"):
        load(None, ["--data.queries_template=cup"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'image,query\nin/a.png,"cup, red"\nin/a.png,plate\n,spill\nb.png,\n'),
        (
            "a.jsonl",
            '{"image": "in/a.png", "query": ["cup, red", "plate"]}\n"spill"\n{"file": "b.png"}\n',
        ),
    ],
)
def test_phrases_of_pictures(tmp_path, name, text):
    words = read(written(tmp_path, name, text), "data.queries")
    assert words.of == {"in/a.png": ("cup, red", "plate")}
    assert words.anywhere == ("spill",) and words.odd == 1
    assert words.for_picture("photos: in/a.png") and not words.for_picture("a.png")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "holds no phrase"),
        ("a.txt", "<|im_end|>\n", "holds no phrase"),
        ("a.txt", b"\xff\xfe", "no UTF-8"),
        ("a.jsonl", "{\n[]\n", "holds no phrase"),
        ("a.csv", "x,y\n1,2\n", "holds no phrase"),
        ("a.docx", "a", "no form that is known"),
    ],
)
def test_what_is_no_file_of_words_is_one_line(tmp_path, name, text, said):
    with pytest.raises(DataError, match=said) as caught:
        read(written(tmp_path, name, text), "data.queries")
    assert "\n" not in str(caught.value) and "--data.queries" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "nowhere.txt", "eval.absent")


def test_a_draw_is_named_by_seed_step_and_place(photos, tmp_path):
    words = written(tmp_path, "a.txt", "".join(f"word {i}\n" for i in range(50)))
    with opened(photos, words) as source, opened(photos, words) as again:
        whole = [asked(source, step) for step in range(4)]
        for step in (3, 0, 2):
            parts = [*asked(again, step, part=range(3)), *asked(again, step, part=range(3, 8))]
            assert parts == whole[step], "neither parts nor order change a draw"
    assert len({tried for row in whole for _, tried in row}) == 32
    assert all(len(set(tried)) == 8 and given is None for row in whole for given, tried in row)
    with opened(photos, words, "--train.seed=1") as source:
        assert asked(source) != whole[0]


def test_the_pictures_are_those_of_a_run_without_words(photos, tmp_path):
    words = written(tmp_path, "a.txt", LIST)
    plain = load(None, [f"--data.dir={photos}", "--data.max_pixels=16384", "--data.holdout=0"])
    with opened(photos, words) as source, closing(open_source(plain, 16, tmp_path)) as without:
        known = source.identity()
        assert known.pop("words") and known == without.identity()
        for step in range(3):
            names = [image.name for image in source.batch(step, 8)]
            assert names == [image.name for image in without.batch(step, 8)]


def test_a_share_is_asked_in_own_words(photos, tmp_path):
    words = written(tmp_path, "a.txt", LIST)
    with opened(photos, words, "--data.queries_share=0.25", "--data.queries_tries=0") as source:
        given = [pair[0] for step in range(100) for pair in asked(source, step)]
    share = sum(phrase is not None for phrase in given) / len(given)
    assert 0.2 < share < 0.3
    assert set(given) == {None, "red cup", "spilt oil", "hull", "lifeboat"}


def test_a_picture_with_a_phrase_is_asked_for_it(photos, tmp_path):
    text = "image,query\nin/000.png,cup\nin/000.png,plate\n003.png,spill\n"
    said = []
    with opened(photos, written(tmp_path, "a.csv", text), say=said.append) as source:
        found = [image for step in range(6) for image in source.batch(step, 8)]
    assert {image.given for image in found if image.name == "in/000.png"} == {"cup", "plate"}
    assert {image.given for image in found if image.name == "in/003.png"} == {"spill"}
    assert {image.given for image in found} == {"cup", "plate", "spill", None}
    assert any("2 of 12 pictures" in text for text in said)


def test_in_a_mixture_too(photos, tmp_path):
    words = written(tmp_path, "a.csv", "image,query\nin/000.png,cup\n")
    place = f"--data.mix=[{photos}=1]"
    with opened(place, words) as source:
        found = [image for step in range(3) for image in source.batch(step, 8)]
    assert {image.given for image in found if image.name.endswith("000.png")} == {"cup"}


def test_words_of_other_pictures_are_refused(photos, tmp_path):
    words = written(tmp_path, "a.csv", "image,query\nelsewhere.png,cup\n")
    with pytest.raises(DataError, match="none of the 12 pictures"):
        opened(photos, words)
    with pytest.raises(DataError, match="none of the 0 pictures"):
        opened("--data.workers=0", words)


def test_other_words_are_another_identity(photos, tmp_path):
    with opened(photos, written(tmp_path, "a.txt", "cup\n")) as source:
        before = source.identity()
    with opened(photos, written(tmp_path, "moved.txt", "cup\n")) as source:
        assert source.identity() == before
    with opened(photos, written(tmp_path, "a.txt", "cup\nplate\n")) as source:
        assert source.identity() != before


def test_the_example_names_all_of_it():
    config = load(Path(__file__).parents[2] / "examples" / "words_and_labels.yaml")
    assert config.data.queries == "words.txt" and config.eval.labels and config.eval.absent
