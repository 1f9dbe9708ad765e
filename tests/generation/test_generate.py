"""effllm.generate against transformers' own generate, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effllm
from effllm import demo
from effllm.cache import OutOfPages, PagedKVCache

PROMPTS = [
    [5, 17, 42, 8, 3, 77, 61],
    [11],
    [90, 33, 21, 54],
    list(range(1, 41)),  # more than two pages
]


class Words:
    """The least of a tokenizer: token i is the word wi; the last byte of token 9 is missing."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, tokens: list[int], **options: bool) -> str:
        text = "".join(f"w{token} " for token in tokens)
        return text[:-1] + "\ufffd" if tokens and tokens[-1] % 2 else text


def transformers_greedy(model: Any, prompt: list[int], n: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def tokens_of(results: list[effllm.Generation]) -> list[list[int]]:
    return [result.tokens for result in results]


def test_greedy_equals_transformers(llama: Any) -> None:
    expected = [transformers_greedy(llama, prompt, 24) for prompt in PROMPTS]
    results = effllm.generate(llama, PROMPTS, max_new_tokens=24)
    assert tokens_of(results) == expected
    assert {r.finish_reason for r in results} == {"length"}
    assert {r.text for r in results} == {None}
    assert llama.config._attn_implementation == "sdpa"  # as before


def test_a_quantised_model_generates_as_transformers_runs_it(llama: Any) -> None:
    effllm.quantize_(llama, effllm.Int4Config(group_size=32))
    expected = [transformers_greedy(llama, prompt, 12) for prompt in PROMPTS[:2]]
    assert tokens_of(effllm.generate(llama, PROMPTS[:2], max_new_tokens=12)) == expected


def test_padded_tensor_and_strings_are_the_same_prompts(llama: Any) -> None:
    expected = tokens_of(effllm.generate(llama, PROMPTS[:3], max_new_tokens=6))
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS[:3]):
        ids[row, 7 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 7 - len(prompt) :] = 1
    assert expected == tokens_of(effllm.generate(llama, ids, attention_mask=mask, max_new_tokens=6))
    strings = [" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS[:3]]
    results = effllm.generate(llama, strings, tokenizer=Words(), max_new_tokens=6)
    assert tokens_of(results) == expected
    assert results[0].text == Words().decode(expected[0])


def test_stop_tokens_end_their_prompt_only(llama: Any) -> None:
    free = tokens_of(effllm.generate(llama, PROMPTS, max_new_tokens=16))
    stop = free[0][4]
    results = effllm.generate(llama, PROMPTS, max_new_tokens=16, stop_tokens=[stop])
    for result, whole in zip(results, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 16
        assert result.tokens == whole[:end]
        assert result.finish_reason == ("stop" if stop in whole else "length")
    # The model's own stop tokens are the default, one or several.
    for eos in (stop, [stop, 96]):
        llama.generation_config.eos_token_id = eos
        default = effllm.generate(llama, PROMPTS, max_new_tokens=16)
        expected = [transformers_greedy(llama, prompt, 16, pad_token_id=0) for prompt in PROMPTS]
        assert tokens_of(default) == expected
    assert tokens_of(effllm.generate(llama, PROMPTS, max_new_tokens=16, stop_tokens=())) == free


def test_sampling_does_not_depend_on_the_batch(llama: Any) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    batch = effllm.generate(llama, PROMPTS, seed=7, **options)
    assert batch == effllm.generate(llama, PROMPTS, seed=7, **options)
    assert batch != effllm.generate(llama, PROMPTS, seed=8, **options)
    for i, prompt in enumerate(PROMPTS):
        assert effllm.generate(llama, [prompt], seed=7 + i, **options) == [batch[i]]
    same = effllm.generate(llama, [PROMPTS[0]] * 3, seed=7, **options)
    assert len({tuple(result.tokens) for result in same}) == 3


def test_stream_sees_every_token_and_whole_characters(llama: Any) -> None:
    calls: list[tuple[int, int, str]] = []
    results = effllm.generate(
        llama,
        PROMPTS[:3],
        tokenizer=Words(),
        max_new_tokens=9,
        stream=lambda *call: calls.append(call),
    )
    for index, result in enumerate(results):
        mine = [(token, text) for i, token, text in calls if i == index]
        assert [token for token, _ in mine] == result.tokens
        assert all("\ufffd" not in text for _, text in mine[:-1])
    assert any(text == "" for _, _, text in calls)
    silent: list[str] = []
    effllm.generate(llama, [[1]], max_new_tokens=2, stream=lambda i, t, text: silent.append(text))
    assert silent == ["", ""]


def test_a_given_cache_shares_prefixes_and_is_left_clean(llama: Any) -> None:
    cache = PagedKVCache(3, 2, 16, max_batch=4, max_seq_len=64, page_size=4, dtype=torch.float32)
    free = cache.pool.num_free
    expected = tokens_of(effllm.generate(llama, PROMPTS, max_new_tokens=8))
    assert tokens_of(effllm.generate(llama, PROMPTS, max_new_tokens=8, cache=cache)) == expected
    assert cache.pool.num_free == free
    assert cache.length(cache.add(PROMPTS[3])) == 36  # found: all full pages but the last token's
    assert tokens_of(effllm.generate(llama, PROMPTS, max_new_tokens=8, cache=cache)) == expected

    def broken(*call: object) -> None:
        raise KeyboardInterrupt

    cache.reset()
    with pytest.raises(KeyboardInterrupt):
        effllm.generate(llama, PROMPTS, cache=cache, max_new_tokens=8, stream=broken)
    assert cache.pool.num_free == free
    assert llama.config._attn_implementation == "sdpa"
    small = PagedKVCache(3, 2, 16, max_batch=4, max_seq_len=64, num_pages=3, dtype=torch.float32)
    with pytest.raises(OutOfPages):
        effllm.generate(llama, PROMPTS, max_new_tokens=8, cache=small)
    assert small.pool.num_free == 2


def test_no_prompts(llama: Any) -> None:
    assert effllm.generate(llama, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        (
            [[1]] * 2 + [[2] * 250],
            {"max_new_tokens": 10},
            "prompt 2 has 250 tokens.*context of 256",
        ),
        (["a"], {}, "strings need a tokenizer"),
        ("a b", {}, "must be a list, got one string"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "goes with a tensor of prompts only"),
        (torch.ones(2, 3), {"attention_mask": torch.ones(2, 2)}, r"got \[2, 3\] and \[2, 2\]"),
        ([[1]], {"temperature": -0.5}, "temperature must be >= 0"),
    ],
)
def test_bad_input(llama: Any, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effllm.generate(llama, prompts, **options)


def test_the_demo_model_and_its_tokenizer() -> None:
    pytest.importorskip("transformers", reason="needs the extra effllm[hf]")
    model, tokenizer = demo.load(dtype=torch.float32)
    prompts = ["def read(path):\n", "import", 'x = "caf\u00e9 \u20ac"\n\n\nclass Stack:\n    """']
    pieces = [""] * len(prompts)

    def collect(index: int, token: int, text: str) -> None:
        pieces[index] += text

    results = effllm.generate(
        model, prompts, tokenizer=tokenizer, max_new_tokens=24, stream=collect
    )
    assert [result.text for result in results] == pieces
    for prompt, result in zip(prompts, results, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected = transformers_greedy(model, ids, 24)
        assert result.tokens == expected
        assert result.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.gpu
def test_gpu_tokens_are_the_likeliest(llama: Any) -> None:
    """Teacher forcing in fp32 on the CPU: each token chosen on the GPU is within rounding of the
    best; exact equality would hang on ties in bf16."""
    model = llama.to(torch.bfloat16)
    results = effllm.generate(model.cuda(), PROMPTS, max_new_tokens=8)
    exact = llama.float().cpu()
    for prompt, result in zip(PROMPTS, results, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + result.tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        assert ((logits.amax(1) - chosen) <= 0.05 * logits.std(1)).all()
