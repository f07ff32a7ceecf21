"""Text in its place as token ids, for the demo's words and real kinds of subword tokenizers."""

import copy

import pytest
from conftest import gemma_like, llama2_like, llama3_like, own_task

from support.files import UserError
from support.tokens import (
    DATE,
    MARKS,
    PUNCTUATION,
    allowed_ids,
    answer_ids,
    chat_pieces,
    continues_word,
    control_tokens,
    encode,
    encode_chat,
    encode_prompt,
    encode_row,
    ends_sentence,
    extractor_ids,
    marked_tokenizer,
    prompt_text,
    survives_encoding,
)


def test_the_parts_of_a_row_joined_are_the_chat_template_s_own_tokens(subword_tokenizer):
    task, row = own_task(), {"id": "1", "question": "How many are 3 + 14?", "answer": "17"}
    parts = encode_row(subword_tokenizer, task, row)
    prompt = encode_prompt(subword_tokenizer, task, row["question"], "think step by step.")[1]
    turn = [{"role": "user", "content": "How many are 3 + 14?\nUse think step by step."}]
    whole = subword_tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert parts.question + prompt + parts.turn_end == whole
    assert encode_chat(subword_tokenizer, task, row["question"], "think step by step.") == whole
    assert prompt_text(subword_tokenizer, parts, prompt) == " think step by step."


def test_the_answer_s_ids_are_those_behind_the_extractor(subword_tokenizer):
    task = own_task("boolean", "The answer is $", ("True", "False"))
    extractor, answer = extractor_ids(subword_tokenizer, task), answer_ids(subword_tokenizer, task, "True")
    whole = encode(subword_tokenizer, ". The answer is $ True")
    assert encode(subword_tokenizer, ".") + extractor + answer == whole
    assert subword_tokenizer.decode(answer).strip() == "True"


def test_an_extractor_that_merges_with_the_answer_is_an_error_that_shows_both_tails(subword_tokenizer):
    task = own_task("boolean", "The answer is $ ", ("True", "False"))
    with pytest.raises(UserError, match=r"row 7: the tokenizer merges.*become.*[TĠ▁]True"):
        encode_row(subword_tokenizer, task, {"id": "7", "question": "Is it?", "answer": "True"})


def test_a_prompt_without_tokens_is_an_error(demo_tokenizer, demo_task):
    with pytest.raises(UserError, match="--initial-prompt"):
        encode_prompt(demo_tokenizer, demo_task, "1 + 1 ?", "  ")


def test_a_prompt_that_the_tokenizer_does_not_know_is_an_error(demo_tokenizer, demo_task):
    with pytest.raises(UserError, match="does not know all of the prompt 'find rhubarb .'"):
        encode_prompt(demo_tokenizer, demo_task, "1 + 1 ?", "find rhubarb .")


def test_an_answer_without_tokens_is_an_error(demo_tokenizer):
    with pytest.raises(UserError, match="adds no token"):
        answer_ids(demo_tokenizer, own_task("number", "so it is $"), "8")  # "$" and "$8" are one unknown word


def test_a_template_that_rewrites_the_text_is_an_error(demo_tokenizer, demo_task):
    other = type(demo_tokenizer)(tokenizer_object=demo_tokenizer.backend_tokenizer, eos_token="<|end|>")
    other.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="chat template changes"):
        encode_prompt(other, demo_task, "1 + 1 ?", "find it .")


def control_names(tokenizer):
    return list(control_tokens(tokenizer).values())


def test_a_control_token_s_name_in_a_question_a_prompt_or_an_answer_is_text(subword_tokenizer):
    task = own_task("text", "The answer is")
    for name in control_names(subword_tokenizer)[:40]:
        row = {"id": "1", "question": f"Who says {name}{name} now{name}?", "answer": f"it is {name}."}
        parts = encode_row(subword_tokenizer, task, row)
        prompt = encode_prompt(subword_tokenizer, task, row["question"], f"think {name} twice.")[1]
        control = set(control_tokens(subword_tokenizer))
        assert not control.intersection(prompt + parts.answer + parts.extractor)
        plain = encode_row(subword_tokenizer, task, {"id": "2", "question": "Who?", "answer": "me"})
        for with_name, without in ((parts.question, plain.question), (parts.turn_end, plain.turn_end)):
            assert [i for i in with_name if i in control] == [i for i in without if i in control]
        text = subword_tokenizer.decode(parts.question + prompt + parts.turn_end)
        assert f"Who says {name}{name} now{name}?" in text and f"think {name} twice." in text
        whole = encode_chat(subword_tokenizer, task, row["question"], f"think {name} twice.")
        assert whole == parts.question + prompt + parts.turn_end


def test_a_tokenizer_that_marks_control_tokens_encodes_other_text_as_ever(subword_tokenizer):
    marked, original = marked_tokenizer(subword_tokenizer, MARKS[0])
    for text in ("How many  are\n3 + 14?", " Use it.", "Yes", ""):
        ids = [original.get(i, i) for i in marked.encode(text, add_special_tokens=False).ids]
        assert ids == subword_tokenizer.encode(text, add_special_tokens=False)


def test_a_control_token_s_name_that_is_a_word_of_the_vocabulary_is_an_error(demo_tokenizer, demo_task):
    with pytest.raises(UserError, match=r"spells '<\|end\|>'.*control token"):
        encode_chat(demo_tokenizer, demo_task, "1 + <|end|> ?", "find it .")


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


FRAME = "{{ bos_token }}TEXT{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ({"tools": FRAME, "rag": FRAME}, "ValueError"),
        ("{{ bos_token }}", "leaves it out"),
        ("{% for m in messages %}{{ m['content'][:5] }}{% endfor %}", "changes the user's text"),
    ],
)
def test_a_template_that_fails_or_loses_the_text_is_one_line(template, reason):
    tokenizer = with_template(llama3_like(), template)
    for encoded in (encode_chat, encode_prompt):
        with pytest.raises(UserError, match=reason) as error:
            encoded(tokenizer, own_task(), "How many?", "think.")
        assert "\n" not in str(error.value)


def test_of_several_templates_the_default_is_used():
    tokenizer = with_template(llama3_like(), {"tools": "no", "default": FRAME})
    pieces = chat_pieces(tokenizer, own_task().messages("How many?", "think."))
    assert pieces == [("<|begin_of_text|>TEXT", True), ("How many?\nUse think.", False), ("", True)]


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day():
    today = FRAME.replace("TEXT", "{{ strftime_now('%d %b %Y') }}, {{ strftime_now(\"%Y-%m-%d\") }}: ")
    pieces = chat_pieces(with_template(llama3_like(), today), own_task().messages("How many?", "think."))
    assert pieces[0].text == f"<|begin_of_text|>{DATE}, 2024-07-26: "


def test_behind_a_turn_marked_by_words_prompts_survive_encoding():
    """Their marker begins with a space, which a tokenizer drops where it decodes the marker alone."""
    tokenizer, task = llama2_like(), own_task()
    row = encode_row(tokenizer, task, {"id": "1", "question": "How many?", "answer": "1"})
    prompt = encode_prompt(tokenizer, task, "How many?", "use proper reasoning.")[1]
    assert tokenizer.decode(row.turn_end) != row.place.behind[-1].text
    assert survives_encoding(tokenizer, row, prompt)
    allowed = allowed_ids(tokenizer, len(tokenizer))
    assert sum(survives_encoding(tokenizer, row, [*prompt[:1], token, *prompt[2:]]) for token in allowed) > 20


def test_braces_in_a_question_are_text(subword_tokenizer):
    task = own_task()
    row = {"id": "1", "question": "What is {prompt} in {question}?", "answer": "1"}
    parts = encode_row(subword_tokenizer, task, row)
    assert "What is {prompt} in {question}?\nUse" in subword_tokenizer.decode(parts.question)


def test_survives_encoding_refuses_what_reads_the_same_but_is_other_tokens(subword_tokenizer):
    task, row = own_task(), {"id": "1", "question": "How many?", "answer": "1"}
    parts = encode_row(subword_tokenizer, task, row)
    good = encode_prompt(subword_tokenizer, task, "How many?", "use reasoning.")[1]
    assert survives_encoding(subword_tokenizer, parts, good)
    vocabulary = subword_tokenizer.get_vocab()
    letters = [vocabulary.get("Ġ", vocabulary.get("▁")), *(vocabulary[letter] for letter in "use")]
    assert subword_tokenizer.decode(letters).strip() == "use"
    assert not survives_encoding(subword_tokenizer, parts, letters)


# --- Question and prompt, read once ------------------------------------------------------------------


# --- What may enter a prompt --------------------------------------------------------------------------


def test_no_special_token_digit_or_symbol_may_enter_a_prompt(subword_tokenizer):
    allowed = allowed_ids(subword_tokenizer, len(subword_tokenizer) + 3)
    texts = [subword_tokenizer.decode([i]) for i in allowed]
    assert max(allowed) < len(subword_tokenizer) and len(set(allowed)) == len(allowed)
    assert not set(allowed) & set(subword_tokenizer.all_special_ids)
    assert "step" in {text.strip() for text in texts} and "." in texts
    assert all(t.strip().isalpha() or t in PUNCTUATION for t in texts)


def test_added_tokens_and_letters_of_other_alphabets_may_not_enter_a_prompt(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.add_tokens(["word", "m\u0438r", "STOP"])
    before, after = len(demo_tokenizer), len(tokenizer)
    allowed = allowed_ids(tokenizer, after)
    assert after == before + 3 and max(allowed) < before
    assert allowed == allowed_ids(demo_tokenizer, before)
    letters = gemma_like().backend_tokenizer.get_vocab()
    assert letters["<0x41>"] not in allowed_ids(gemma_like(), 600)


def test_of_a_model_with_fewer_embeddings_than_tokens_only_those_may_enter(demo_tokenizer):
    assert allowed_ids(demo_tokenizer, 80) == [i for i in allowed_ids(demo_tokenizer, 999) if i < 80]


@pytest.mark.parametrize(("text", "ends"), [(".", True), ("!", True), ("?", True), (",", False), ("now", False)])
def test_a_sentence_ends_in_a_full_stop_or_its_likes(demo_tokenizer, text, ends):
    class Tokenizer:
        def decode(self, ids):
            assert ids == (7,)
            return f"{text} "

    assert ends_sentence(Tokenizer(), (3, 7)) is ends


def test_a_token_continues_a_word_where_letters_meet_letters(subword_tokenizer):
    word, stop = (encode(subword_tokenizer, text)[-1] for text in (" step", " step."))
    piece = next(i for i in range(len(subword_tokenizer)) if subword_tokenizer.decode([i]) == "t")
    assert continues_word(subword_tokenizer, word, piece)
    assert not continues_word(subword_tokenizer, word, stop) and not continues_word(subword_tokenizer, stop, piece)
    own = encode(subword_tokenizer, " step step")[len(encode(subword_tokenizer, " step"))]
    assert not continues_word(subword_tokenizer, word, own)
