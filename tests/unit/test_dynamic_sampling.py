"""Which groups a step learns from when those of equal rewards are replaced."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dynamic_sampling import refill_size, refill_start, select

GROUPS = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda flags: {f"p{i}": f for i, f in enumerate(flags)})


@given(teaches=GROUPS, num_prompts=st.integers(1, 20))
def test_every_sampled_group_is_accounted_for_once(teaches: dict[str, bool], num_prompts: int) -> None:
    selection = select(teaches, num_prompts)
    assert all(teaches[prompt_id] for prompt_id in selection.learned)
    assert not any(teaches[prompt_id] for prompt_id in selection.padding)
    chosen = [*selection.learned, *selection.padding]
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) + selection.num_dropped + selection.num_surplus == len(teaches)


@given(teaches=GROUPS, num_prompts=st.integers(1, 20))
def test_a_batch_is_full_if_enough_was_sampled_and_teaching_groups_come_first(
    teaches: dict[str, bool], num_prompts: int
) -> None:
    selection = select(teaches, num_prompts)
    assert len(selection.learned) == min(num_prompts, sum(teaches.values()))
    if len(teaches) >= num_prompts:
        assert len(selection.learned) + len(selection.padding) == num_prompts
    if selection.padding:
        assert selection.num_surplus == 0


@given(teaches=GROUPS, num_prompts=st.integers(1, 40))
def test_a_refill_asks_for_at_least_what_is_missing_and_at_most_a_batch(
    teaches: dict[str, bool], num_prompts: int
) -> None:
    missing = num_prompts - sum(teaches.values())
    if missing > 0:
        assert missing <= refill_size(teaches, num_prompts) <= num_prompts


@given(
    max_refills=st.integers(1, 5), num_prompts=st.integers(1, 64),
    first=st.tuples(st.integers(0, 50), st.integers(0, 4)), second=st.tuples(st.integers(0, 50), st.integers(0, 4)),
)  # fmt: skip
def test_refills_never_share_a_prompt(
    max_refills: int, num_prompts: int, first: tuple[int, int], second: tuple[int, int]
) -> None:
    (a, r), (b, s) = (first[0], first[1] % max_refills), (second[0], second[1] % max_refills)
    starts = [refill_start(i, n, max_refills=max_refills, num_prompts=num_prompts) for i, n in ((a, r), (b, s))]
    assert (a, r) == (b, s) or abs(starts[0] - starts[1]) >= num_prompts
