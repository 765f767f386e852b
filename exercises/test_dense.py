"""python -m pytest exercises/test_dense.py          the second exercise of exercises/README.md"""

import random
import subprocess
import sys
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import retriever
from data import Doc, InputError, Question
from prompts import SEARCH_R1
from rollout import rollout

CONTEXT = 128
WORDS = [f"w{i}" for i in range(30)]


@cache
def tokenizer():
    """Each word is a token. Some tokens are a whole search, so that a random model searches often. There is
    no padding token, as in the tokenizer of Llama."""
    searches = [f"<search>w{i}</search>" for i in range(10)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS, *searches])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", chat_template=template
    )


@cache
def model():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer()), "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=None, bos_token_id=None)).eval()


def dense(docs):
    if not hasattr(retriever, "Dense"):
        pytest.fail("retriever.py has no class `Dense`: exercise 2, exercises/README.md", pytrace=False)
    return retriever.Dense(docs, model(), tokenizer())


def text(length, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def documents(n):
    """Documents of 1 to 40 words, long and short ones in turn. The title is one of the words."""
    return [Doc(f"d{i}", f"w{i % 30}", text(i * 17 % 40, i)) for i in range(n)]


@torch.no_grad()
def embedding(text):
    """The formula of the exercise, for one text and without padding."""
    ids = torch.tensor([tokenizer()(text, add_special_tokens=False).input_ids[:CONTEXT]])
    mean = model().base_model(input_ids=ids).last_hidden_state[0].mean(0)
    return (mean / mean.norm()).numpy()


def test_scores_are_cosines_of_mean_hidden_states():
    """The documents have many lengths. So padding that enters a mean, or that attention reads, shows."""
    docs, queries = documents(50), ["w3", text(9, "a"), text(20, "b")]
    for query, found in zip(queries, dense(docs).search(queries, 50), strict=True):
        expected = {d.id: float(embedding(query) @ embedding(f"{d.title}\n{d.text}")) for d in docs}
        assert {d.id: d.score for d in found} == pytest.approx(expected, abs=1e-5)
        scores = [d.score for d in found]
        assert scores == sorted(scores, reverse=True) and max(scores) - min(scores) > 0.1
        assert {(d.title, d.text) for d in found} == {(d.title, d.text) for d in docs}


def test_the_best_k_and_more_than_there_are():
    index = dense(documents(7))
    [best], [all_docs] = index.search(["w1 w2"], 3), index.search(["w1 w2"], 100)
    assert best == all_docs[:3] and len(all_docs) == 7
    assert [d.id for d in index.docs] == [d.id for d in documents(7)]  # what CorpusSimulator needs


def test_ties_come_in_the_order_of_the_corpus():
    """Equal texts have equal scores, bit for bit, wherever they stand. A batch cannot hold them all."""
    docs = documents(50)
    twins = [Doc(f"twin{i}", "w5", text(11, "twin")) for i in range(40)]
    for i, twin in enumerate(twins):
        docs.insert(2 * i, twin)
    for found in dense(docs).search([text(n, n) for n in range(1, 6)], len(docs)):
        same = [d for d in found if d.id.startswith("twin")]
        assert [d.id for d in same] == [twin.id for twin in twins] and len({d.score for d in same}) == 1


def test_no_query_depends_on_the_others():
    queries = [text(n, n) for n in (3, 30, 1, 12)]
    together, again = dense(documents(40)).search(queries, 5), dense(documents(40)).search(queries, 5)
    alone = [dense(documents(40)).search([query], 5)[0] for query in queries]
    assert together == again == alone


def test_texts_without_a_token():
    docs = [*documents(3), Doc("empty", "", "")]
    none, found = dense(docs).search(["", "w1"], 4)
    assert none == []
    assert [d.score for d in found if d.id == "empty"] == [0.0]
    assert np.isfinite([d.score for d in found]).all() and len(found) == 4


def test_a_long_text_is_cut_at_the_context():
    """Anything longer would be outside of what the model was trained on, or an error."""
    long = text(CONTEXT + 40, "long")
    docs = [Doc("long", "w1", long), Doc("cut", "w1", " ".join(long.split()[: CONTEXT - 1])), *documents(3)]
    [found] = dense(docs).search([long], 5)
    scores = {d.id: d.score for d in found}
    assert scores["long"] == pytest.approx(scores["cut"], abs=1e-5)
    assert scores["long"] == pytest.approx(float(embedding(long) @ embedding(f"w1\n{long}")), abs=1e-5)


def test_the_corpus_is_embedded_in_batches():
    sizes = []
    hook = model().base_model.register_forward_hook(lambda module, args, out: sizes.append(len(out[0])))
    try:
        dense(documents(100))
    finally:
        hook.remove()
    assert max(sizes) <= 32 and len(sizes) <= 10


def test_wrong_arguments():
    index = dense(documents(3))
    for queries, k, error in ("w1", 3, TypeError), (["w1"], 0, ValueError):
        with pytest.raises(error):
            index.search(queries, k)
    with pytest.raises(InputError):
        dense([])


def test_a_rollout_reads_its_documents():
    docs = [Doc(str(i), f"w{i}", f"w{i + 1} w{i + 2}") for i in range(20)]
    index, questions = dense(docs), [Question("1", "w3 w4", ["w5"], "words")]
    episodes = rollout(
        model(), tokenizer(), SEARCH_R1, questions, group_size=8, retriever=index, topk=2,
        max_completion_length=30,
    )  # fmt: skip
    results = [pair for e in episodes for pair in pairwise(e.segments) if pair[1].kind == "env"]
    assert len(results) >= 4
    for before, result in results:
        query = before.text.rpartition("<search>")[2].removesuffix("</search>")
        assert " ".join(d.text for d in index.search([query], 2)[0]) in result.text


def test_retriever_still_starts_without_torch():
    """`python retriever.py` serves BM25, and programs that work on text alone import this file."""
    dense(documents(1))
    code = "import sys, retriever; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "import retriever loads torch"
