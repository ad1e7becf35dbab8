"""Generation that drafts with the lower part gives token for token what the model's own `generate` gives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eecompile import eecompile, strategies
from eecompile.errors import EecompileError, StrategyError, UnsupportedModelError
from eecompile.language.decoder import CompiledDecoder
from eecompile.language.draft import DraftHead
from eecompile.language.generation import Choosing, DraftOptions, Generation, Row, Standing
from eecompile.language.lookup import lookup
from eecompile.language.split import Split
from tests.language.decoders import DECODERS, V, decoder, prompts

PADDED = [name for name in DECODERS if name != "gemma2"]  # in float64 its own scores of padded rows are NaN


def compiled(model: Any, batch: dict[str, Tensor], **options: Any) -> CompiledDecoder:
    chosen = strategies.SelfSpeculative(**{"exit": 2, "threshold": 0.0, "max_draft": 4, **options})
    found: Any = eecompile(model, chosen, example_kwargs=batch)
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


@pytest.fixture(scope="module")
def fast(llama: Any) -> CompiledDecoder:
    return compiled(llama, prompts())


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_decoding_is_the_models(name: str) -> None:
    model, batch = decoder(name), prompts(padded=name in PADDED)
    fast = compiled(model, batch)
    wanted = model.generate(**batch, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    trace = fast.run_generate(**batch, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert type(trace.output) is type(wanted)
    assert torch.equal(trace.output.sequences, wanted.sequences)
    assert trace.counts.drafted > 0
    for got, theirs in zip(trace.output.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        size = theirs.keys.shape[2]  # sliding layers keep the last ones only
        for mine, wanted_there in ((got.keys, theirs.keys), (got.values, theirs.values)):
            torch.testing.assert_close(
                mine[:, :, -size:], wanted_there, atol=1e-5, rtol=1e-5
            )  # some compute in float32 inside


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5, "repetition_penalty": 1.3},
        {"eos_token_id": [2, 7, 9, 11, 30, 41]},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"bad_words_ids": [[5], [6]]},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_generate(fast: CompiledDecoder, options: dict[str, Any]) -> None:
    batch, options = prompts(), {"max_new_tokens": 20, "do_sample": False, **options}
    assert torch.equal(fast.generate(**batch, **options), fast.model.generate(**batch, **options))


def test_each_row_is_as_if_alone(fast: CompiledDecoder) -> None:
    batch = prompts()
    together = fast.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for b in range(3):
        real = batch["attention_mask"][b].bool()
        alone = fast.generate(
            input_ids=batch["input_ids"][b][real][None], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0, -12:], together[b, -12:])


def test_rows_accept_at_their_own_pace(llama: Any) -> None:
    trace = compiled(llama, prompts(), exit=3).run_generate(
        **prompts(6), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert len({tuple(s) for s in trace.sources}) > 1
    assert 0 < trace.acceptance < 1


@pytest.mark.parametrize("given", ["nan", "constant", "inf"])
def test_a_wrong_draft_head_changes_speed_only(llama: Any, given: str) -> None:
    class Wrong(nn.Module):
        vocabulary = torch.arange(V)

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.full((*hidden.shape[:-1], V), {"nan": float("nan"), "constant": 1.0, "inf": float("inf")}[given])

    fast = compiled(llama, prompts(), lookup=0)
    fast.draft_heads["2"] = Wrong()
    got = fast.generate(**prompts(), max_new_tokens=12, do_sample=False)
    assert torch.equal(got, llama.generate(**prompts(), max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("right", range(5))
def test_a_rejection_at_every_position_of_the_draft(llama: Any, right: int) -> None:
    """A head that knows the text and errs after so many tokens."""
    batch = prompts(1)
    wanted = llama.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    text = wanted[0].tolist()
    fast = compiled(llama, batch, lookup=0)
    drafted: list[int] = []

    class Knowing(nn.Module):
        vocabulary = torch.arange(V)

        def forward(self, hidden: Tensor) -> Tensor:
            at = min(self.at + len(drafted), len(text) - 1)
            token = text[at] if len(drafted) < right else (text[at] + 1) % V
            drafted.append(token)
            return torch.nn.functional.one_hot(torch.tensor([[token]]), V) * 50.0

        @property
        def at(self) -> int:
            if len(drafted) == 4:  # a round has at most four drafts
                drafted.clear()
            return len(rows[0].ids)

    rows: list[Any] = []
    fast.draft_heads["2"] = Knowing()
    original = fast._generation

    def watched(*args: Any) -> Any:
        generation = original(*args)
        run = generation.run

        def started(*a: Any) -> Any:
            prefill = generation._prefill

            def first(*b: Any) -> None:
                rows.append(generation.rows[0])
                prefill(*b)

            generation._prefill = first
            return run(*a)

        generation.run = started
        return generation

    fast._generation = watched  # type: ignore[method-assign]
    got = fast.run_generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(got.output, wanted)
    if right:
        assert got.counts.accepted >= right


def test_sampling_does_not_depend_on_drafts(llama: Any) -> None:
    batch, options = prompts(), {"do_sample": True, "max_new_tokens": 16, "temperature": 0.9, "top_k": 12}
    torch.manual_seed(5)
    wanted = compiled(llama, batch, threshold=2.0, lookup=0).generate(**batch, **options)
    for drafting in ({"max_draft": 1}, {"max_draft": 5}, {"exit": 3}):
        torch.manual_seed(5)
        assert torch.equal(compiled(llama, batch, **drafting).generate(**batch, **options), wanted)
    torch.manual_seed(6)
    assert not torch.equal(compiled(llama, batch).generate(**batch, **options), wanted)


def test_sampled_tokens_follow_the_models_distribution(llama: Any) -> None:
    """Chi-square of the second new token, whose draft is verified, over 8 tokens; bound of 0.999 with 7 degrees is 24.3."""
    keep = list(range(10, 18))
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    banned = [[t] for t in range(V) if t not in keep]
    options = {"do_sample": True, "max_new_tokens": 2, "bad_words_ids": banned, "top_k": 0, "eos_token_id": None}
    fast = compiled(llama, {**batch, "attention_mask": torch.ones(1, 4, dtype=torch.int64)})
    many = batch["input_ids"].repeat(100, 1)
    torch.manual_seed(0)
    got = torch.cat([fast.generate(input_ids=many, **options)[:, 4:] for _ in range(12)])
    first = llama(batch["input_ids"]).logits[0, -1].detach()[keep].softmax(0)
    after = torch.stack([llama(torch.tensor([[3, 4, 5, 6, t]])).logits[0, -1].detach()[keep].softmax(0) for t in keep])
    expected = (first @ after) * len(got)
    seen = torch.tensor([int((got[:, 1] == t).sum()) for t in keep])
    assert float(((seen - expected) ** 2 / expected).sum()) < 24.3


def test_the_users_model_is_as_it_was_also_after_an_exception(llama: Any) -> None:
    before = {name: (id(m), len(m._forward_hooks), "forward" in m.__dict__) for name, m in llama.named_modules()}
    fast = compiled(llama, prompts())

    class Breaks(hf.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] > 12:
                raise RuntimeError("stop here")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="stop here"):
        fast.generate(**prompts(), max_new_tokens=20, stopping_criteria=hf.StoppingCriteriaList([Breaks()]))
    assert before == {name: (id(m), len(m._forward_hooks), "forward" in m.__dict__) for name, m in llama.named_modules()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("widths", [(1, 3, 3, 6, 6), (1, 2, 5, 5, 7, 7)])
def test_added_columns_change_nothing_but_speed(name: str, widths: tuple[int, ...]) -> None:
    model, batch = decoder(name), prompts()
    fast = compiled(model, batch)
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    for inputs in (batch, prompts(1, padded=False)):
        fast.widths = ()
        wanted = fast.run_generate(**inputs, **options)
        fast.widths = widths
        got = fast.run_generate(**inputs, **options)
        assert torch.equal(got.output.sequences, wanted.output.sequences) and got.counts == wanted.counts
        for mine, theirs in zip(got.output.past_key_values.layers, wanted.output.past_key_values.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_context_is_filled_to_its_end(name: str) -> None:
    model = decoder(name)
    batch = prompts(2, 100, padded=False)
    options = {"max_length": 128, "do_sample": False, "eos_token_id": None}
    for kv in ("verify", "deferred", "copy"):
        fast = compiled(model, batch, kv=kv)
        got = fast.generate(**batch, **options)
        assert got.shape == (2, 128)
        assert kv != "verify" or torch.equal(got, model.generate(**batch, **options))


@pytest.mark.parametrize(
    ("head", "lookup", "sure", "drafts"),
    [
        (1.5, 0.5, (0.9, 0.9, 0.9), [(5, True), (60, False)]),  # the head agrees with the first, not with the second
        (1.5, 0.5, (0.9, 0.1, 0.1), [(5, True), (6, True), (7, True)]),
        (0.5, 1.5, (0.9, 0.9, 0.9), [(5, True), (6, True), (7, True)]),
    ],
)
def test_a_draft_head_overrules_prompt_lookup_where_it_gives_more(
    llama: Any, head: float, lookup: float, sure: tuple[float, ...], drafts: list[tuple[int, bool]]
) -> None:
    options = DraftOptions(0.5, 4, 3, 0.4, "verify")
    answers = torch.tensor([5, 60, 60]), torch.tensor(sure)
    generation = Generation(Split(llama, "model.layers", 2), None, options, Choosing([], []), 64, lambda states: answers)  # type: ignore[arg-type]
    row = Row([1, 2], drafts=[(5, True), (6, True), (7, True)], head=Standing(head), lookup=Standing(lookup))
    generation.rows = [row]
    states = [torch.zeros(32)] * 4
    assert generation._overruled(0, states) == (len(drafts) == 2)
    assert row.drafts == drafts and len(states) == (2 if len(drafts) == 2 else 4)


def test_a_draft_head_pauses_where_it_gives_nothing(llama: Any) -> None:
    batch = prompts(1, padded=False)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    out = llama.generate(**batch, **options)
    text = [*out[0].tolist(), 0]

    class Wrong(DraftHead):
        def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            unused = torch.tensor([next(t for t in range(V) if t not in text)])
            return unused, torch.ones(1)

    fast = compiled(llama, batch, lookup=0)
    fast.draft_heads["2"] = Wrong(32, torch.arange(V), 4)
    trace = fast.run_generate(**batch, **options)
    assert torch.equal(trace.output, out) and trace.counts.accepted == 0
    assert trace.counts.lower == 39 + trace.counts.drafted
    assert trace.counts.drafted <= 4 * (3 + 35 // 9), "three drafts in a row, then one after eight that are left out"


def test_prompt_lookup_pauses_where_it_gives_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def wrong(ids: Any, longest: int, most: int) -> list[int]:
        asked.append(len(ids))
        return [(wanted[len(ids)] + 1) % V] * min(most, 1)

    batch = prompts(1, padded=False)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    out = llama.generate(**batch, **options)
    wanted = [*out[0].tolist(), 0, 0]
    monkeypatch.setattr("eecompile.language.generation.lookup", wrong)
    trace = compiled(llama, batch, threshold=2.0).run_generate(**batch, **options)
    assert torch.equal(trace.output, out)
    assert trace.counts.looked_up_accepted == 0 and len(asked) == 39
    assert trace.counts.looked_up == 3 + (39 - 1 - 3) // 9, "three in a row, then one after eight that are left out"


def test_other_threads_generate_with_the_model_meanwhile(fast: CompiledDecoder) -> None:
    batch, options = prompts(), {"max_new_tokens": 12, "do_sample": False}
    wanted = fast.model.generate(**batch, **options)
    found: list[Tensor] = []
    calls = [fast.generate, fast.model.generate] * 2
    threads = [threading.Thread(target=lambda call=call: found.append(call(**batch, **options))) for call in calls]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and all(torch.equal(f, wanted) for f in found)


def test_new_weights_are_followed(llama: Any) -> None:
    model = decoder("llama", seed=1)
    fast = compiled(model, prompts())
    model.load_state_dict(llama.state_dict())
    got = fast.generate(**prompts(), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, llama.generate(**prompts(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("at", range(4))
def test_hooks_on_blocks_are_followed(at: int) -> None:
    model = decoder("llama")
    fast = compiled(model, prompts(), threshold=0.0, lookup=0)
    block = model.model.layers[at]
    block.register_forward_hook(lambda module, args, output: (output[0] if isinstance(output, tuple) else output) * 1.5)
    block.register_forward_pre_hook(lambda module, args: (args[0] + 0.3, *args[1:]))
    calls = []
    block.register_forward_hook(lambda module, args, output: calls.append(1))
    wanted = model.generate(**prompts(), max_new_tokens=10, do_sample=False)
    calls.clear()
    trace = fast.run_generate(**prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(trace.output, wanted)
    passes = trace.counts.full + (trace.counts.lower if at < 2 else trace.counts.upper)
    assert len(calls) == passes, "once for each pass of the part that the block is in"
    fast.fit([prompts(8, 20)["input_ids"]], epochs=1, rank=4)
    assert torch.equal(fast.generate(**prompts(), max_new_tokens=10, do_sample=False), wanted)


def test_as_a_decoding_method_of_the_model(fast: CompiledDecoder) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    got = fast.model.generate(**prompts(), custom_generate=fast.decoder(), **options)
    assert torch.equal(got, fast.model.generate(**prompts(), **options))


def test_generation_goes_on_with_the_original_model(fast: CompiledDecoder) -> None:
    batch = prompts(2, padded=False)
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    wanted = fast.model.generate(**batch, max_new_tokens=14, **options).sequences
    half = fast.generate(**batch, max_new_tokens=7, **options)
    mask = torch.ones_like(half.sequences)
    for module in (fast.model, fast):
        cache = fast.generate(**batch, max_new_tokens=7, **options).past_key_values
        rest = module.generate(
            input_ids=half.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=7, **options
        ).sequences
        assert torch.equal(rest, wanted)


@pytest.mark.parametrize("length", [90, 120])  # of max_position_embeddings 128
def test_the_cache_is_little_larger_than_that_of_plain_decoding(llama: Any, length: int) -> None:
    def size(cache: Any) -> int:
        return sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))

    fast, batch = compiled(llama, prompts()), prompts(2, padded=False)
    options = {"max_length": length, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    _, generation = fast._generated((), {**batch, **options})
    plain = llama.generate(**batch, **options).past_key_values
    assert size(generation.cache) <= 1.1 * size(plain)


def test_scores_and_logits_are_the_models(fast: CompiledDecoder) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    got, wanted = fast.generate(**prompts(), **options), fast.model.generate(**prompts(), **options)
    for kind in ("scores", "logits"):
        torch.testing.assert_close(getattr(got, kind), getattr(wanted, kind))


def test_streamer_gets_the_tokens_in_order(fast: CompiledDecoder) -> None:
    class Kept:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    kept = Kept()
    out = fast.generate(**prompts(1), max_new_tokens=9, do_sample=False, streamer=kept)
    assert kept.tokens == [*out[0].tolist(), -1]


def test_deferred_keeps_drafts_and_its_cache_is_exact(llama: Any) -> None:
    fast = compiled(llama, prompts(), kv="deferred")
    trace = fast.run_generate(
        **prompts(), max_new_tokens=10, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert trace.counts.accepted + trace.counts.looked_up_accepted > 0
    ids = trace.output.sequences
    mask = torch.cat([prompts()["attention_mask"], ids.new_ones(3, 10)], 1)[:, :-1]
    wanted = llama(
        input_ids=ids[:, :-1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).past_key_values
    for got, theirs in zip(trace.output.past_key_values.layers, wanted.layers, strict=True):
        real = mask.bool()[:, None, :, None].expand_as(theirs.keys)
        torch.testing.assert_close(got.keys[real], theirs.keys[real])


def test_a_trained_head_drafts_and_calibration_chooses(llama: Any) -> None:
    fast = compiled(llama, prompts(), lookup=0)
    texts = [prompts(8, 24, seed) for seed in range(6)]
    report = fast.fit(texts, epochs=5, rank=8)
    assert fast.draft_head is not None and report.agreement >= 0 and "Draft head" in str(report)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(fast.generate(**prompts(), **options), llama.generate(**prompts(), **options))
    projected = fast.calibrate(texts, positions=100, min_speed=0.0)
    assert (fast.exit, fast.threshold, fast.max_draft) == (2, projected.best.threshold, projected.best.max_draft)
    assert projected.to_dict()["best"]["speed"] == projected.best.speed
    assert fast.draft_cost == projected.best.draft_cost > 0 and fast.widths[0] == 1
    before = (fast.exit, fast.threshold, fast.max_draft)
    with pytest.raises(StrategyError, match="does not pay"):
        fast.calibrate(texts, positions=100, min_speed=1e6)
    assert (fast.exit, fast.threshold, fast.max_draft) == before


def test_a_fit_that_was_stopped_goes_on(llama: Any, tmp_path: Path) -> None:
    texts = [prompts(8, 24, seed) for seed in range(4)]
    whole, broken = compiled(llama, prompts()), compiled(llama, prompts())
    report = whole.fit(texts, epochs=5, rank=4)
    broken.fit(texts, epochs=2, rank=4, checkpoint_dir=tmp_path)
    again = broken.fit(texts, epochs=5, rank=4, checkpoint_dir=tmp_path, resume="must")
    assert again == report and report.epochs > 2
    mine, theirs = whole.draft_heads["2"].state_dict(), broken.draft_heads["2"].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for options, named in (({"rank": 8}, "rank: 4"), ({"lr": 0.5}, "lr: 0.002"), ({"tokens": 50}, "positions")):
        with pytest.raises(StrategyError, match=named):
            broken.fit(texts, **{"epochs": 5, "rank": 4, **options}, checkpoint_dir=tmp_path)
    with pytest.raises(StrategyError, match="no checkpoint"):
        broken.fit(texts, checkpoint_dir=tmp_path / "none", resume="must")
    assert broken.fit(texts, epochs=1, rank=8, checkpoint_dir=tmp_path, resume=False).epochs == 1


def test_the_best_token_of_a_draft_head_is_that_of_its_logits() -> None:
    torch.manual_seed(0)
    for rank in (0, 4):
        head, hidden = DraftHead(16, torch.tensor([3, 5, 8, 13, 21]), rank), torch.randn(7, 16)
        hidden[2] = float("nan")
        tokens, sure = head.best(hidden)
        real = torch.arange(7) != 2
        wanted = head(hidden).softmax(-1).max(-1)
        assert torch.equal(tokens[real], head.vocabulary[wanted.indices][real])
        torch.testing.assert_close(sure, wanted.values.detach(), equal_nan=True)


def test_on_cuda_a_draft_head_calls_the_fused_operator() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with torch.device("meta"):
        head = DraftHead(16, torch.arange(5), 4)
    with FakeTensorMode(allow_non_fake_inputs=True), Seen(), torch.no_grad():
        tokens, _ = head.to_empty(device="cuda").best(torch.empty(3, 16, device="cuda"))
    assert tokens.is_cuda and "eecompile.head_confidence.default" in names


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
    ids=lambda o: o if isinstance(o, str) else next(iter(o)),
)
def test_what_has_no_meaning_is_refused(fast: CompiledDecoder, options: dict[str, Any], named: str) -> None:
    with pytest.raises(StrategyError, match=named):
        fast.generate(**prompts(), max_new_tokens=4, **options)


IDS = torch.ones(2, 5, dtype=torch.int64)
NO_TEXT = {
    "nothing": (None, "no loader of text"),
    "a number": (7, "no loader of text"),
    "one batch": ({"input_ids": IDS}, "no loader of text"),
    "a text": ("once upon a time", "no loader of text"),
    "no batch": ([], "gave no batch"),
    "texts": (["once upon a time"], "holds token ids"),
    "an empty batch": ([()], "holds token ids"),
    "no tokens": ([IDS[:, :0]], "holds token ids"),
    "embeddings": ([torch.randn(2, 5, 16)], "holds token ids"),
    "another tokenizer": ([IDS, IDS * 10_000], "not the model's"),
    "padding of -100": ([IDS * -100], "not the model's"),
    "another mask": ([{"input_ids": IDS, "attention_mask": IDS[:, 1:]}], "attention_mask="),
    "a row of padding": ([{"input_ids": IDS, "attention_mask": IDS * torch.tensor([[1], [0]])}], "attention_mask="),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("verb", ["fit", "speculation", "calibrate"])
def test_what_is_no_text_is_refused(fast: CompiledDecoder, name: str, verb: str) -> None:
    given, named = NO_TEXT[name]
    with pytest.raises(StrategyError, match=named):
        getattr(fast, verb)(given)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("fit", {"epochs": 0}),
        ("fit", {"lr": float("nan")}),
        ("fit", {"rank": -1}),
        ("fit", {"tokens": 1}),
        ("speculation", {"exits": [0]}),
        ("speculation", {"exits": [9]}),
        ("speculation", {"exits": []}),
        ("speculation", {"exits": 2}),
        ("speculation", {"positions": 0}),
        ("calibrate", {"min_speed": "fast"}),
    ],
)
def test_numbers_out_of_range_are_refused(fast: CompiledDecoder, verb: str, options: dict[str, Any]) -> None:
    with pytest.raises(StrategyError, match=r"out of range|is not a|are numbers of blocks"):
        getattr(fast, verb)([IDS], **options)


def test_models_that_are_no_decoders_are_refused() -> None:
    ids = {"input_ids": torch.randint(3, V, (2, 6))}
    chosen = strategies.SelfSpeculative()
    small = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = hf.BertModel(hf.BertConfig(**small))
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    neo = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, **local))
    for model in (encoder, t5, neo, nn.Linear(3, 3)):
        with pytest.raises(UnsupportedModelError):
            eecompile(model, chosen, example_kwargs=ids)
    with pytest.raises(StrategyError, match="example"):
        eecompile(decoder("llama"), chosen)
    with pytest.raises(StrategyError, match="1 to 3"):
        eecompile(decoder("llama"), strategies.SelfSpeculative(exit=4), example_kwargs=ids)
    with pytest.raises(EecompileError):
        eecompile(decoder("llama"), strategies.SelfSpeculative() + strategies.Branchy(), example_kwargs=ids)


def test_lookup_finds_what_followed_the_last_time() -> None:
    assert lookup([5, 6, 7, 8, 5, 6], 3, 2) == [7, 8]
    assert lookup([1, 2, 9, 1, 2, 3, 1, 2], 2, 4) == [3, 1, 2]
    assert lookup([1, 2, 3, 4], 3, 4) == []
    assert lookup([1], 3, 4) == []


@pytest.mark.nightly
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(PADDED), rows=st.integers(1, 4), length=st.integers(2, 20), exit=st.integers(1, 3),
    draft=st.integers(1, 7), threshold=st.sampled_from([0.0, 0.02, 0.3, 2.0]), lookups=st.integers(0, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_prompt_and_options_give_the_models_tokens(
    name: str, rows: int, length: int, exit: int, draft: int, threshold: float, lookups: int, seed: int
) -> None:
    model, batch = decoder(name, seed % 5), prompts(rows, length, seed, padded=length > 4)
    fast = compiled(model, batch, exit=exit, max_draft=draft, threshold=threshold, lookup=lookups)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": [2, 9, 17, 33]}
    assert torch.equal(fast.generate(**batch, **options), model.generate(**batch, **options))
