"""Parity: which inputs are tried, and when two outputs count as the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, GPT2Config, MptConfig, PreTrainedModel, RobertaConfig

from slimheads.data.metrics import Agreement
from slimheads.verification.parity import Case, Outputs, Runner, cases, compare, compare_all, torch_runner

ENCODER = BertConfig(vocab_size=50, pad_token_id=3)
DECODER = GPT2Config(vocab_size=50)


# ------------------------------------------------------------------------------------------------------ the cases


def test_an_encoder_is_tried_alone_in_batches_and_padded_on_both_sides() -> None:
    assert [str(case) for case in cases(ENCODER, "feature-extraction")] == [
        "batch 1, length 1, no padding",
        "batch 1, length 8, no padding",
        "batch 1, length 128, no padding",
        "batch 4, length 1, no padding",
        "batch 4, length 8, left padding",
        "batch 4, length 8, right padding",
        "batch 4, length 128, left padding",
        "batch 4, length 128, right padding",
        "batch 1, length 512, no padding",
    ]


def test_a_decoder_is_also_tried_after_a_past() -> None:
    said = [str(case) for case in cases(DECODER, "text-generation")]
    assert said[:8] == [str(case) for case in cases(ENCODER, "feature-extraction")][:8]
    assert said[8:] == [
        "batch 1, length 1, no padding, past 7",
        "batch 1, length 8, no padding, past 7",
        "batch 1, length 128, no padding, past 7",
        "batch 4, length 1, left padding, past 7",
        "batch 4, length 8, left padding, past 7",
        "batch 4, length 128, left padding, past 7",
        "batch 1, length 1024, no padding",
        "batch 1, length 6, no padding, past 1018",
        "batch 1, length 1, no padding, past 1023",
    ]


@pytest.mark.parametrize(
    ("table", "fresh", "continued"), [(12, {1, 8, 12}, {1, 6}), (66, {1, 8, 66}, {1, 8, 59}), (8, {1, 8}, {1, 4})]
)
@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_inputs_stay_within_a_short_position_table(
    family: str, table: int, fresh: set[int], continued: set[int]
) -> None:
    config = {"gpt2": GPT2Config(vocab_size=50, n_positions=table), "mpt": MptConfig(vocab_size=50, max_seq_len=table)}
    made = cases(config[family], "text-generation")
    assert {case.length for case in made if not case.past} == fresh
    assert {case.length for case in made if case.past} == continued
    assert all(case.ids.shape[1] == case.past + case.length <= table for case in made)
    assert len({str(case) for case in made}) == len(made)


@pytest.mark.parametrize("config", [ENCODER, DECODER, RobertaConfig(vocab_size=50, pad_token_id=1)])
def test_padding_is_what_it_says(config: Any) -> None:
    for case in cases(config, "text-generation"):
        assert case.ids.shape == case.mask.shape == (case.batch, case.past + case.length)
        assert case.ids.min() >= 0 and case.ids.max() < 50
        pads = (case.mask == 0).sum(axis=1)
        assert pads[0] == 0 and (case.mask.sum(axis=1) > 0).all()
        assert len(set(pads)) == (1 if case.padding == "no" else 4), "every row has its own length"
        assert case.past == 0 or case.mask[:, case.past :].all(), "new tokens after a past are never padding"
        for row, count in zip(case.mask, pads, strict=True):
            place = slice(None, count) if case.padding == "left" else slice(len(row) - count, None)
            assert row[place].sum() == 0
        if config.pad_token_id is not None:
            assert ((case.ids == config.pad_token_id) == (case.mask == 0)).all()


def test_positions_are_counted_from_each_rows_first_token() -> None:
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    case = Case(3, 4, "left", 0, {"input_ids": np.zeros_like(mask), "attention_mask": mask})
    assert case.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 1, 1]]


def test_the_same_seed_gives_the_same_cases() -> None:
    for one, two in zip(cases(DECODER, "text-generation"), cases(DECODER, "text-generation"), strict=True):
        assert (one.ids == two.ids).all() and (one.mask == two.mask).all()


# ------------------------------------------------------------------------------------------------------- compare

MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
PADDED = Case(2, 3, "left", 2, {"input_ids": np.zeros((2, 5), np.int64), "attention_mask": MASK})


def agree_one_by_one(a: np.ndarray, b: np.ndarray, atol: float, rtol: float) -> tuple[bool, float]:
    """The rule again, as a loop over the unpadded positions of PADDED's three new tokens."""
    worst, agreed = 0.0, True
    for row in range(2):
        for position in range(3):
            if PADDED.mask[row, PADDED.past + position] == 0:
                continue
            for one, two in zip(a[row, position].tolist(), b[row, position].tolist(), strict=True):
                worst = max(worst, abs(one - two))
                agreed = agreed and abs(one - two) <= atol + rtol * abs(one)
    return agreed, worst


@pytest.mark.parametrize("seed", range(8))
def test_the_verdict_and_the_difference_are_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2, 3, 4)).astype(np.float32)
    b = (a + rng.standard_normal(a.shape) * 10.0 ** rng.integers(-4, -2, a.shape)).astype(np.float32)
    b[1, 0] += 100  # padding
    for atol, rtol in ((1e-3, 1e-3), (1e-1, 0.0), (0.0, 1e-2), (0.0, 10.0)):
        found = compare({"x": a}, {"x": b}, PADDED, atol, rtol)
        agreed, worst = agree_one_by_one(a, b, atol, rtol)
        assert found.passed == agreed and found.max_abs == pytest.approx(worst, rel=1e-12)
        assert found.max_rel == pytest.approx(worst / np.abs(np.concatenate([a[0].ravel(), a[1, 1:].ravel()])).max())
        assert (found.reason is None) == agreed


def test_the_verdict_is_taken_relative_to_the_reference_not_the_other() -> None:
    a, b = np.full((2, 3, 1), 10.0), np.full((2, 3, 1), 11.0)
    assert compare({"x": a}, {"x": b}, PADDED, 0.0, 0.0999).passed is False
    assert compare({"x": a}, {"x": b}, PADDED, 0.0, 0.1001).passed is True


def test_without_atol_the_largest_difference_is_held_against_the_largest_value() -> None:
    a = np.zeros((2, 3, 2))
    a[0, 0, 0] = 50.0
    b = a.copy()
    b[0, 1, 1] = 1.0
    assert compare({"x": a}, {"x": b}, PADDED, None, 0.02).passed
    assert not compare({"x": a}, {"x": b}, PADDED, None, 0.0199).passed
    assert not compare({"x": np.zeros_like(a)}, {"x": b}, PADDED, None, 0.3).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("both", [False, True])
def test_only_finite_values_agree_even_where_both_have_the_same_other(bad: float, both: bool) -> None:
    a, b = np.ones((2, 3, 2)), np.ones((2, 3, 2))
    b[0, 0, 0] = bad
    a[0, 0, 0] = bad if both else 1.0
    for one, two in ((a, b), (b, a)):
        found = compare({"x": one}, {"x": two}, PADDED, 1e9, 1e9)
        assert not found.passed and "NaN or infinite" in str(found.reason)


def test_what_stands_at_padding_does_not_matter() -> None:
    a, b = np.ones((2, 3, 2)), np.ones((2, 3, 2))
    b[1, 0] = np.nan
    assert compare({"x": a}, {"x": b}, PADDED, 0.0, 0.0).passed
    assert compare({"start_logits": a[..., 0]}, {"start_logits": b[..., 0]}, PADDED, 0.0, 0.0).passed


@pytest.mark.parametrize("kept", [5, 4], ids=["whole", "last four positions"])
def test_a_cache_is_compared_at_the_positions_that_are_not_padding(kept: int) -> None:
    """[batch, heads, positions, head_dim], past positions too; a window drops the first ones."""
    for row, position in np.ndindex(2, kept):
        a, b = np.ones((2, 3, kept, 2)), np.ones((2, 3, kept, 2))
        b[row, 1, position, 0] = 2.0
        same = compare({"present.0.key": a}, {"present.0.key": b}, PADDED, 0.1, 0.1).passed
        assert same == (PADDED.mask[row, 5 - kept + position] == 0)


def test_an_output_without_positions_is_compared_whole() -> None:
    a, b = np.ones((2, 3)), np.ones((2, 3))
    b[1, 0] = 2.0
    assert not compare({"pooler_output": a}, {"pooler_output": b}, PADDED, 0.1, 0.1).passed


def test_one_output_that_differs_is_enough() -> None:
    a = {"x": np.ones((2, 3, 1)), "y": np.ones((2, 3, 1)), "only here": np.ones((2, 3, 1))}
    for name in ("x", "y"):
        b = {"x": a["x"], "y": a["y"]} | {name: a[name] + 1}
        found = compare(a, b, PADDED, 1e-3, 1e-3)
        assert not found.passed and found.max_abs == 1.0 and str(found.reason).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("other", "reason"), [({"x": np.ones((2, 3, 2))}, "[2, 3, 1] and [2, 3, 2]"), ({"y": np.ones(1)}, "no output")]
)
def test_other_shapes_and_other_outputs_are_differences(other: Outputs, reason: str) -> None:
    found = compare({"x": np.ones((2, 3, 1))}, other, PADDED, 1.0, 1.0)
    assert not found.passed and reason in str(found.reason) and math.isinf(found.max_abs)


# ---------------------------------------------------------------------------------- what the cases together find

KINDS: dict[str, Callable[[Case], bool]] = {
    "alone, unpadded": lambda c: c.batch == 1 and c.length > 1 and not c.past,
    "one token": lambda c: c.length == 1 and not c.past,
    "a batch": lambda c: c.batch == 4,
    "padded left": lambda c: c.padding == "left" and not c.past,
    "padded right": lambda c: c.padding == "right",
    "long": lambda c: c.length == 128,
    "after a past": lambda c: c.past > 0,
    "alone after a past": lambda c: c.past > 0 and c.batch == 1,
    "one token after a padded past": lambda c: c.past > 0 and c.padding == "left" and c.length == 1,
}


def spoiled(right: Runner, when: Callable[[Case], bool]) -> Runner:
    """The runner with one value wrong, at the last position that counts, in the cases of one kind."""

    def run(case: Case) -> Outputs:
        outputs = {name: array.copy() for name, array in right(case).items()}
        if when(case):
            row = case.batch - 1
            position = int(np.flatnonzero(case.mask[row])[-1]) - case.past
            outputs["logits"][row, position, 0] += 0.01
        return outputs

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_that_is_wrong_in_one_kind_of_case_only_is_found_there(
    kind: str, tiny: Callable[..., PreTrainedModel]
) -> None:
    model = tiny("gpt2")
    over = cases(model.config, "text-generation")
    found = compare_all(torch_runner(model), spoiled(torch_runner(model), KINDS[kind]), over, 1e-4, 1e-4)
    wrong = [outcome.case for outcome in found if not outcome.passed]
    assert wrong and wrong == [str(case) for case in over if KINDS[kind](case)]


def altered(model: PreTrainedModel, change: Callable[[dict[str, Any]], dict[str, Any]]) -> PreTrainedModel:
    """The model with its inputs changed on their way in."""
    wrong = copy.deepcopy(model)
    wrong.register_forward_pre_hook(lambda _module, args, kwargs: (args, change(dict(kwargs))), with_kwargs=True)
    return wrong


def failing(model: PreTrainedModel, wrong: PreTrainedModel, task: str) -> set[tuple[str, bool]]:
    """(padding, after a past?) of the cases in which the two models differ."""
    over = cases(model.config, task)
    found = compare_all(torch_runner(model), torch_runner(wrong), over, 1e-4, 1e-4)
    return {(c.padding, c.past > 0) for c, outcome in zip(over, found, strict=True) if not outcome.passed}


def test_an_encoder_that_does_not_see_its_mask_fails_with_padding_on_either_side(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    model = tiny("bert")
    wrong = altered(model, lambda k: k | {"attention_mask": torch.ones_like(k["attention_mask"])})
    assert failing(model, wrong, "feature-extraction") == {("left", False), ("right", False)}


def test_a_decoder_that_does_not_see_its_mask_fails_with_left_padding(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama")
    wrong = altered(model, lambda k: k | {"attention_mask": torch.ones_like(k["attention_mask"])})
    assert failing(model, wrong, "text-generation") == {("left", False), ("left", True)}


def test_a_decoder_that_counts_padding_as_positions_fails_with_left_padding(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    model = tiny("gpt2")

    def from_zero(kwargs: dict[str, Any]) -> dict[str, Any]:
        past = kwargs["attention_mask"].shape[1] - kwargs["input_ids"].shape[1]
        return kwargs | {"position_ids": torch.arange(kwargs["input_ids"].shape[1])[None] + past}

    assert failing(model, altered(model, from_zero), "text-generation") == {("left", False), ("left", True)}


def test_a_decoder_whose_positions_restart_after_a_past_fails_there_only(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("gpt2")
    wrong = altered(
        model,
        lambda k: k | {"position_ids": k["position_ids"] - k["position_ids"][:, :1]} if "past_key_values" in k else k,
    )
    assert {past for _, past in failing(model, wrong, "text-generation")} == {True}


def test_continuing_a_cache_gives_what_reading_everything_at_once_gives(
    decoder_type: str, tiny: Callable[..., PreTrainedModel]
) -> None:
    model = tiny(decoder_type)
    for case in cases(model.config, "text-generation"):
        ids, mask = torch.from_numpy(case.ids), torch.from_numpy(case.mask)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
        expected = whole.logits[:, case.past :].numpy()
        found = compare({"logits": expected}, torch_runner(model)(case), case, 1e-4, 1e-4)
        assert found.passed, found


@pytest.mark.parametrize("which", ["reference", "other"])
def test_a_form_that_cannot_run_a_case_fails_that_case_with_its_own_words(which: str) -> None:
    def right(case: Case) -> Outputs:
        return {"x": np.ones((case.batch, case.length, 1))}

    def broken(case: Case) -> Outputs:
        if case.batch == 4:
            raise RuntimeError("shape '[4, 7]' is invalid\nmore")
        return right(case)

    over = cases(ENCODER, "feature-extraction")
    found = compare_all(*((broken, right) if which == "reference" else (right, broken)), over, 1e-4, 1e-4)
    assert [outcome.passed for outcome in found] == [case.batch == 1 for case in over]
    said = "the reference" if which == "reference" else "it"
    assert {outcome.reason for outcome in found if not outcome.passed} == {
        f"{said} does not run: shape '[4, 7]' is invalid"
    }


# ----------------------------------------------------------------------------------------------------- agreement


def test_agreement_is_the_mean_over_all_positions_that_are_not_padding() -> None:
    """By hand: cosines 1, 0 and 0.6 and -1; the padded position, on which the two differ most, is not counted."""
    mask = np.array([[1, 1, 1], [0, 0, 1]])
    case = Case(2, 3, "left", 0, {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": mask})
    a = np.array([[[2, 0], [0, 3], [5, 0]], [[1, 0], [1, 0], [0, 1]]], np.float32)
    b = np.array([[[7, 0], [3, 0], [3, 4]], [[-9, 0], [-9, 0], [0, -1]]], np.float32)
    agreement = Agreement()
    cache = {"present.0.key": np.zeros((2, 1, 3, 1), np.float32)}
    compare_all(lambda _: {"logits": a} | cache, lambda _: {"logits": b} | cache, [case], None, np.inf, agreement)
    assert agreement.cosine == pytest.approx((1 + 0 + 0.6 - 1) / 4)
    assert agreement.top1 == 0.25
    agreement.add(a[:, :1], a[:, :1], logits=True)
    assert agreement.cosine == pytest.approx((1 + 0 + 0.6 - 1 + 1 + 1) / 6) and agreement.top1 == 0.5


def test_agreement_of_nothing_is_none() -> None:
    agreement = Agreement()
    assert agreement.cosine is None and agreement.top1 is None
    agreement.add(np.ones((1, 2, 3)), np.ones((1, 2, 3)), logits=False)
    assert agreement.cosine == pytest.approx(1.0) and agreement.top1 is None


def test_only_cases_that_hold_say_how_far_two_forms_agree() -> None:
    agreement = Agreement()
    right, wrong = (lambda _: {"logits": np.ones((1, 2))}), (lambda _: {"logits": np.full((1, 2), np.nan)})
    assert not compare_all(right, wrong, [Case(1, 1, "no", 0, {})], None, 0.1, agreement)[0].passed
    assert agreement.cosine is None
    assert compare_all(right, right, [Case(1, 1, "no", 0, {})], None, 0.1, agreement)[0].passed
    assert agreement.cosine == pytest.approx(1.0)
