"""Whether a recipe's actors fit a cluster. Seconds, for the import of Ray; none is started."""

from pathlib import Path

import pytest

from orchestrator.cluster import Need, fit, needs
from orchestrator.errors import UserError
from orchestrator.recipe import load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "deploy" / "recipes" / "quickstart.yaml"


def need(setting: str, num_actors: int, num_cpus: float, num_gpus: float = 0.0) -> Need:
    return Need(setting=setting, num_actors=num_actors, num_cpus=num_cpus, num_gpus=num_gpus)


def test_the_quickstart_fits_two_cores_to_the_last_share() -> None:
    fit(needs(load_recipe(QUICKSTART)), [{"CPU": 2.0}])


def test_what_every_section_reserves_is_added_up() -> None:
    with pytest.raises(UserError) as caught:
        fit(needs(load_recipe(QUICKSTART, ["students.num_actors=3"])), [{"CPU": 1.0}, {"CPU": 1.0, "memory": 1e9}])
    assert str(caught.value) == (
        "the recipe's actors must fit the cluster: they reserve 3 CPUs (students 1.5 + teachers 0.5 + blending 0.25 + "
        "graders 0.25 + learner 0.5), the cluster has 2; lower num_actors or num_cpus in those sections"
    )


def test_gpus_are_counted_too() -> None:
    with pytest.raises(UserError, match=r"they reserve 2 GPUs \(students 2\), the cluster has 0"):
        fit([need("students", 2, 1.0, 1.0)], [{"CPU": 8.0}])


def test_an_actor_does_not_stretch_over_nodes() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    fit([need("students", 2, 1.0), need("learner", 1, 2.0)], nodes)
    with pytest.raises(UserError, match=r"for students, number 2 of 2, none is left with 1 CPUs and 0 GPUs"):
        fit([need("students", 2, 1.0), need("learner", 2, 1.5)], [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}])


def test_shares_of_a_gpu_that_fill_it_exactly_fit() -> None:
    fit([need("students", 3, 0.1, 0.333), need("learner", 1, 0.1, 0.001)], [{"CPU": 0.4, "GPU": 1.0}])
    fit([need("students", 10, 0.1)], [{"CPU": 1.0}])
