"""The embedded starter: its text, its task, its tokenizer, and the folder it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from sartor.demo import tokenizer
from sartor.demo.files import MODEL
from sartor.demo.make import DOCUMENTS_SEED, TOKENIZER_DOCUMENTS, main
from sartor.demo.task import FORMS, examples
from sartor.demo.world import COLOURS, DAYS, ITEMS, NAMES, NUMBERS, PLACES, documents
from sartor.demo.write import TRAINING, TRAINING_SEED, UNSEEN, UNSEEN_SEED, write
from sartor.errors import UsageError
from sartor.job import load

FOUR_MEGABYTES = 4_000_000


@pytest.fixture(scope="module")
def training() -> list[tuple[str, str]]:
    return _pairs(examples(TRAINING, TRAINING_SEED))


@pytest.fixture(scope="module")
def unseen() -> list[tuple[str, str]]:
    return _pairs(examples(UNSEEN, UNSEEN_SEED, unseen=True))


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def _pairs(made: list[dict]) -> list[tuple[str, str]]:
    assert [[turn["role"] for turn in example["messages"]] for example in made] == [["user", "assistant"]] * len(made)
    return [(example["messages"][0]["content"], example["messages"][1]["content"]) for example in made]


def _says(sentence: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", sentence, re.IGNORECASE) is not None


def test_the_same_seed_gives_the_same_text_and_another_seed_other_text():
    assert list(documents(200, 3)) == list(documents(200, 3))
    assert list(documents(200, 3))[:100] == list(documents(100, 3))
    assert not set(documents(200, 3)) & set(documents(200, 4))


def test_text_is_filled_in_and_tidy():
    for text in documents(2000, 5):
        assert text.strip() == text
        assert "{" not in text
        assert "None" not in text
        assert "  " not in text


def test_the_same_seed_gives_the_same_examples(training):
    assert _pairs(examples(TRAINING, TRAINING_SEED)) == training
    assert _pairs(examples(TRAINING, TRAINING_SEED + 1)) != training


def test_unseen_examples_share_no_sentence_and_no_person_with_item(training, unseen):
    def who_has_what(pairs):
        return {(answer["who"], answer["item"]) for answer in (json.loads(text) for _, text in pairs)}

    assert len({sentence for sentence, _ in training}) == TRAINING
    assert len({sentence for sentence, _ in unseen}) == UNSEEN
    assert not {sentence for sentence, _ in training} & {sentence for sentence, _ in unseen}
    assert not who_has_what(training) & who_has_what(unseen)


def test_training_shows_every_word_that_unseen_examples_ask_for(training):
    told = [json.loads(answer) for _, answer in training]
    for key, values in {"who": NAMES, "item": ITEMS, "colour": COLOURS, "place": PLACES, "day": DAYS, "count": NUMBERS}.items():
        assert {answer[key] for answer in told if key in answer} == set(values)


@pytest.mark.parametrize("which", ["training", "unseen"])
def test_answers_are_compact_json_and_follow_from_the_sentence(which, request):
    for sentence, text in request.getfixturevalue(which):
        answer = json.loads(text)
        assert json.dumps(answer, separators=(",", ":")) == text
        order = ["who", "count", "colour", "item", "place", "day"]
        assert list(answer) == [key for key in order if key in answer]
        assert {"who", "count", "item"} <= set(answer)
        assert _says(sentence, answer["who"])
        assert any(_says(sentence, number) for number in _spellings(answer["count"]))
        assert _says(sentence, answer["item"] if answer["count"] == 1 else ITEMS[answer["item"]])
        for key, values in {"colour": COLOURS, "place": PLACES, "day": DAYS}.items():
            assert [value for value in values if _says(sentence, value)] == ([answer[key]] if key in answer else [])


def _spellings(count: int) -> list[str]:
    return [str(count), *(["a", "an"] if count == 1 else [NUMBERS[count]])]


def test_sentences_come_in_many_forms():
    assert len(set(FORMS)) == len(FORMS) >= 15


def test_the_shipped_tokenizer_is_the_one_learnt_from_the_text(shipped):
    learnt = tokenizer.learn(documents(TOKENIZER_DOCUMENTS, DOCUMENTS_SEED))
    assert learnt.get_vocab() == shipped.get_vocab()
    assert len(shipped) == tokenizer.VOCABULARY == AutoConfig.from_pretrained(MODEL).vocab_size


def test_the_tokenizer_gives_back_every_text(shipped, training, unseen):
    for text in [text for pair in training + unseen for text in pair] + list(documents(300, 6)) + ["naïve “日本”\t\r\n  {}[]"]:
        assert shipped.decode(shipped(text)["input_ids"]) == text


def test_the_chat_template_is_chatml_with_one_token_a_mark(shipped):
    messages = [{"role": "user", "content": "Ada has a hat."}, {"role": "assistant", "content": "{}"}]
    whole = shipped.apply_chat_template(messages, tokenize=False)
    prompt = shipped.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<|im_start|>user\nAda has a hat.<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert whole.startswith(prompt)
    assert [shipped(mark)["input_ids"] for mark in tokenizer.SPECIAL] == [[0], [1], [2]]
    assert (shipped.pad_token, shipped.eos_token) == (tokenizer.END_OF_TEXT, tokenizer.END_OF_TURN)


def test_the_model_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= FOUR_MEGABYTES
    assert (MODEL / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["demo", 'odd: "name" #1 é'])
def test_write_makes_a_folder_whose_job_loads(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write(Path(name))
    job = load(path)
    assert path == Path(name) / "job.yaml"
    assert Path(job.model.path, "model.safetensors").is_file()
    assert len(Path(job.data.path).read_text(encoding="utf-8").splitlines()) == TRAINING
    assert len(Path(job.evaluation.path).read_text(encoding="utf-8").splitlines()) == UNSEEN == job.evaluation.generate
    assert job.output == f"{name}/run"


def test_write_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not an empty folder"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_make_writes_what_the_base_model_is_made_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sartor.demo.make.DOCUMENTS", 50)
    folder = tmp_path / "base-model"
    assert main([str(folder)]) == 0
    assert str(folder / "pretrain.yaml") in capsys.readouterr().out
    job = load(folder / "pretrain.yaml")
    assert job.model.random_weights
    assert not Path(job.model.path, "model.safetensors").exists()
    assert (Path(job.model.path) / "tokenizer.json").read_text() == (MODEL / "tokenizer.json").read_text()
    lines = Path(job.data.path).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(documents(50, DOCUMENTS_SEED))


def test_make_explains_wrong_usage(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
