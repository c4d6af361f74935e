"""Which script and language a text is in, as far as that can be told without a model."""

import re
import unicodedata
from collections import Counter

# The commonest words of languages of the Latin script; a word that several have tells little, and is in several.
_STOP_WORDS = {
    "english": "the of and to in is that for with are was this it be as on by from or which have has not you your an at",
    "german": "der die das und ist nicht ein eine einen mit von zu den dem im auf für sich auch als werden sie es wird",
    "french": "le la les des et est une un dans pour que qui sur pas du au aux ce cette avec par il elle sont vous",
    "spanish": "el la los las una un y es que en por con para del se su al como más son lo no fue este esta",
    "italian": "il lo la gli che di è un una per non con sono della del dei nel nella alla come si questo questa più",
    "portuguese": "o os as um uma e é que não do da dos das em para com por no na se ao mais como são foi",
    "dutch": "de het een en van is niet dat op met voor zijn te die aan door ook worden wordt bij als naar",
}
_WORDS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
# Scripts that are written side by side.
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "CJK"}
_LEAST_LETTERS, _MOST_MOVED = 20, 0.3
_LEAST_WORDS, _LEAST_SHARE, _LEAD = 12, 0.15, 1.5


def other_language(original: str, rewrite: str) -> bool:
    """Whether the rewrite is in another script or another language than the original, where both are long enough to tell."""
    one, other = _scripts(original), _scripts(rewrite)
    moved = sum(abs(one.get(name, 0.0) - other.get(name, 0.0)) for name in one.keys() | other.keys()) / 2
    if one and other and moved > _MOST_MOVED:
        return True
    languages = language(original), language(rewrite)
    return "" not in languages and languages[0] != languages[1]


def language(text: str) -> str:
    """The language whose commonest words make up at least 15 % of a text's words; "" where none stands out."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < _LEAST_WORDS:
        return ""
    counts = Counter({name: sum(word in known for word in words) for name, known in _WORDS.items()})
    (first, most), (_, second) = counts.most_common(2)
    return first if most >= _LEAST_SHARE * len(words) and most >= _LEAD * second else ""


def _scripts(text: str) -> dict[str, float]:
    """Each script's share of a text's letters; empty where there are few."""
    letters = [character for character in text if character.isalpha()]
    if len(letters) < _LEAST_LETTERS:
        return {}
    # A character's name begins with its script.
    names = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in letters)
    shares: Counter[str] = Counter()
    for name, count in names.items():
        shares[_ONE_SCRIPT.get(name, name)] += count
    return {name: count / len(letters) for name, count in shares.items()}
