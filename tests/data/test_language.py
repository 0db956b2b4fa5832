"""Languages of texts, of many scripts and of languages that share one."""

from __future__ import annotations

import time

import pytest

from alignment.data.language import language

SENTENCES = {
    "ar": "ستجتمع اللجنة مرة أخرى بعد ظهر يوم الخميس.",
    "cs": "Výbor se znovu sejde ve čtvrtek odpoledne.",
    "de": "Der Ausschuss trifft sich am Donnerstag wieder.",
    "el": "Η επιτροπή θα συνεδριάσει ξανά την Πέμπτη.",
    "en": "The committee will meet again on Thursday afternoon.",
    "es": "El comité se reunirá de nuevo el jueves por la tarde.",
    "fr": "Le comité se réunira de nouveau jeudi après-midi.",
    "he": "הוועדה תתכנס שוב ביום חמישי אחר הצהריים.",
    "hi": "समिति गुरुवार दोपहर को फिर बैठक करेगी।",
    "it": "Il comitato si riunirà di nuovo giovedì pomeriggio.",
    "ja": "委員会は木曜日の午後に再び開かれます。",
    "ko": "위원회는 목요일 오후에 다시 열릴 예정입니다.",
    "nl": "De commissie komt donderdagmiddag weer bijeen.",
    "pl": "Komisja spotka się ponownie w czwartek po południu.",
    "pt": "A comissão vai reunir-se novamente na quinta-feira à tarde.",
    "ru": "Комитет снова соберётся в четверг днём.",
    "sv": "Kommittén träffas igen på torsdag eftermiddag.",
    "th": "คณะกรรมการจะประชุมอีกครั้งในบ่ายวันพฤหัสบดี",
    "tr": "Komite perşembe öğleden sonra yeniden toplanacak.",
    "uk": "Комітет знову збереться у четвер після обіду.",
    "vi": "Ủy ban sẽ họp lại vào chiều thứ Năm.",
    "zh": "委员会将于周四下午再次开会。",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_tells_its_language(code: str) -> None:
    assert language(SENTENCES[code]) == code
    assert language(f"\n\n  {SENTENCES[code]}  ") == code


@pytest.mark.parametrize(
    "text",
    [
        *("", "  \n", "ok", "Paris", "12345", "3.14 + 2 = 5.14", "👍👍", "\ud800"),
        "def f(x):\n    return x+1",
        "SELECT name, age FROM users WHERE age > 30 ORDER BY name;",
        '{"a": 1, "b": [1, 2, 3]}',
        "for (int i = 0; i < n; i++) { sum += a[i]; }",
        "<div class='a'><p>hi</p></div>",
    ],
)
def test_what_is_too_short_or_code_is_undetermined(text: str) -> None:
    assert language(text) == "und"


def test_a_dialect_without_a_code_of_two_letters_is_its_language() -> None:
    assert language("佢哋聽日唔會嚟開會，我哋自己傾啦。") == "zh"  # Cantonese


def test_a_long_text_takes_no_longer() -> None:
    language("The first call loads the classifier.")
    start = time.perf_counter()
    assert language(SENTENCES["en"] * 20_000) == "en"  # a million characters
    assert time.perf_counter() - start < 0.1
