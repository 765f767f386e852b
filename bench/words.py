"""The tokenizer of the benchmarks: a word is a token, so that a text has as many tokens as it has words."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, among which are <pad>, <eos>, <user> and <assistant>. The id of a word is
    its place, and every other word becomes <pad>. It drops the system prompt, so that a prompt is as long as
    its question."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.normalizer = normalizers.Replace(Regex(r"<system>[\s\S]*</system>"), "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>",
        chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }} "
        "{% if m.role == 'system' %}</system> {% endif %}{% endfor %}<assistant>",
    )  # fmt: skip
