import pytest

from finescope.distillation.language import language, other_language

TEXTS = {
    "english": "The house on the hill was built by a man who had seen the sea and wanted to live as far from it as he could.",
    "german": "Das Haus auf dem Hügel wurde von einem Mann gebaut, der das Meer gesehen hatte und nicht in der Nähe sein wollte.",
    "french": "La maison sur la colline est celle d'un homme qui avait vu la mer et ne voulait pas vivre dans une ville du port.",
    "spanish": "La casa de la colina es de un hombre que había visto el mar y no quería vivir en una ciudad con puerto.",
    "italian": "La casa sulla collina è di un uomo che aveva visto il mare e non voleva vivere in una città del porto.",
    "portuguese": "A casa do monte é de um homem que tinha visto o mar e não queria viver em uma cidade com porto.",
    "dutch": "Het huis op de heuvel is van een man die de zee had gezien en niet in een stad aan het water te wonen wenste.",
}
RUSSIAN = "Дом на холме построил человек, который видел море."
CHINESE = "山上的房子是一个见过大海的人建造的。他不想住在海边的城市里。"
JAPANESE = "丘の上の家は海を見たことがあり港の町に住みたくなかった男が建てたものです。"
KANA = "そのいえは、うみをみたことがあるひとがたてたものです。"


@pytest.mark.parametrize("name", TEXTS)
def test_the_language_is_told(name: str) -> None:
    assert language(TEXTS[name]) == name


def test_of_few_words_or_names_none_is_told() -> None:
    assert language("the house on the hill") == ""
    assert language("Ada Grace Alan Edsger Barbara Donald Tony Niklaus Dennis Ken Bjarne Guido Linus Larry") == ""


@pytest.mark.parametrize("other", [TEXTS["german"], TEXTS["spanish"], RUSSIAN, CHINESE])
def test_another_language_is_told(other: str) -> None:
    assert other_language(TEXTS["english"], other)
    assert other_language(other, TEXTS["english"])


def test_the_same_language_is_no_other() -> None:
    assert not other_language(
        TEXTS["english"], "It was a man who had been at the sea that built the house which is on that hill."
    )
    assert not other_language(RUSSIAN, "Человек, видевший море, построил дом на холме.")
    # Kana and Chinese characters are written side by side.
    assert not other_language(JAPANESE, KANA)
    # Too few letters for either to be told.
    assert not other_language("x = 5", "икс равен пяти")
    # A name in another script is no other language.
    assert not other_language(TEXTS["english"], TEXTS["english"] + " He was called Пётр.")
